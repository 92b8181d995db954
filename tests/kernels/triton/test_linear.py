"""The linear layer's arithmetic against float64 and int64, and the bits of a row."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fptq_runtime.artifact.numerics import dequantize, pack_codes, quantize, quantize_weight, token_scale
from fptq_runtime.kernels.base import ActivationQuant, Linear, QuantizedWeight
from fptq_runtime.kernels.triton import choice as choices
from fptq_runtime.kernels.triton.choice import Case, Choice, Kind, Tile, choose, linear_cases, segments, sweep
from fptq_runtime.kernels.triton.linear import DeviceLinear, describe, pack_linear, random_case, run_choice, run_linear
from fptq_runtime.kernels.triton.packing import PackedWeight
from fptq_runtime.kernels.triton.values import Quantized
from fptq_runtime.quantizer.steps.weights import low_rank_factors

CPU = torch.device("cpu")
TIGHT = 1e-5  # of the largest output: float32 sums against float64
SPLIT, FUSED = Choice("split", Tile(64, 16, unroll=2)), Choice("fused", Tile(128, 32))
INVARIANT = (SPLIT, FUSED, Choice("fused", Tile(64, 256, unroll=2)))


@dataclass
class Problem:
    layer: DeviceLinear
    x: torch.Tensor | Quantized
    residual: torch.Tensor | None
    expected: torch.Tensor  # float64 [M, N]

    def rows(self, rows: slice) -> tuple[torch.Tensor | Quantized, torch.Tensor | None]:
        residual = None if self.residual is None else self.residual[rows].contiguous()
        if not isinstance(self.x, Quantized):
            return self.x[rows].contiguous(), residual
        scale = self.x.scale if self.x.scale.numel() == 1 else self.x.scale[rows].contiguous()
        return Quantized(self.x.codes[rows].contiguous(), scale), residual


def problem(m: int, n: int, k: int, weight: str = "int4", group: int | None = 128, act: str = "dynamic",
            bias: bool = False, residual: bool = False, rank: int = 0, rule: str = "float", seed: int = 0) -> Problem:
    """weight: int4, int8, fp4, fp8, two-level or a float dtype; act: dynamic, static, fp8 or none."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(n, k, generator=generator) * 0.1
    if weight in ("bfloat16", "float16", "float32"):
        stored = values.to(getattr(torch, weight))
        held, dense = stored, stored.double()
    elif weight == "two-level":
        codes = torch.randint(-8, 8, (n, k), generator=generator, dtype=torch.int8)
        integers = torch.randint(1, 16, (n, k // group), generator=generator)
        scale = (torch.rand(n, 1, generator=generator) * 0.01 + 1e-3).bfloat16().float() * integers
        held, dense = QuantizedWeight(pack_codes(codes, 4), scale, 4, group), dequantize(codes, scale).double()
    else:
        number, bits = ("int" if weight.startswith("int") else "float"), int(weight[-1])
        codes, scale = quantize_weight(values, bits, group, None, torch.bfloat16, number, rule)
        held = QuantizedWeight(pack_codes(codes, bits), scale, bits, group or k, number)
        dense = dequantize(codes, scale).double()
    offsets = torch.randn(n, generator=generator) if bias else None
    added = torch.randn(m, n, generator=generator) if residual else None
    scheme = {"dynamic": ActivationQuant(), "static": ActivationQuant(0.02), "fp8": ActivationQuant(None, "float"),
              "none": None}[act]
    factors = low_rank_factors(torch.randn(n, k, generator=generator) * 0.01, rank) if rank else None
    layer = pack_linear(Linear("layer", held, offsets, scheme, factors), CPU)
    x: torch.Tensor | Quantized = torch.randn(m, k, generator=generator)
    if scheme is None:
        read = (x.to(held.dtype) if isinstance(held, torch.Tensor) else x.bfloat16()).double()
    else:
        scale_x = token_scale(x, scheme.type) if scheme.scale is None else torch.tensor([[scheme.scale]])
        codes_x = quantize(x, scale_x, 8, scheme.type)
        x, read = Quantized(codes_x, scale_x.flatten()), codes_x.double() * scale_x.double()
    expected = read @ dense.T
    if factors is not None:
        expected += read @ factors[0].double().T @ factors[1].double().T
    for part in (offsets, added):
        expected += 0 if part is None else part.double()
    return Problem(layer, x, added, expected)


def assert_close(y: torch.Tensor, expected: torch.Tensor, tolerance: float = TIGHT) -> None:
    assert y.dtype == torch.float32 and y.shape == expected.shape
    assert (y - expected).abs().max() <= tolerance * expected.abs().max()


@settings(max_examples=20, derandomize=True, deadline=None)
@given(st.data())
def test_agrees_with_float64(data):
    draw = data.draw
    weight = draw(st.sampled_from(["int4", "int8", "fp4", "fp8", "two-level"]))
    k, group = draw(st.sampled_from([(32, 32), (64, 32), (96, 96), (192, 64), (256, 128), (384, 128), (172, None)]))
    if weight == "two-level" and group is None:
        k, group = 192, 32
    p = problem(
        draw(st.integers(1, 18)), draw(st.sampled_from([1, 8, 64, 70, 130])), k, weight,
        None if weight == "fp8" else group, draw(st.sampled_from(["dynamic", "static", "fp8", "none"])),
        draw(st.booleans()), draw(st.booleans()), seed=draw(st.integers(0, 2**31)),
    )
    chosen = draw(st.sampled_from(INVARIANT))
    y = run_choice(p.x, p.layer, p.residual, chosen)
    assert_close(y, p.expected)


@pytest.mark.parametrize("weight", ["int4", "int8"])
def test_integer_sums_are_exact(weight):
    """With one scale a row and none of x to round, the output is the integer, whatever the split."""
    generator = torch.Generator().manual_seed(0)
    bits = int(weight[-1])
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (70, 1200), generator=generator, dtype=torch.int8)
    codes[0], codes[1] = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    x = torch.randint(-128, 128, (3, 1200), generator=generator, dtype=torch.int8)
    x[0], x[1] = -128, 127
    layer = pack_linear(Linear("layer", QuantizedWeight(pack_codes(codes, bits), torch.ones(70, 1), bits, 1200), None,
                               ActivationQuant(1.0)), CPU)
    assert segments(70, 1200)[0] > 1
    expected = (x.long() @ codes.long().T).float()
    for chosen in (SPLIT, FUSED):
        assert torch.equal(run_choice(Quantized(x, torch.ones(1)), layer, None, chosen), expected)


BIT_CASES = [("int4", 128, "dynamic"), ("int4", 32, "static"), ("two-level", 128, "dynamic"),
             ("int8", None, "dynamic"), ("fp4", 128, "fp8"), ("fp8", None, "fp8"), ("int4", 128, "none"),
             ("bfloat16", None, "none")]


@pytest.mark.parametrize(("weight", "group", "act"), BIT_CASES)
def test_a_row_has_the_same_bits_in_every_batch_tile_and_split(weight, group, act):
    p = problem(19, 70, 1664, weight, group, act, bias=True, residual=True)
    assert segments(70, 1664) == (3, 768)  # the last one shorter
    whole = run_choice(p.x, p.layer, p.residual, SPLIT)
    assert_close(whole, p.expected)
    tiles = INVARIANT[1:] if weight != "bfloat16" else (FUSED, Choice("split", Tile(64, 64)))
    for chosen in tiles:
        assert torch.equal(run_choice(p.x, p.layer, p.residual, chosen), whole), chosen
    for rows in (slice(7, 8), slice(2, 19)):
        x, residual = p.rows(rows)
        assert torch.equal(run_linear(x, p.layer, residual, invariant=True), whole[rows])
    if weight == "two-level":
        assert torch.equal(run_choice(p.x, p.layer, p.residual, Choice("fused", Tile(64, 64))), whole)
        assert torch.equal(run_choice(p.x, p.layer, p.residual, Choice("int_mm")), whole)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_float_weights(dtype):
    for m, n, k in ((1, 8, 8), (5, 70, 200), (17, 64, 64)):
        p = problem(m, n, k, dtype, None, "none", bias=True, residual=True)
        for invariant in (True, False):
            assert_close(run_linear(p.x, p.layer, p.residual, invariant), p.expected)


def test_a_float16_weight_takes_inputs_beyond_float16():
    layer = pack_linear(Linear("layer", torch.ones(8, 32, dtype=torch.float16)), CPU)
    x = torch.zeros(1, 32)
    x[0, 0] = 1e6
    assert run_linear(x, layer, None, True).tolist() == [[65504.0] * 8]


@pytest.mark.parametrize("act", ["dynamic", "static", "fp8", "none"])
def test_low_rank(act):
    """The factors read the input that the weight reads; what goes between them is rounded to bfloat16."""
    p = problem(5, 70, 128, "fp4" if act == "fp8" else "int4", 32, act, bias=True, residual=True, rank=8)
    assert p.layer.low_rank is not None
    assert isinstance(p.layer.low_rank[0].weight, PackedWeight) == (act != "none")
    assert_close(run_linear(p.x, p.layer, p.residual, True), p.expected, 1e-4)


def test_low_rank_of_any_numbers():
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn(4, 64, generator=generator), torch.randn(10, 4, generator=generator)
    layer = pack_linear(Linear("layer", torch.zeros(10, 64), None, ActivationQuant(), (down, up)), CPU)
    codes = torch.randint(-128, 128, (3, 64), generator=generator, dtype=torch.int8)
    x = Quantized(codes, torch.rand(3, generator=generator))
    expected = codes.double() * x.scale.double()[:, None] @ down.double().T @ up.double().T
    assert_close(run_linear(x, layer, None, True), expected)


@pytest.mark.parametrize("rule", ["m1", "m2"])
def test_fp4_with_powers_of_two(rule):
    p = problem(3, 70, 256, "fp4", 64, "fp8", rule=rule)
    assert_close(run_linear(p.x, p.layer, None, True), p.expected)


def test_cublas_is_bfloat16_of_the_weight():
    p = problem(5, 70, 256, "int4", 128, "dynamic", bias=True, residual=True)
    assert_close(run_choice(p.x, p.layer, p.residual, Choice("cublas")), p.expected, 5e-3)


def test_no_rows_and_the_wrong_input():
    p = problem(2, 70, 128)
    assert run_linear(p.rows(slice(0, 0))[0], p.layer, None, True).shape == (0, 70)
    with pytest.raises(ValueError, match="layer wants a quantized input"):
        run_linear(torch.zeros(2, 128), p.layer, None, True)


def test_describe():
    assert describe(problem(1, 8, 256).layer) == ("linear int4, group 128", "Triton, int8 dot")
    assert describe(problem(1, 8, 64, "two-level", 32).layer)[0] == "linear int4, two-level scales"
    assert describe(problem(1, 8, 64, "int8", None, "none").layer) == ("linear int8, float input",
                                                                       "Triton, bfloat16 dot")
    assert describe(problem(1, 8, 64, "bfloat16", None, "none").layer) == ("linear bfloat16", "Triton, bfloat16 dot")


def test_segments_depend_on_the_weight_alone_and_cover_it():
    for n in (1, 64, 1024, 4096, 6144, 28672, 128256):
        for k in (1, 64, 172, 896, 4096, 11008, 14336):
            count, length = segments(n, k)
            assert 1 <= count <= choices.MAX_SEGMENTS and length % choices.SEGMENT_STEP == 0
            assert (count - 1) * length < k <= count * length


def test_every_case_has_a_rule_that_keeps_its_promise():
    for capability in (80, 89, 90, 120):
        for dot in ("int8", "fp8", "bfloat16", "float16", "float32"):
            for arithmetic in ("row", "two-level", "grouped", "float"):
                for m in (1, 16, 17, 64, 256, 257, 8192):
                    kind = Kind(dot, arithmetic)
                    assert choose(kind, m, 4096, 4096, capability, invariant=True).method != "cublas"
                    assert choose(kind, m, 64, 64, capability, invariant=False)
    with pytest.raises(ValueError, match=r"capability 7\.5; 8\.0 is needed"):
        choose(Kind("int8", "row"), 1, 64, 64, 75, True)


def test_cases_and_sweeps_for_the_roofline():
    cases = linear_cases()
    first = next(case for case in cases if case.name == "down" and case.m == 2)
    assert first.multiply_adds == 2 * 4096 * 14336
    assert first.weight_bytes == 4096 * 14336 // 2 + 4096 * 112 * 2
    assert first.bytes == first.weight_bytes + 2 * (14336 + 4) + 4 * 2 * 4096
    for m in (1, 40, 512):
        found = list(sweep(Kind("int8", "two-level"), m, 4096, 4096, 90))
        assert found[0] == choose(Kind("int8", "two-level"), m, 4096, 4096, 90, True)
        assert len(set(found)) == len(found) > 5
    for small in (Case("small", 3, 128, 256), Case("small", 3, 128, 256, two_level=True),
                  Case("small", 3, 128, 256, "int8", None)):
        layer, x = random_case(small, CPU)
        assert layer.nbytes == small.weight_bytes
        assert run_linear(x, layer, None, True).isfinite().all()
