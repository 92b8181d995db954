"""Sums of segments, added up by whoever reads them first: the bits are those of a kernel of its own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fptq_runtime.kernels.base import ActivationQuant
from fptq_runtime.kernels.triton import attention, fused
from fptq_runtime.kernels.triton.sums import Sums
from fptq_runtime.kernels.triton.values import Quantized
from tests.kernels.small import Batcher
from tests.kernels.triton.test_attention import CPU, make_limits, make_spec, spoiled, to_device

ROWS = 5


def sums(width: int, integer: bool, **parts: Any) -> tuple[Sums, torch.Tensor]:
    """And what they are in double precision."""
    generator = torch.Generator().manual_seed(width)
    partial = torch.randint(-(1 << 20), 1 << 20, (3, ROWS, width), generator=generator, dtype=torch.int32)
    partial = partial if integer else partial.float() / 7
    made = {"row_scale": 1e-6 * torch.rand(width, generator=generator),
            "x_scale": torch.rand(ROWS, generator=generator), "bias": torch.randn(width, generator=generator),
            "residual": torch.randn((ROWS, width), generator=generator)} | parts
    exact = partial.double().sum(0) / 16
    for name, axis in (("row_scale", 0), ("x_scale", 1)):
        if made[name] is not None:
            exact *= made[name].double()[None, :] if axis == 0 else made[name].double()[:, None]
    for name in ("bias", "residual"):
        exact += 0 if made[name] is None else made[name].double()
    return Sums(partial, **made, unit=1 / 16), exact


CASES: list[dict[str, Any]] = [{"integer": True}, {"integer": False, "bias": None, "row_scale": None},
                               {"integer": True, "residual": None, "x_scale": torch.tensor([0.5])}]


@pytest.mark.parametrize("case", CASES)
def test_a_norm_adds_up_what_it_reads_and_keeps_it(case: dict[str, Any]) -> None:
    (alone, exact), (read, _) = sums(70, **case), sums(70, **case)
    value = alone.value
    assert (value - exact).abs().max() <= 1e-6 * exact.abs().max()
    weight, bias = torch.rand(70), torch.rand(70)
    for act in (ActivationQuant(), None):
        expected = fused.norm(value, weight, bias, 1e-5, "layer", act)
        got = fused.norm(read, weight, bias, 1e-5, "layer", act)  # the first time from sums, then from what was kept
        for one, other in zip(vars(got).values() if isinstance(got, Quantized) else [got],
                              vars(expected).values() if isinstance(expected, Quantized) else [expected], strict=True):
            assert torch.equal(one, other)
        assert torch.equal(read.value, value)


def test_rope_adds_up_what_it_reads() -> None:
    spec = make_spec(4, 2, 16, rope=True, qk_norm=True)
    prepared, limits = attention.prepare_attention(spec, CPU), make_limits(spec, "int8", 16, 4)
    batcher = Batcher(limits, np.random.default_rng(0))
    batch = to_device(batcher.step([(batcher.sequence(range(ROWS)), ROWS)]))
    made = []
    for qkv in (sums(8 * 16, True)[0].value, sums(8 * 16, True)[0]):
        cache = spoiled(attention.DeviceCache(limits, CPU))
        q = attention.rope_and_cache(qkv, prepared, cache, batch)
        assert isinstance(q, Quantized)
        made.append((q.codes, q.scale, cache.keys, cache.values, cache.key_scales.nan_to_num(9),
                     cache.value_scales.nan_to_num(9)))
    assert all(torch.equal(one, other) for one, other in zip(*made, strict=True))
