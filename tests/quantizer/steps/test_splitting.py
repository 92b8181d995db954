"""Textbook case: one input channel of down with weights that take the range of everything beside it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fptq_runtime.models.block import Block
from fptq_runtime.quantizer.pipeline import quantize
from fptq_runtime.quantizer.recipe import Recipe
from fptq_runtime.quantizer.steps.activations import Activations
from fptq_runtime.quantizer.steps.base import QuantizationError
from fptq_runtime.quantizer.steps.splitting import ChannelSplitting, split_columns
from fptq_runtime.quantizer.steps.weights import Weights
from tests.quantizer.models import save_model
from tests.quantizer.steps.small import as_it_is, quantize_block, small_model
from tests.quantizer.test_pipeline import SMALL, assert_transformers_agrees

W4 = (Activations(scheme="float"), Weights())


def outlier_channel(block: Block) -> None:
    """Channel 17 is read fortyfold and written as much smaller: the same function."""
    columns, rows = torch.ones(block.linears["down"].weight.shape[1]), torch.ones(block.linears["up"].weight.shape[0])
    columns[17] = rows[-columns.numel() + 17] = 40
    block.linears["down"].weight = block.linears["down"].weight * columns
    block.linears["up"].weight = block.linears["up"].weight / rows[:, None]
    if block.linears["up"].bias is not None:
        block.linears["up"].bias = block.linears["up"].bias / rows


@pytest.mark.parametrize("family", ["llama", "llama-tied-bias"])
def test_one_outlier_channel(family: str, tmp_path: Path) -> None:
    """64 parts of a fortyfold column are no larger than its neighbours, and 128 are there: 256 channels grow by 2 %,
    then on to three groups. Of down's two groups one is lost to the outlier, half of all its weights."""
    model = small_model(family, tmp_path)
    clean, without_outlier = quantize_block(model, as_it_is, *W4)
    plain, with_outlier = quantize_block(model, outlier_channel, *W4)
    split, rescued = quantize_block(model, outlier_channel, ChannelSplitting(), *W4)
    assert split.block.linears["down"].weight.k == 384
    without, with_it, after = (work.targets["down"].error for work in (clean, plain, split))
    assert with_it > 10 * without
    assert after < without
    assert rescued < 1.1 * without_outlier < with_outlier


@settings(max_examples=60)
@given(seed=st.integers(0, 999), n=st.integers(1, 6), k=st.integers(1, 12), more=st.integers(1, 20))
def test_parts_add_up(seed: int, n: int, k: int, more: int) -> None:
    """To the very bit: halves are exact. And it is the largest column that was split, each time: against the method
    column by column in double precision."""
    torch.manual_seed(seed)
    weight = torch.randn(n, k) * torch.randn(k).exp()
    parts, source = split_columns(weight, k + more)
    summed = torch.zeros(n, k, dtype=torch.double).index_add(1, source, parts.double())
    assert torch.equal(summed, weight.double())
    columns = [(j, weight[:, j].double().numpy()) for j in range(k)]
    for _ in range(more):
        at = max(range(len(columns)), key=lambda i: float(np.abs(columns[i][1]).max()))
        j, column = columns[at]
        half = np.where(np.abs(column) > np.abs(column).max() / 2, column / 2, 0)
        columns[at] = (j, column - half)
        columns.append((j, half))
    assert source.tolist() == [j for j, _ in columns]
    np.testing.assert_array_equal(parts.double().numpy(), np.stack([column for _, column in columns], 1))


@pytest.mark.parametrize(("group_size", "ratio", "expected"), [(128, 0.02, 256), (32, 0.02, 160), (None, 0.02, 139),
                                                               (None, 0.5, 204)])
def test_the_artifact_is_wider(group_size: int | None, ratio: float, expected: int, tmp_path: Path) -> None:
    """136 channels; config.json says how many there are now, and transformers and our runtime load them."""
    save_model("llama", tmp_path / "float", num_hidden_layers=2)
    (tmp_path / "text.txt").write_text("It was a bright cold day in the wood, and the clock was striking. " * 20)
    recipe = Recipe(name="x", steps=(
        ChannelSplitting(ratio=ratio, group_size=group_size), Activations(scheme="dynamic"), Weights(group_size=32)))
    quantize(tmp_path / "float", tmp_path / "out", recipe, text=tmp_path / "text.txt", **SMALL)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["intermediate_size"] == expected
    token_ids = torch.randint(3, 260, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    assert_transformers_agrees(tmp_path / "out", [1, *token_ids])


def test_bloom_is_refused(tmp_path: Path) -> None:
    with pytest.raises(QuantizationError, match="BloomForCausalLM") as error:
        quantize_block(small_model("bloom", tmp_path), as_it_is, ChannelSplitting(), *W4)
    assert "\n" not in str(error.value)
