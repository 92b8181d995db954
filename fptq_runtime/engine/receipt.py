"""What an answer was made of and with, so that it can be computed again: token by token, as bits depend on nothing
else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from fptq_runtime.artifact.files import read_file
from fptq_runtime.engine.grammar import Grammar
from fptq_runtime.engine.llm import LLM
from fptq_runtime.engine.request import SamplingParams
from fptq_runtime.errors import FptqError

MOST = 64 << 20  # bytes of a receipt
NAMES = {"made_by", "prompt_token_ids", "params", "choices"}
OPTIONS = ("activations", "kv_cache_dtype", "block_size", "max_model_len", "close_structured")  # of `Engine.identity`


@dataclass(frozen=True)
class Replay:
    choices: int
    tokens: int


def receipt(made_by: Mapping[str, Any], prompts: Sequence[Sequence[int]], params: SamplingParams,
            choices: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Of the tokens of each choice, params.n of each prompt. made_by: the engine's identity. params: with a seed."""
    return {"made_by": dict(made_by), "prompt_token_ids": [list(prompt) for prompt in prompts],
            "params": _written(replace(params, prediction=())),
            "choices": [_choice(choice) for choice in choices]}


def replay(path: Path, file: Path, **options: Any) -> Replay:
    """Compute the answers of a receipt, or of a response that has one, again. path: the artifact. options: the engine's
    backend, device and threads. Raises FptqError where the receipt is of something else, or an answer differs."""
    given = _read(file)
    made_by, expected = given["made_by"], given["choices"]
    llm = LLM(path, **{name: made_by[name] for name in OPTIONS if name in made_by}, **options)
    ours = llm.engine.identity or {}
    for name in {**made_by, **ours}:
        if made_by.get(name) != ours.get(name):
            raise FptqError(f"{file}: its {name} is {made_by.get(name)}, here it is {ours.get(name)}: answers are the "
                            "same for the same artifact, kernels and options alone")
    answers = llm.generate(given["prompt_token_ids"], given["params"])
    got = [_choice(one.token_ids) for answer in answers for one in answer]
    if len(got) != len(expected):
        raise FptqError(f"{file} has {len(expected)} choices, its prompts and n ask for {len(got)}")
    for i, (mine, wanted) in enumerate(zip(got, expected, strict=True)):
        if mine != wanted:
            raise FptqError(f"{file}: choice {i} has other tokens: {mine['tokens']} of sha256 {mine['sha256']}, not "
                            f"{wanted['tokens']} of {wanted['sha256']}")
    return Replay(len(got), sum(one["tokens"] for one in got))


def _choice(token_ids: Sequence[int]) -> dict[str, Any]:
    return {"tokens": len(token_ids), "sha256": hashlib.sha256(np.asarray(token_ids, "<u4").tobytes()).hexdigest()}


def _read(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(read_file(file, MOST))
        data = data.get("receipt", data)
        if data.keys() != NAMES:
            raise ValueError(f"it has not {', '.join(sorted(NAMES))}")
        wrong = [choice for choice in data["choices"] if choice.keys() != {"tokens", "sha256"}]
        if wrong or not all(isinstance(token, int) for prompt in data["prompt_token_ids"] for token in prompt):
            raise ValueError("its prompts are no token ids, or its choices no hashes")
        return {**data, "made_by": dict(data["made_by"]), "params": _params(data["params"])}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise FptqError(f"{file} is no receipt: {error}") from None


def _written(params: SamplingParams) -> dict[str, Any]:
    """What is not at its default, as JSON has it."""
    default, said = SamplingParams(), {}
    for field in fields(params):
        value = getattr(params, field.name)
        if value != getattr(default, field.name):
            said[field.name] = vars(value) if isinstance(value, Grammar) else \
                sorted(value) if isinstance(value, frozenset) else value
    return json.loads(json.dumps(said))  # type: ignore[no-any-return]


def _params(said: Mapping[str, Any]) -> SamplingParams:
    read = dict(said)
    if "logit_bias" in read:
        read["logit_bias"] = {int(token): bias for token, bias in read["logit_bias"].items()}
    if "structured" in read:
        read["structured"] = Grammar(**read["structured"])
    if "shown_special_tokens" in read:
        read["shown_special_tokens"] = frozenset(read["shown_special_tokens"])
    for name in ("stop", "stop_token_ids"):
        if name in read:
            read[name] = tuple(read[name])
    return SamplingParams(**read)
