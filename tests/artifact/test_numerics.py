"""Float grids. Oracles: ml_dtypes' own casts, compressed-tensors' FP4 packer, exact arithmetic for the scales."""

from __future__ import annotations

from fractions import Fraction
from typing import Literal

import ml_dtypes
import numpy as np
import pytest
import torch
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8, unpack_fp4_from_uint8
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fptq_runtime.artifact.numerics import (
    LEVELS,
    dequantize,
    fake_quantize,
    pack_codes,
    power_of_two_scale,
    quantize,
    quantize_weight,
    token_scale,
    two_level_scale,
    unpack_codes,
)

GRIDS = {4: ml_dtypes.float4_e2m1fn, 8: ml_dtypes.float8_e4m3fn}
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
TIES = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5]


def theirs(x: np.ndarray, num_bits: int) -> np.ndarray:
    """ml_dtypes' cast, saturating."""
    grid = GRIDS[num_bits]
    largest = float(ml_dtypes.finfo(grid).max)
    return np.clip(x, -largest, largest).astype(grid).astype(np.float32)


@settings(max_examples=200)
@given(arrays(np.float32, 16, elements=st.floats(-600, 600, width=32) | st.sampled_from(TIES + E2M1)),
       st.sampled_from([4, 8]))
def test_rounding_is_ml_dtypes(x: np.ndarray, num_bits: int) -> None:
    codes = quantize(torch.from_numpy(x), torch.ones(()), num_bits, "float").float().numpy()
    assert np.array_equal(codes, theirs(x, num_bits))
    assert np.array_equal(np.signbit(codes), np.signbit(x))


def test_every_tie_and_neighbour() -> None:
    """Every FP8 midpoint too, and what is just beside it."""
    for num_bits, bits in ((4, 8), (8, 127)):
        grid = np.arange(bits, dtype=np.uint8).view(GRIDS[num_bits]).astype(np.float32)
        middle = (grid[1:] + grid[:-1]) / 2
        x = np.concatenate([grid, middle, np.nextafter(middle, 0), np.nextafter(middle, 1e9), [1e30]]).astype("f4")
        x = np.concatenate([x, -x])
        codes = quantize(torch.from_numpy(x), torch.ones(()), num_bits, "float")
        assert np.array_equal(codes.float().numpy(), theirs(x, num_bits))


@settings(max_examples=60)
@given(n=st.integers(1, 5), k=st.integers(1, 70), seed=st.integers(0, 999))
def test_packed_as_compressed_tensors_does(n: int, k: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = quantize(4 * torch.randn(n, k, generator=generator), torch.ones(()), 4, "float")
    packed = pack_codes(codes, 4)
    assert packed.dtype == torch.uint8
    assert packed.shape == (n, (k + 1) // 2)
    assert torch.equal(unpack_codes(packed, 4, k).view(torch.uint8), codes.view(torch.uint8)), "also the sign of zero"
    if k % 2 == 0:
        assert torch.equal(packed, pack_fp4_to_uint8(codes.float()))
        assert torch.equal(unpack_fp4_from_uint8(packed, n, k, torch.float32), codes.float())


def test_fp8_is_stored_as_it_is() -> None:
    codes = quantize(100 * torch.randn(3, 5), torch.ones(()), 8, "float")
    assert torch.equal(pack_codes(codes, 8).view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(unpack_codes(codes, 8, 5).view(torch.uint8), codes.view(torch.uint8))


@settings(max_examples=60)
@given(seed=st.integers(0, 999), factor=st.sampled_from([1e-30, 1.0, 1e30]))
def test_fp8_activations(seed: int, factor: float) -> None:
    """Against ml_dtypes on the scaled values; a row of zeros stays one; nothing is NaN."""
    x = torch.randn(4, 33, generator=torch.Generator().manual_seed(seed)).exp() * factor
    x[1] = 0
    scale = token_scale(x, "float")
    y = fake_quantize(x, scale, "float")
    expected = theirs((x / scale).numpy(), 8) * scale.numpy()
    assert np.array_equal(y.numpy(), expected)
    assert (x[[0, 2, 3]].amax(-1) / y[[0, 2, 3]].amax(-1) - 1).abs().max() < 1e-6, "the largest is exact"


def test_the_gradient_passes_inside_the_range() -> None:
    x = torch.tensor([0.3, -1.7, 440.0, 449.0, -1e9], requires_grad=True)
    fake_quantize(x, 1.0, "float").sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [1, 1, 1, 0, 0]


RULES = st.sampled_from(["m1", "m2"])
RANGES = st.floats(0, 2.0**100, width=32) | st.sampled_from([0.0, 1e-45, 1e-38, 6 * 2.0**-20, 6.0, 448.0, 2.0**120])


@settings(max_examples=300)
@given(amax=arrays(np.float32, (2, 3), elements=RANGES), rule=RULES)
def test_powers_of_two(amax: np.ndarray, rule: Literal["m1", "m2"]) -> None:
    """No group saturates; M1's scales are powers of two, M2's the row's largest times one; half would not do."""
    scales = power_of_two_scale(torch.from_numpy(amax), 4, "float", rule)
    assert torch.equal(scales.bfloat16().float(), scales), "stored exactly"
    tiny = Fraction(2) ** -120
    for row, ranges in zip(scales.tolist(), amax.tolist(), strict=True):
        unit = Fraction(1) if rule == "m1" else Fraction(max(row))
        for scale, wanted in zip(map(Fraction, row), map(Fraction, ranges), strict=True):
            assert wanted <= 6 * scale
            assert wanted > 3 * scale or wanted <= tiny
            assert is_power_of_two(scale / unit)
        if rule == "m2" and max(ranges) > tiny:
            assert max(ranges) > 6 * unit * Fraction(127, 128)


@settings(max_examples=300)
@given(amax=arrays(np.float32, (2, 3), elements=RANGES))
def test_two_levels(amax: np.ndarray) -> None:
    """No group saturates, none has a scale more than a unit too large, and the unit is as fine as four bits make it."""
    scales = two_level_scale(torch.from_numpy(amax), 4)
    assert torch.equal(scales.bfloat16().float(), scales), "stored exactly"
    rounding = 1 + Fraction(1, 1 << 50)
    for row, ranges in zip(scales.tolist(), amax.tolist(), strict=True):
        wanted = [max(Fraction(x), Fraction(2) ** -120) / Fraction(15, 2) for x in ranges]
        finest = max(wanted) / LEVELS
        for scale, least in zip(map(Fraction, row), wanted, strict=True):
            assert least <= scale * rounding
            assert scale <= (least + finest * Fraction(9, 8)) * rounding
        units = [Fraction(row[0]) / i for i in range(1, LEVELS + 1)]
        assert any(all((Fraction(scale) / unit) in range(1, LEVELS + 1) for scale in row) for unit in units)


def is_power_of_two(x: Fraction) -> bool:
    one, other = sorted((x.numerator, x.denominator))
    return one == 1 and other & (other - 1) == 0


@pytest.mark.parametrize("scales", ["float", "m1", "m2"])
@pytest.mark.parametrize("factor", [1e-42, 1e-3, 1.0, 1e30])
def test_rounding_errors_are_within_half_a_step(scales: Literal["float", "m1", "m2"], factor: float) -> None:
    """Also of groups of zeros, of subnormal weights, and of huge ones."""
    torch.manual_seed(0)
    weight = torch.randn(6, 128) * torch.rand(6, 1).exp() * factor
    weight[0], weight[1, :32] = 0, 0
    codes, scale = quantize_weight(weight, 4, 32, None, torch.bfloat16, "float", scales)
    read = dequantize(codes, scale)
    step = scale.float().repeat_interleave(32, 1)  # half the grid's widest, which is 2
    assert bool(((read - weight).abs() <= step * 1.03).all())
    assert not read[0].any()
    assert bool(torch.isfinite(read).all())


def test_scales_cost_in_order() -> None:
    """Rounding scales up can only cost, and M2 bounds what it does."""
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))

    def error(scales: Literal["float", "m1", "m2"]) -> float:
        codes, scale = quantize_weight(weight, 4, 128, None, torch.bfloat16, "float", scales)
        return float((dequantize(codes, scale) - weight).square().mean())

    assert error("float") < error("m2") < error("m1") < 3 * error("float")


@given(st.floats(1e-6, 1e3), st.integers(0, 99))
def test_fake_quantization_is_the_same_with_and_without_gradients(scale: float, seed: int) -> None:
    """Halves and what is clamped included."""
    torch.manual_seed(seed)
    x = torch.cat((torch.randn(64) * 100 * scale, (torch.arange(-150, 150) + 0.5) * scale,
                   torch.tensor([0.0, 1e30, -1e30])))
    kept = x.clone()
    assert torch.equal(fake_quantize(x, scale), fake_quantize(x.clone().requires_grad_(), scale).detach())
    assert torch.equal(x, kept)
