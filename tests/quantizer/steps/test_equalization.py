"""Textbook cases: weight columns, and rows of v and columns of o, whose ranges do not match."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fptq_runtime.kernels.base import QuantizedWeight
from fptq_runtime.kernels.reference import dequantized
from fptq_runtime.models.block import Block
from fptq_runtime.quantizer.steps.activations import Activations
from fptq_runtime.quantizer.steps.equalization import Aweq, CrossLayer
from fptq_runtime.quantizer.steps.weights import Weights
from tests.quantizer.steps.small import as_it_is, normed, quantize_block, small_model

W4A8 = (Activations(scheme="static"), Weights())


def unbalanced_columns(block: Block) -> None:
    """Three columns of qkv and up fiftyfold, their inputs as much smaller: the same function."""
    for norm, reader in normed(block):
        factor = torch.ones(norm.weight.numel())
        factor[[5, 40, 101]] = 50
        norm.weight = norm.weight / factor
        reader.weight = reader.weight * factor
        if norm.bias is not None:
            norm.bias = norm.bias / factor


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_aweq_improves_w4(family: str, tmp_path: Path) -> None:
    """A group of 128 with a fiftyfold column keeps nothing of its other columns."""
    model = small_model(family, tmp_path)
    _, balanced = quantize_block(model, as_it_is, *W4A8)
    _, plain = quantize_block(model, unbalanced_columns, *W4A8)
    _, equalized = quantize_block(model, unbalanced_columns, Aweq(), *W4A8)
    assert plain > 5 * balanced
    assert equalized < 1.5 * balanced


def test_aweq_gives_input_and_weights_one_range(tmp_path: Path) -> None:
    model = small_model("llama", tmp_path)
    work, _ = quantize_block(model, unbalanced_columns, Aweq())
    for kind in ("qkv", "up"):
        target = work.targets[kind]
        torch.testing.assert_close(target.stats.amax, target.weight.abs().amax(0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["llama-tied-bias", "bloom", "llama"])
def test_bias_correction_keeps_the_mean_output(family: str, tmp_path: Path) -> None:
    """E[x̂ + b̂] is E[x + b] for every linear that has a bias; none is invented. Oracle: double precision."""
    model = small_model(family, tmp_path)
    before, _ = quantize_block(model, as_it_is)
    plain, error = quantize_block(model, as_it_is, Activations(scheme="float"), Weights())
    after, corrected = quantize_block(model, as_it_is, Activations(scheme="float"), Weights(bias_correction=True))
    for kind, target in after.targets.items():
        assert isinstance(target.linear.weight, QuantizedWeight)
        if family == "llama":
            assert target.linear.bias is None
            continue
        mean = target.stats.sample.double().mean(0)
        exact = before.targets[kind].linear
        expected = exact.weight.double() @ mean + exact.bias
        output = dequantized(target.linear.weight).double() @ mean
        torch.testing.assert_close(output + target.linear.bias, expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(output + exact.bias, expected, rtol=1e-2, atol=1e-2)
        assert target.error < plain.targets[kind].error
    assert (corrected < error) == (family != "llama")


def unbalanced_heads(block: Block) -> None:
    """Each row of v and the columns of o that read it, apart by up to 32 in either direction: the same function."""
    hidden = block.linears["o"].weight.shape[1]
    rows = (block.linears["qkv"].weight.shape[0] - hidden) // 2  # of v, which is as long as k
    factor = torch.exp2(torch.empty(rows).uniform_(-5, 5, generator=torch.Generator().manual_seed(0)))
    dim = block.attention.head_dim
    columns = factor.reshape(-1, 1, dim).expand(-1, hidden // rows, dim).flatten()
    scale = torch.ones(block.linears["qkv"].weight.shape[0])
    scale[-rows:] = factor
    block.linears["qkv"].weight = block.linears["qkv"].weight * scale[:, None]
    if block.linears["qkv"].bias is not None:
        block.linears["qkv"].bias = block.linears["qkv"].bias * scale
    block.linears["o"].weight = block.linears["o"].weight / columns


@pytest.mark.parametrize("family", ["llama", "llama-tied-bias", "bloom"])
def test_cross_layer_balances_v_and_o(family: str, tmp_path: Path) -> None:
    """Also where four query heads read one KV head. It needs no data, and BLOOM has no other pair."""
    model = small_model(family, tmp_path)
    _, balanced = quantize_block(model, as_it_is, CrossLayer(), *W4A8)
    _, plain = quantize_block(model, unbalanced_heads, *W4A8)
    _, equalized = quantize_block(model, unbalanced_heads, CrossLayer(), *W4A8)
    assert plain > 5 * balanced
    assert equalized < 1.05 * balanced


def test_cross_layer_makes_ranges_equal_and_stays(tmp_path: Path) -> None:
    """Row i of up and column i of down have one range; v's row, that of the columns that read it together."""
    model = small_model("llama", tmp_path)
    work, _ = quantize_block(model, unbalanced_heads, CrossLayer())
    block, config = work.block, work.model.config
    up, down = block.linears["up"].weight, block.linears["down"].weight
    torch.testing.assert_close(up[-256:].abs().amax(1), down.abs().amax(0))
    v = block.linears["qkv"].weight[-config.num_kv_heads * config.head_dim:].abs().amax(1)
    o = block.linears["o"].weight.abs().amax(0).reshape(config.num_kv_heads, -1, config.head_dim).amax(1).flatten()
    torch.testing.assert_close(v, o)
    again, _ = quantize_block(model, unbalanced_heads, CrossLayer(), CrossLayer())
    for kind, target in again.targets.items():
        torch.testing.assert_close(target.weight, work.targets[kind].weight, rtol=1e-5, atol=1e-7)


def test_cross_layer_leaves_dead_channels(tmp_path: Path) -> None:
    def dead(block: Block) -> None:
        weight = block.linears["down"].weight.clone()
        weight[:, 7] = 0
        block.linears["down"].weight = weight

    work, _ = quantize_block(small_model("llama", tmp_path), dead, CrossLayer())
    assert bool(torch.isfinite(work.block.linears["up"].weight).all())
    assert bool((work.block.linears["down"].weight[:, 7] == 0).all())
    assert bool((work.block.linears["up"].weight[-256 + 7] != 0).any())
