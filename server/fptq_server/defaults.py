"""The sampling that a model's authors recommend: what a request gets that does not say otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fptq_runtime.artifact.files import is_there
from fptq_runtime.engine.request import SamplingParams
from fptq_runtime.errors import FptqError
from fptq_runtime.models.loader import read_json

NAMES = {"temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p",
         "repetition_penalty": "repetition_penalty", "max_new_tokens": "max_tokens"}


def sampling_defaults(path: Path) -> dict[str, Any]:
    """What generation_config.json of a model directory says, under SamplingParams' names; do_sample false is
    temperature 0. Raises FptqError where a value cannot be used."""
    file = path / "generation_config.json"
    config = read_json(file) if is_there(file) else {}
    defaults = {ours: config[theirs] for theirs, ours in NAMES.items() if config.get(theirs) is not None}
    if config.get("do_sample") is False:
        defaults["temperature"] = 0.0
    try:
        SamplingParams(**defaults)
    except (FptqError, TypeError) as error:
        raise FptqError(f"{file} cannot give the defaults of sampling: {error}; --generation-config none leaves them "
                        "out") from None
    return defaults


def sampling_in_force(defaults: Mapping[str, Any]) -> dict[str, Any]:
    """With SamplingParams' own for what the model does not say; max_tokens, which each endpoint has its own for, only
    where the model says it."""
    own = {name: getattr(SamplingParams(), name) for name in NAMES.values() if name != "max_tokens"}
    return {**own, **defaults}
