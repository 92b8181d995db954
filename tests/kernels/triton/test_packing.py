"""Packed weights hold the checkpoint's numbers, byte for byte where the kernels look for them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fptq_runtime.artifact.numerics import dequantize, pack_codes, quantize_weight, unpack_codes
from fptq_runtime.kernels.base import QuantizedWeight
from fptq_runtime.kernels.triton.linear import dequantized, expanded
from fptq_runtime.kernels.triton.packing import PackedWeight, pack_weight, two_levels

CPU = torch.device("cpu")


def unpacked(weight: PackedWeight) -> torch.Tensor:
    """Codes [N, K] as floats, padding included: each looked up where the layout's definition puts it."""
    tiles, blocks, rows, width = weight.values.shape
    n, k = torch.arange(tiles * rows)[:, None], torch.arange(blocks * weight.block)[None, :]
    half, j = k % weight.block // width, k % width
    octets = weight.values[n // rows, k // weight.block, n % rows, j].int()
    bits = (octets >> 4 * half) & 15 if weight.dots == 2 else octets
    return torch.tensor([value(i, weight.codes) for i in range(256)])[bits]


def value(bits: int, codes: str) -> float:
    if codes == "int4":
        return float((bits ^ 8) - 8)
    if codes == "int8":
        return float((bits ^ 128) - 128)
    if codes == "fp4":
        return [0, 0.5, 1, 1.5, 2, 3, 4, 6][bits & 7] * (-1.0 if bits & 8 else 1.0)
    return float(torch.tensor(bits, dtype=torch.uint8).view(torch.float8_e4m3fn))


@settings(max_examples=15, derandomize=True, deadline=None)
@given(st.sampled_from([("int", 4), ("int", 8), ("float", 4), ("float", 8)]), st.integers(1, 70),
       st.sampled_from([(32, 32), (64, 32), (96, 32), (96, 96), (192, 64), (256, 128), (172, None), (7, None)]),
       st.integers(0, 2**31))
def test_every_code_and_scale_is_where_it_should_be(grid, n, shape, seed):
    (number, bits), (k, group) = grid, shape
    group = None if (number, bits) == ("float", 8) else group
    generator = torch.Generator().manual_seed(seed)
    codes, scale = quantize_weight(torch.randn(n, k, generator=generator), bits, group, None, torch.bfloat16, number)
    packed = pack_weight("layer", QuantizedWeight(pack_codes(codes, bits), scale, bits, group or k, number), CPU)
    found = unpacked(packed)
    assert torch.equal(found[:n, :k], codes.float())
    assert not found[n:].any() and not found[:, k:].any()
    if packed.arithmetic == "grouped":
        groups = packed.scale.transpose(1, 2).reshape(-1, packed.scale.shape[1])  # [tiles · 64, groups]
        assert packed.scale.dtype == torch.bfloat16 and torch.equal(groups[:n, : scale.shape[1]], scale)
    assert torch.equal(dequantized(packed, torch.float32), dequantize(codes, scale))


def test_the_quantizers_two_levels_are_found():
    weight = torch.randn(70, 384, generator=torch.Generator().manual_seed(0))
    codes, scale = quantize_weight(weight, 4, 128, None, torch.bfloat16, scales="two-level")
    packed = pack_weight("layer", QuantizedWeight(pack_codes(codes, 4), scale, 4, 128), CPU)
    assert packed.arithmetic == "two-level"
    assert torch.equal(dequantized(packed, torch.float32), dequantize(codes, scale))


def test_two_levels_are_found_exactly_where_they_are():
    generator = torch.Generator().manual_seed(0)
    unit = (torch.rand(70, 1, generator=generator) + 0.01).bfloat16().float()
    integers = torch.randint(1, 16, (70, 12), generator=generator)
    found = two_levels(unit * integers)
    assert found is not None
    assert torch.equal(found[0] * found[1], unit * integers)
    assert found[1].max() <= 15 and found[1].min() >= 1
    broken = unit * integers
    broken[69, 3] = torch.nextafter(broken[69, 3], torch.tensor(1e9))
    assert two_levels(broken) is None
    assert two_levels(torch.tensor([[1.0, 16.0]])) is None
    assert two_levels(torch.tensor([[1.0, 0.0]])) is None


def test_two_level_weights_expand_to_int8():
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(-8, 8, (70, 192), generator=generator, dtype=torch.int8)
    integers = torch.randint(1, 16, (70, 3), generator=generator)
    scale = torch.rand(70, 1, generator=generator).bfloat16().float() * integers
    packed = pack_weight("layer", QuantizedWeight(pack_codes(codes, 4), scale, 4, 64), CPU)
    assert packed.arithmetic == "two-level"
    row = packed.scale.reshape(-1)[:70, None]
    assert torch.equal(expanded(packed).float() * row, dequantize(codes, scale))


def test_packing_in_chunks_changes_nothing(monkeypatch):
    generator = torch.Generator().manual_seed(2)
    codes, scale = quantize_weight(torch.randn(200, 128, generator=generator), 4, 64, None, torch.bfloat16)
    weight = QuantizedWeight(pack_codes(codes, 4), scale, 4, 64)
    whole = pack_weight("layer", weight, CPU)
    monkeypatch.setattr("fptq_runtime.kernels.triton.packing._CHUNK", 128)
    assert torch.equal(pack_weight("layer", weight, CPU).values, whole.values)
    assert torch.equal(unpack_codes(weight.packed, 4, 128), codes)


def test_refuses_by_name_what_it_cannot_pack():
    with pytest.raises(ValueError, match=r"layer: .*multiple of 32, not 48"):
        pack_weight("layer", QuantizedWeight(torch.zeros((4, 12), dtype=torch.int32), torch.ones(4, 2), 4, 48), CPU)
    with pytest.raises(ValueError, match="layer: K must be at most"):
        pack_weight("layer", QuantizedWeight(torch.zeros((1, 2**14), dtype=torch.int32), torch.ones(1, 1), 4, 2**17),
                    CPU)
    weight = QuantizedWeight(torch.zeros((4, 8), dtype=torch.int32), torch.rand(4, 2), 4, 32)
    with pytest.raises(ValueError, match="grouped int4"):
        expanded(pack_weight("layer", weight, CPU))
