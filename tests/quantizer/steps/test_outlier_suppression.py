"""Textbook case: channels far from zero on one side, which no scale can centre."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fptq_runtime.models.block import Block
from fptq_runtime.quantizer.steps.activations import Activations
from fptq_runtime.quantizer.steps.base import Step
from fptq_runtime.quantizer.steps.outlier_suppression import OutlierSuppression
from fptq_runtime.quantizer.steps.smoothquant import SmoothQuant
from fptq_runtime.quantizer.steps.weights import Weights
from tests.quantizer.steps.small import as_it_is, normed, quantize_block, small_model
from tests.quantizer.steps.test_smoothquant import outlier_channels

STATIC = Activations(scheme="static")
W4A8 = (STATIC, Weights())
W8A8 = (STATIC, Weights(num_bits=8, group_size=None))


def asymmetric_channels(block: Block) -> None:
    """Five channels of each norm around ±100, which the readers' biases take back: the same function."""
    for norm, reader in normed(block):
        offset = torch.zeros(norm.weight.numel())
        offset[[3, 20, 64, 90, 111]] = torch.tensor([100.0, -100.0, 90.0, -80.0, 70.0])
        norm.bias = norm.bias + offset
        reader.bias = reader.bias - reader.weight @ offset


@pytest.mark.parametrize(("rest", "lost"), [(W4A8, 5), (W8A8, 100)], ids=["W4A8", "W8A8"])
def test_asymmetric_channels(rest: tuple[Step, ...], lost: float, tmp_path: Path) -> None:
    """The shift takes the offsets away whole. A scale alone, and SmoothQuant, shrink the channel's signal with them or
    leave a step that is too coarse for all."""
    model = small_model("bloom", tmp_path)
    errors = {
        name: quantize_block(model, bend, *steps, *rest)[1]
        for name, bend, steps in (
            ("symmetric", as_it_is, ()),
            ("plain", asymmetric_channels, ()),
            ("os+", asymmetric_channels, (OutlierSuppression(),)),
            ("scale", asymmetric_channels, (OutlierSuppression(shift=False),)),
            ("smoothquant", asymmetric_channels, (SmoothQuant(),)),
        )
    }
    assert errors["plain"] > lost * errors["symmetric"]
    assert errors["os+"] < 1.2 * errors["symmetric"]
    assert errors["os+"] < min(errors["scale"], errors["smoothquant"]) / 2


@pytest.mark.parametrize("family", ["llama", "llama-tied-bias", "bloom"])
def test_outlier_channels_are_scaled(family: str, tmp_path: Path) -> None:
    """Also where a norm without a bias leaves nothing to shift."""
    model = small_model(family, tmp_path)
    _, without_outliers = quantize_block(model, as_it_is, *W8A8)
    _, plain = quantize_block(model, outlier_channels, *W8A8)
    work, scaled = quantize_block(model, outlier_channels, OutlierSuppression(), *W8A8)
    assert plain > 100 * without_outliers
    assert scaled < 2 * without_outliers
    assert (work.block.linears["qkv"].bias is None) == (family == "llama")


def test_formula(tmp_path: Path) -> None:
    """Channels are centred, and what a channel is divided by is max(1, max|x - z| / t) for one t >= 1."""
    model = small_model("bloom", tmp_path)
    before, _ = quantize_block(model, asymmetric_channels)
    after, _ = quantize_block(model, asymmetric_channels, OutlierSuppression())
    for kind in ("qkv", "up"):
        seen, left = before.targets[kind].stats, after.targets[kind].stats
        torch.testing.assert_close(left.high, -left.low, rtol=1e-3, atol=1e-3)
        centred = (seen.high - seen.low) / 2
        torch.testing.assert_close(left.amax, centred.clamp_max(left.range), rtol=1e-3, atol=1e-3)
        assert left.range >= 1 - 1e-3
