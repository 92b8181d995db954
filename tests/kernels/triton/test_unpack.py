"""The unpackers' very instructions, as the interpreter runs them, against tables of codes."""

from __future__ import annotations

import itertools

import pytest
import torch
import triton
import triton.language as tl

from fptq_runtime.kernels.triton.unpack import multiplied, unpacked

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
OCTETS = torch.arange(256, dtype=torch.int32).to(torch.uint8)


@triton.jit
def _unpack(source, target, HIGH: tl.constexpr, CODES: tl.constexpr):
    at = tl.arange(0, 256)
    w = unpacked(tl.load(source + at), HIGH=HIGH, CODES=CODES, element=target.dtype.element_ty)
    tl.store(target + at, w)


@triton.jit
def _multiply(source, multiplier, target, HIGH: tl.constexpr):
    at = tl.arange(0, 256)
    m = tl.broadcast_to(tl.load(multiplier), (256,))
    tl.store(target + at, multiplied(tl.load(source + at), m, HIGH=HIGH))


def nibbles(high: bool) -> torch.Tensor:
    return OCTETS.int() >> 4 if high else OCTETS.int() & 15


@pytest.mark.parametrize("high", [False, True])
def test_every_octet(high: bool) -> None:
    codes = nibbles(high)
    target = torch.empty(256, dtype=torch.int8)
    _unpack[(1,)](OCTETS, target, HIGH=high, CODES="int4")
    assert torch.equal(target.int(), 16 * torch.where(codes < 8, codes, codes - 16))
    floats = torch.empty(256)
    _unpack[(1,)](OCTETS, floats, HIGH=high, CODES="fp4")
    assert torch.equal(64 * floats, torch.cat((E2M1, -E2M1))[codes.long()])


@pytest.mark.parametrize(("high", "multiplier"), [*itertools.product([False, True], range(16))])
def test_every_code_times_every_multiplier(high: bool, multiplier: int) -> None:
    codes = nibbles(high)
    target = torch.empty(256, dtype=torch.int8)
    _multiply[(1,)](OCTETS, torch.tensor([multiplier], dtype=torch.int8), target, HIGH=high)
    assert torch.equal(target.int(), multiplier * torch.where(codes < 8, codes, codes - 16))
