"""Low-rank factors of linears that are stacked and taken apart again."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fptq_runtime.kernels.base import Array, Linear, QuantizedWeight
from fptq_runtime.models.block import LinearSpec
from fptq_runtime.models.fields import ModelError
from fptq_runtime.models.weights import fuse, multiplied, unfuse

K = 12


def part(name: str, rows: int, rank: int | None, seed: int, down_seed: int | None = None) -> Linear:
    random = np.random.default_rng(seed)
    weight = random.normal(size=(rows, K)).astype(np.float32)
    if rank is None:
        return Linear(name, weight)
    down = np.random.default_rng(seed if down_seed is None else down_seed).normal(size=(rank, K)).astype(np.float32)
    return Linear(name, weight, low_rank=(down, random.normal(size=(rows, rank)).astype(np.float32)))


def whole(linear: Linear) -> Array:
    """The matrix that x is multiplied with. [N, K]"""
    assert linear.low_rank is not None
    down, up = linear.low_rank
    return linear.weight + up @ down


@pytest.mark.parametrize("order", [None, np.random.default_rng(0).permutation(18)])
@pytest.mark.parametrize(("ranks", "down_seed", "rank"), [((2, 3, 1), None, 6), ((4, 4, 4), 9, 4)])
def test_fused_is_each_parts_own(order: Array | None, ranks: tuple[int, ...], down_seed: int | None,
                                 rank: int) -> None:
    """Their own factors become blocks; the same one stays one."""
    parts = [part(str(i), rows, r, i, down_seed) for i, (rows, r) in enumerate(zip((8, 4, 6), ranks, strict=True))]
    fused = fuse("qkv", parts, order)
    assert fused.low_rank is not None
    assert fused.low_rank[0].shape == (rank, K)
    expected = np.concatenate([whole(p) for p in parts])
    assert np.allclose(whole(fused), expected if order is None else expected[order], atol=1e-5)
    spec = LinearSpec("qkv", ("a", "b", "c"), (8, 4, 6), K, order=order)
    for original, (name, restored) in zip(parts, unfuse(fused, spec), strict=True):
        assert restored.name == name
        assert np.allclose(whole(restored), whole(original), atol=1e-5)


def test_factors_of_some_parts_only_are_refused() -> None:
    with pytest.raises(ModelError, match="0, 1 are fused, but not all have low-rank factors"):
        fuse("up", [part("0", 4, 2, 0), part("1", 4, None, 1)], None)


def test_scales_of_a_multiplied_linear_come_back_as_they_were_rounded() -> None:
    """Codes were chosen by scales of bfloat16, which a multiplier (Falcon-H1's) must not round again."""
    random, rows = torch.Generator().manual_seed(0), np.linspace(0.3, 3, 40).astype(np.float32)
    scale = torch.rand((40, 4), generator=random).bfloat16()
    weight = QuantizedWeight(torch.zeros((40, 16), dtype=torch.int32), scale, 4, 32)
    spec = LinearSpec("in", ("a", "b"), (30, 10), 128, multiplier=rows)
    stored = [part for _, part in unfuse(Linear("in", weight), spec)]
    in_file = [Linear("", QuantizedWeight(part.weight.packed.numpy(), part.weight.scale.numpy(), 4, 32))
               for part in stored]
    loaded = multiplied(fuse("in", in_file), rows).weight.scale
    np.testing.assert_allclose(loaded, scale.float().numpy(), rtol=2e-7)
