"""Textbook case: a few input channels a hundred times larger than the others, W8A8 with one static scale."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fptq_runtime.models.block import Block
from fptq_runtime.quantizer.steps.activations import Activations
from fptq_runtime.quantizer.steps.smoothquant import ALPHAS, SmoothQuant, smoothing_scale
from fptq_runtime.quantizer.steps.weights import Weights
from tests.quantizer.steps.small import as_it_is, normed, quantize_block, small_model
from tests.quantizer.test_folds import work_on

W8A8 = (Activations(scheme="static"), Weights(num_bits=8, group_size=None))


def outlier_channels(block: Block) -> None:
    """Three channels of each norm a hundredfold, what reads them as much smaller: the same function."""
    for norm, reader in normed(block):
        factor = torch.ones(norm.weight.numel())
        factor[[5, 40, 101]] = 100
        norm.weight = norm.weight * factor
        reader.weight = reader.weight / factor
        if norm.bias is not None:
            norm.bias = norm.bias * factor


@pytest.mark.parametrize("family", ["llama", "bloom"])
@pytest.mark.parametrize("alpha", [0.5, "search"])
def test_w8a8_with_outlier_channels(family: str, alpha: float, tmp_path: Path) -> None:
    """A hundredfold step has up to ten thousand times the squared error; the fold takes all of it away, since the
    weights have the room."""
    model = small_model(family, tmp_path)
    _, without_outliers = quantize_block(model, as_it_is, *W8A8)
    _, plain = quantize_block(model, outlier_channels, *W8A8)
    _, smoothed = quantize_block(model, outlier_channels, SmoothQuant(alpha=alpha), *W8A8)
    assert plain > 100 * without_outliers
    assert smoothed < 2 * without_outliers


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.85, 1.0])
def test_formula(alpha: float, tmp_path: Path) -> None:
    """In double precision, with the weights' maximum taken over q, k and v."""
    _, work = work_on("llama", tmp_path)
    target = work.targets["qkv"]
    config = work.model.config
    q, k, v = np.split(target.weight.double().numpy(), np.cumsum([config.num_heads * config.head_dim,
                                                                  config.num_kv_heads * config.head_dim]))
    weights = np.maximum.reduce([np.abs(part).max(0) for part in (q, k, v)])
    inputs = np.maximum(np.abs(target.stats.low.double().numpy()), np.abs(target.stats.high.double().numpy()))
    np.testing.assert_allclose(smoothing_scale(target, alpha).numpy(), inputs**alpha / weights ** (1 - alpha), 1e-4)


def test_dead_channels_are_finite(tmp_path: Path) -> None:
    _, work = work_on("llama", tmp_path)
    target = work.targets["qkv"]
    target.stats.low, target.stats.high = torch.zeros_like(target.stats.low), torch.zeros_like(target.stats.high)
    target.linear.weight = torch.zeros_like(target.weight)
    for alpha in (0.0, 0.5, 1.0):
        scale = smoothing_scale(target, alpha)
        assert bool((scale >= 1e-5).all() and torch.isfinite(scale).all())


def test_the_search_is_no_worse_than_any_alpha(tmp_path: Path) -> None:
    """Input by input, and no worse than no smoothing, by the error that the block then measures."""
    model = small_model("llama", tmp_path)
    found, _ = quantize_block(model, outlier_channels, SmoothQuant(), *W8A8)
    for steps in ((), *((SmoothQuant(alpha=alpha),) for alpha in ALPHAS[::6])):
        fixed, _ = quantize_block(model, outlier_channels, *steps, *W8A8)
        for kind in ("qkv", "up"):
            assert found.targets[kind].error <= fixed.targets[kind].error * 1.02
