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
from fptq_runtime.kernels.base import QuantizedWeight
from fptq_runtime.kernels.reference import dequantized, quantize_activations
from fptq_runtime.quantizer.ranges import choose_range
from fptq_runtime.quantizer.steps import base, search
from fptq_runtime.quantizer.steps import weights as weights_module
from fptq_runtime.quantizer.steps.activations import Activations
from fptq_runtime.quantizer.steps.base import QuantizationError, Rounding, relative_error, static_act
from fptq_runtime.quantizer.steps.fptq import Fptq, log_scale
from fptq_runtime.quantizer.steps.search import Trial
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


@settings(max_examples=15)
@given(seed=st.integers(0, 999), num_bits=st.sampled_from([4, 8]), group=st.sampled_from([None, 32]))
def test_clip_search_finds_each_groups_best(seed: int, num_bits: int, group: int | None) -> None:
    """Against every ratio of the grid, group by group; never worse than no clip by more than the grid's own step."""
    torch.manual_seed(seed)
    weight = torch.randn(3, 96) * torch.rand(96).exp()
    importance = torch.rand(96) ** 4
    clip = search_clip(weight, importance, Rounding(num_bits, group))

    def errors(ratio: torch.Tensor) -> torch.Tensor:
        codes, scale = quantize_weight(weight, num_bits, group, ratio, torch.bfloat16)
        squared = (dequantize(codes, scale) - weight).square() * importance
        return squared.reshape(3, clip.shape[1], -1).sum(-1)

    found = errors(clip)
    every = torch.stack([errors(torch.full_like(clip, r)) for r in torch.linspace(1.07, 0.55, 40).tolist()])
    assert torch.equal(found, every.amin(0))


@pytest.mark.parametrize("method", ["percentile", "mse", "kl", "aciq"])
def test_a_clipping_range_is_used_wherever_errors_are_compared(tmp_path: Path, method: Any) -> None:
    """Static inputs with one outlier token: as they are, per tensor of any range, or equalized; `activations` and
    `fptq` agree on the scale, and safety sees the clipped error."""
    found = {}
    for name, step in {
        "activations": Activations(scheme="static", range=method, quantile=0.95),
        "fptq": Fptq(safety=None, v0=1e9, v1=1e9, range=method, quantile=0.95),
        "minmax": Fptq(safety=None, v0=1e9, v1=1e9),
    }.items():
        _, work = work_on("llama", tmp_path / name)
        stats = work.targets["qkv"].stats
        outlier = torch.ones(stats.sample.shape[0], 1)
        outlier[7] = 50
        stats.sample = stats.sample * outlier
        stats.low, stats.high = stats.sample.amin(0), stats.sample.amax(0)
        with torch.inference_mode():
            step.apply(work)
        act = work.targets["qkv"].linear.act
        assert act is not None
        assert act.scale is not None
        found[name] = act.scale
        expected = choose_range(method, float(stats.amax.max()), stats.sample, 0.95) / 127.5
        assert name == "minmax" or act.scale == pytest.approx(expected)
    assert found["activations"] == found["fptq"] < found["minmax"]
    _, work = work_on("llama", tmp_path / "searched")
    target = work.targets["qkv"]
    trial, fptq = Trial(target), Fptq(range=method, quantile=0.95)
    act = static_act(target.stats.amax, target.stats.sample, method, 0.95)
    weight = dequantize(*quantize_weight(target.weight, 4, 32, scale_dtype=torch.bfloat16))
    output = quantize_activations(target.stats.sample, act) @ weight.T
    assert trial.error(torch.ones(()), fptq._act(False)) == pytest.approx(
        relative_error(output, target.stats.sample @ target.weight.T))


def test_large_linears_are_probed_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A third of the outputs and a third of the rows estimate the same error, and search for the same scale."""
    _, work = work_on("llama", tmp_path)
    target, fptq = work.targets["up"], Fptq()
    whole = Trial(target)
    monkeypatch.setattr(search, "OUTPUTS", target.weight.shape[0] // 2)
    monkeypatch.setattr(base, "ERROR_PRODUCTS", target.weight[::3].numel() * target.stats.sample.shape[0] // 2)
    part = Trial(target)
    assert part.weight.shape[0] == -(-target.weight.shape[0] // 3)
    assert part.sample.shape[0] == -(-target.stats.sample.shape[0] // 3)
    for scale in (torch.ones(()), log_scale(target.stats.amax, 1.0), 2 * torch.rand(target.weight.shape[1]) + 1):
        assert part.error(scale, fptq._act(False)) == pytest.approx(whole.error(scale, fptq._act(False)), rel=0.2)


@pytest.mark.parametrize("settings", [
    {}, {"group_size": 32}, {"num_bits": 8, "group_size": None}, {"keep": {"*": 8}}, {"keep": {"*": 16}},
    {"grid": "float", "group_size": 32, "scales": "m2"}, {"grid": "float", "num_bits": 8, "group_size": 32},
], ids=str)
def test_searches_round_as_the_last_step_does(tmp_path: Path, settings: Any) -> None:
    _, work = work_on("llama", tmp_path)
    weights = Weights(**settings)
    for target in work.targets.values():
        target.rounding = weights.rounding(target.names)
    expected = {kind: target.rounding(target.weight) for kind, target in work.targets.items()}
    with torch.inference_mode():
        weights.apply(work)
    for kind, target in work.targets.items():
        made = target.linear.weight
        if isinstance(made, QuantizedWeight):
            assert torch.equal(dequantized(made), expected[kind])
        else:
            assert torch.equal(made, expected[kind].bfloat16())


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_clip_search_in_parts(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit by bit what it is in one part; the caller's threads stay as many."""
    torch.manual_seed(0)
    weight, importance = torch.randn(37, 64), torch.rand(64)
    whole = search_clip(weight, importance, Rounding(4, 32))
    monkeypatch.setattr(weights_module, "CHUNK_WEIGHTS", 5 * 64)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert torch.equal(search_clip(weight, importance, Rounding(4, 32)), whole)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
