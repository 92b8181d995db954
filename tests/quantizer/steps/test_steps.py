"""The policy table, LAE's formula, and the clip search against a search over every group by itself."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fptq_runtime.artifact.numerics import dequantize, quantize_weight
from fptq_runtime.quantizer.steps.base import QuantizationError
from fptq_runtime.quantizer.steps.fptq import Fptq, log_scale
from fptq_runtime.quantizer.steps.weights import Weights, search_clip
from tests.quantizer.test_folds import work_on


@given(st.floats(0, 1e4))
def test_lae_formula(m: float) -> None:
    [scale] = log_scale(torch.tensor([m]), floor=1e-5).tolist()
    assert scale == pytest.approx(max(m / math.log2(2 + m), 1e-5), rel=1e-5)
    assert log_scale(torch.tensor([m]), floor=1.0).item() >= 1


def with_range(work: Any, kind: str, v: float) -> None:
    """Make max |x| of an input v, as if calibration had seen it."""
    target = work.targets[kind]
    factor = v / target.range
    target.stats.divide(torch.full((target.weight.shape[1],), 1 / factor))
    target.range = v


STATIC, LAE, DYNAMIC, LAE_DYNAMIC = (False, False), (True, False), (False, True), (True, True)  # equalized, dynamic


@pytest.mark.parametrize(("v", "options", "expected"), [
    (14.9, {}, {"qkv": STATIC, "o": STATIC, "up": STATIC, "down": STATIC}),
    (15.1, {}, {"qkv": LAE, "o": LAE, "up": LAE, "down": LAE}),
    (149.0, {}, {"qkv": LAE, "o": LAE, "up": LAE, "down": LAE}),
    (151.0, {}, {"qkv": LAE_DYNAMIC, "o": LAE_DYNAMIC, "up": LAE_DYNAMIC, "down": LAE_DYNAMIC}),
    (100.0, {"paper_policy": True}, {"qkv": LAE, "o": DYNAMIC, "up": LAE, "down": DYNAMIC}),
    (151.0, {"paper_policy": True}, {"qkv": DYNAMIC, "o": DYNAMIC, "up": DYNAMIC, "down": DYNAMIC}),
    (29.0, {"favour": "static"}, {"qkv": STATIC, "down": STATIC}),
    (299.0, {"favour": "static"}, {"qkv": LAE, "down": LAE}),
    (8.0, {"favour": "dynamic"}, {"qkv": LAE, "down": LAE}),
    (76.0, {"favour": "dynamic"}, {"qkv": LAE_DYNAMIC, "down": LAE_DYNAMIC}),
    (40.0, {"v0": 50.0}, {"qkv": STATIC}),
    (40.0, {"v0": 5.0, "v1": 39.0}, {"qkv": LAE_DYNAMIC}),
    (1.0, {"overrides": {"o": "dynamic", "*": "lae"}}, {"qkv": LAE, "o": LAE_DYNAMIC, "up": LAE}),
    (999.0, {"overrides": {"*": "static"}}, {"qkv": STATIC, "o": STATIC, "up": STATIC, "down": STATIC}),
])
def test_policy(tmp_path: Path, v: float, options: dict[str, Any], expected: dict[str, tuple[bool, bool]]) -> None:
    """`overrides` says dynamic and gets LAE before it, as every dynamic input does outside paper_policy."""
    _, work = work_on("llama", tmp_path)
    for kind in expected:
        with_range(work, kind, v)
    with torch.inference_mode():
        Fptq(safety=None, **options).apply(work)
    for kind, (equalized, dynamic) in expected.items():
        target = work.targets[kind]
        assert target.equalized == equalized, kind
        assert target.linear.act is not None
        assert (target.linear.act.scale is None) == dynamic, kind
        if not dynamic:
            assert target.linear.act.scale == pytest.approx(float(target.stats.amax.max()) / 127.5)


def test_gelu_goes_per_token(tmp_path: Path) -> None:
    _, work = work_on("bloom", tmp_path)
    with_range(work, "down", 100.0)
    with torch.inference_mode():
        Fptq(safety=None).apply(work)
    target = work.targets["down"]
    assert not target.equalized
    assert target.linear.act is not None
    assert target.linear.act.scale is None


def test_safety_sends_a_bad_static_input_per_token(tmp_path: Path) -> None:
    """One token is a thousand times larger than the others, within v0."""
    _, work = work_on("llama", tmp_path)
    target = work.targets["qkv"]
    larger = torch.ones(target.stats.sample.shape[0], 1)
    larger[0] = 1000
    target.stats.sample = target.stats.sample * larger
    target.stats.low, target.stats.high = target.stats.sample.amin(0), target.stats.sample.amax(0)
    with_range(work, "qkv", 10.0)
    with torch.inference_mode():
        Fptq().apply(work)
    assert target.linear.act is not None
    assert target.linear.act.scale is None
    assert "x the error" in target.reason


def test_transforms_after_weights_are_refused(tmp_path: Path) -> None:
    _, work = work_on("llama", tmp_path)
    with torch.inference_mode():
        Fptq().apply(work)
        Weights().apply(work)
        with pytest.raises(QuantizationError, match="quantized already"):
            Fptq().apply(work)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 999), num_bits=st.sampled_from([4, 8]), group=st.sampled_from([None, 32]))
def test_clip_search_finds_each_groups_best(seed: int, num_bits: int, group: int | None) -> None:
    """Against every ratio of the grid, group by group; never worse than no clip by more than the grid's own step."""
    torch.manual_seed(seed)
    weight = torch.randn(3, 96) * torch.rand(96).exp()
    importance = torch.rand(96) ** 4
    clip = search_clip(weight, importance, num_bits, group)

    def errors(ratio: torch.Tensor) -> torch.Tensor:
        codes, scale = quantize_weight(weight, num_bits, group, ratio, torch.bfloat16)
        squared = (dequantize(codes, scale) - weight).square() * importance
        return squared.reshape(3, clip.shape[1], -1).sum(-1)

    found = errors(clip)
    every = torch.stack([errors(torch.full_like(clip, r)) for r in torch.linspace(1.07, 0.55, 40).tolist()])
    assert torch.equal(found, every.amin(0))
