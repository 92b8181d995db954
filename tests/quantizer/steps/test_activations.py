"""Which scheme each input gets."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fptq_runtime.models.loader import Checkpoint
from fptq_runtime.quantizer.steps.activations import Activations, Scheme
from fptq_runtime.quantizer.steps.base import RecipeError
from fptq_runtime.quantizer.steps.weights import Weights
from fptq_runtime.quantizer.walk import Walk
from tests.models.hf import FAMILIES, save_random
from tests.quantizer.test_folds import work_on


@pytest.mark.parametrize(("overrides", "expected"), [
    ({}, {"qkv": "static", "o": "static", "up": "static", "down": "static"}),
    ({"down": "dynamic"}, {"qkv": "static", "down": "dynamic"}),
    ({"o": "float", "*": "dynamic"}, {"qkv": "dynamic", "o": "float", "down": "dynamic"}),
    ({"*": "dynamic", "o": "float"}, {"o": "dynamic"}),
    ({"*.down_proj": "dynamic"}, {"up": "static", "down": "dynamic"}),
])
def test_overrides(overrides: dict[str, Scheme], expected: dict[str, Scheme], tmp_path: Path) -> None:
    """By kind and by module name; the first match wins."""
    _, work = work_on("llama", tmp_path)
    with torch.inference_mode():
        Activations(scheme="static", overrides=overrides).apply(work)
    for kind, scheme in expected.items():
        act = work.targets[kind].linear.act
        assert ("float" if act is None else "dynamic" if act.scale is None else "static") == scheme, kind


@pytest.mark.parametrize(("position", "factor", "expected"), [(0, 1000.0, "dynamic"), (0, 2.0, "static"),
                                                              (3, 1000.0, "static")])
def test_a_static_scale_is_not_the_first_tokens_alone(position: int, factor: float, expected: str, tmp_path: Path
                                                      ) -> None:
    """Massive activations there send that input per token, by name; a pattern has the last word."""
    _, work = work_on("llama", tmp_path)
    stats = work.targets["down"].stats
    stats.peak_position = position
    stats.sample = torch.ones_like(stats.sample)
    stats.low, stats.high = -torch.ones_like(stats.low), torch.full_like(stats.high, factor)
    with torch.inference_mode():
        Activations(scheme="static").apply(work)
        chosen, reason = work.targets["down"].linear.act, work.targets["down"].reason
        assert chosen is not None
        assert ("dynamic" if chosen.scale is None else "static") == expected
        assert ("massive activations at the first token" in reason) == (expected == "dynamic")
        Activations(scheme="static", overrides={"down": "static"}).apply(work)
    assert work.targets["down"].linear.act is not None
    assert work.targets["down"].linear.act.scale is not None


@pytest.mark.parametrize("family", FAMILIES)
def test_a_linears_name_in_its_block_fits_every_family(family: str, tmp_path: Path) -> None:
    """As recipes use it; a name that no linear has is refused before any work is done."""
    save_random(family, tmp_path)
    checkpoint = Checkpoint(tmp_path)
    down, o, up = ("out", "in", "in") if family in ("mamba", "falcon-mamba") else ("down", "o", "up")
    Walk(checkpoint, [Activations(scheme="static", overrides={down: "dynamic", o: "float"}),
                      Weights(keep={up: 8})], [[1, 2, 3]])
    for step in (Activations(scheme="static", overrides={"dwon": "dynamic"}), Weights(keep={"dwon": 8})):
        with pytest.raises(RecipeError, match="'dwon'"):
            Walk(checkpoint, [step], [[1, 2, 3]])
