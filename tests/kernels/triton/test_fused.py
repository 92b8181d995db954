"""Norms, activations and quantization against plain torch: the reference's very codes wherever floats allow."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fptq_runtime.artifact import numerics
from fptq_runtime.kernels.base import Activation, ActivationQuant, Embedding, Norm
from fptq_runtime.kernels.reference import ReferenceBackend, to_numpy
from fptq_runtime.kernels.triton import fused
from fptq_runtime.kernels.triton.values import Quantized

ACTS = [ActivationQuant(), ActivationQuant(0.021), ActivationQuant(None, "float"), ActivationQuant(0.005, "float")]
WIDTHS = [1, 2, 80, 257, 1024, 5000, 16384]


def rows_of(width: int, seed: int = 0) -> torch.Tensor:
    """Rows of many sizes; one is zero, one lies on ties of a static grid, one of FP8's least numbers."""
    x = torch.randn((6, width), generator=torch.Generator().manual_seed(seed))
    x *= torch.tensor([1, 1e-3, 50, 0, 1, 1])[:, None]
    x[4] = torch.arange(width) % 301 * (0.5 * 0.021) - 1
    x[5] *= 0.005 * 2**-6
    return x


def expected_codes(x: torch.Tensor, act: ActivationQuant) -> tuple[torch.Tensor, torch.Tensor]:
    scale = numerics.token_scale(x, act.type) if act.scale is None else torch.tensor([[act.scale]])
    return numerics.quantize(x, scale, 8, act.type), scale.flatten()


def quantized(value: torch.Tensor | Quantized) -> Quantized:
    assert isinstance(value, Quantized)
    return value


def dense(value: torch.Tensor | Quantized) -> torch.Tensor:
    assert isinstance(value, torch.Tensor)
    return value


def assert_same(value: torch.Tensor | Quantized, codes: torch.Tensor, scale: torch.Tensor) -> None:
    value = quantized(value)
    torch.testing.assert_close(value.scale, scale, rtol=0, atol=0)
    torch.testing.assert_close(value.codes.float(), codes.float(), rtol=0, atol=0)
    assert value.codes.dtype == codes.dtype


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("width", WIDTHS)
def test_quantize_gives_the_references_codes(width: int, act: ActivationQuant) -> None:
    x = rows_of(width)
    assert_same(fused.quantize(x, act), *expected_codes(x, act))


def test_quantize_without_a_scheme_changes_nothing() -> None:
    x = rows_of(80)
    assert fused.quantize(x, None) is x


@pytest.mark.parametrize("type", ["int", "float"])
def test_a_nan_makes_its_own_row_nan_and_no_other(type: str) -> None:
    x = rows_of(300)
    x[1, 7] = torch.nan
    got = quantized(fused.quantize(x, ActivationQuant(None, type)))  # type: ignore[arg-type]
    assert got.scale.isnan().tolist() == [False, True, False, False, False, False]


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("width", [1, 80, 1000, 4096])
def test_norm(width: int, bias: bool, kind: str) -> None:
    generator = torch.Generator().manual_seed(width)
    x = rows_of(width) + 0.5
    weight = 1 + torch.randn(width, generator=generator) / 10
    offset = torch.randn(width, generator=generator) if bias else None
    got = dense(fused.norm(x, weight, offset, 1e-5, kind, None))  # type: ignore[arg-type]
    double = x.double()
    if kind == "layer":
        expected = F.layer_norm(double, (width,), weight.double(), None, 1e-5)
    else:
        expected = double * torch.rsqrt(double.square().mean(-1, keepdim=True) + 1e-5) * weight
    if offset is not None:
        expected = expected + offset
    size = expected.abs() + (0 if offset is None else offset.abs())
    size = size + (x.abs().amax(-1, keepdim=True) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
                   if kind == "layer" else 0)  # the mean's rounding
    assert ((got - expected).abs() <= 1e-6 * size).all()
    for act in ACTS:
        fused_codes = fused.norm(x, weight, offset, 1e-5, kind, act)  # type: ignore[arg-type]
        assert_same(fused_codes, *expected_codes(got, act))


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_few_codes_of_a_norm_tip_and_by_one(kind: str) -> None:
    """A float in the last place decides where x / scale is a tie."""
    x = torch.randn((24, 4096), generator=torch.Generator().manual_seed(1))
    norm = Norm(kind, torch.ones(4096), torch.zeros(4096) if kind == "layer" else None, 1e-5)  # type: ignore[arg-type]
    got = quantized(fused.norm(x, norm.weight, norm.bias, norm.eps, norm.kind, ActivationQuant()))
    reference = ReferenceBackend().prepare(norm)
    plain = F.layer_norm(x, (4096,), reference.weight, reference.bias) if kind == "layer" else (
        x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5))
    codes, _ = expected_codes(plain, ActivationQuant())
    tipped = (got.codes.int() - codes.int()).abs()
    assert tipped.max() <= 1
    assert tipped.sum() <= 1e-4 * tipped.numel()


CURVES = [Activation("silu", True), Activation("silu"), Activation("gelu_tanh"), Activation("gelu_tanh", True),
          Activation("gelu"), Activation("gelu", True), Activation("relu"), Activation("relu2"),
          Activation("clamped_swiglu", True), Activation("clamped_swiglu", True, 2.5)]


def curve_and_size(x: torch.Tensor, activation: Activation) -> tuple[torch.Tensor, torch.Tensor]:
    """Of x in double, and what its float32 rounding errors are relative to."""
    if activation.curve == "silu":
        return F.silu(x), (1 + x.abs()) * F.silu(x).abs()
    if activation.curve == "gelu_tanh":
        exponent = 2 * (2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)
        expected = x * torch.sigmoid(exponent)  # 1 + tanh cancels, even in double
        torch.testing.assert_close(expected, F.gelu(x, approximate="tanh"), rtol=0, atol=1e-12)
        return expected, (1 + exponent.abs()) * expected.abs()
    if activation.curve == "gelu":
        return F.gelu(x), x.abs()  # as torch's own in float32: 1 + erf cancels
    if activation.curve == "clamped_swiglu":
        gate = x.clamp(max=activation.limit)
        return gate * torch.sigmoid(1.702 * gate), (2 + 1.702 * gate.abs()) * (gate * torch.sigmoid(1.702 * gate)).abs()
    expected = F.relu(x) if activation.curve == "relu" else F.relu(x).square()
    return expected, expected


@pytest.mark.parametrize("activation", CURVES, ids=str)
@pytest.mark.parametrize("width", [2, 172, 11008])
def test_activation(width: int, activation: Activation) -> None:
    x = 4 * rows_of(width)
    x[0, 0] = -200.0  # exp overflows
    got = dense(fused.activation(x, activation, None))
    assert got.shape == (6, activation.width(width))
    double = x.double()
    if activation.gated:
        gate, up = double.chunk(2, dim=-1)
        if activation.curve == "clamped_swiglu":
            up = up.clamp(-activation.limit, activation.limit) + 1
        expected, size = (part * up for part in curve_and_size(gate, activation))
        if activation.curve == "clamped_swiglu":  # up + 1 may cancel, near -1
            size = size.abs() + 1e-1 * expected.abs() + curve_and_size(gate, activation)[0].abs()
    else:
        expected, size = curve_and_size(double, activation)
    assert ((got - expected).abs() <= 3e-7 * size.abs() + 1e-30).all()
    for act in ACTS:
        assert_same(fused.activation(x, activation, act), *expected_codes(got, act))


@pytest.mark.parametrize("activation", CURVES, ids=str)
def test_a_nan_passes_an_activation(activation: Activation) -> None:
    x = torch.zeros((2, 8))
    x[0, 1] = torch.nan
    assert dense(fused.activation(x, activation, None)).isnan().nonzero().tolist() == [[0, 1]]


@pytest.mark.parametrize("cap", [30.0, 0.7])
def test_softcap(cap: float) -> None:
    x = rows_of(1000)
    x[2, :5] = torch.tensor([torch.inf, -torch.inf, 1e30, torch.nan, 0.625 * cap])
    got = fused.softcap(x, cap)
    expected = (x.double() / cap).tanh() * cap
    assert ((got - expected).abs() <= 4e-7 * expected.abs())[~expected.isnan()].all()
    assert torch.equal(got.isnan(), expected.isnan())
    assert fused.softcap(x[:0], cap).shape == (0, 1000)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [64, 100])
def test_embed(width: int, dtype: torch.dtype) -> None:
    table = torch.randn((9, width), generator=torch.Generator().manual_seed(0)).to(dtype)
    prepared = fused.prepare_embedding(Embedding(to_numpy(table)), torch.device("cpu"))
    ids = torch.tensor([8, 0, 3, 3], dtype=torch.int32)
    torch.testing.assert_close(fused.embed(ids, prepared), table[ids.long()].float(), rtol=0, atol=0)


def test_a_rows_bits_do_not_depend_on_the_others() -> None:
    x, weight = rows_of(1000), torch.ones(1000)
    whole = quantized(fused.norm(x, weight, weight, 1e-5, "layer", ActivationQuant()))
    for row in range(x.shape[0]):
        alone = fused.norm(x[row : row + 1], weight, weight, 1e-5, "layer", ActivationQuant())
        assert_same(alone, whole.codes[row : row + 1], whole.scale[row : row + 1])


def test_no_rows() -> None:
    x = torch.empty((0, 64))
    assert quantized(fused.norm(x, torch.ones(64), None, 1e-5, "rms", ActivationQuant())).codes.shape == (0, 64)
    assert dense(fused.activation(x, Activation("silu", True), None)).shape == (0, 32)
    assert fused.embed(torch.empty(0, dtype=torch.int32), torch.ones(3, 8)).shape == (0, 8)


def test_prepared_norms_are_float32() -> None:
    norm = fused.prepare_norm(Norm("layer", to_numpy(torch.ones(8).bfloat16()), to_numpy(torch.ones(8).bfloat16()),
                                   1e-6), torch.device("cpu"))
    assert norm.bias is not None
    assert (norm.weight.dtype, norm.bias.dtype, norm.eps, norm.kind) == (torch.float32, torch.float32, 1e-6, "layer")


def test_moved_bytes() -> None:
    assert fused.moved_bytes(3, 2 * 100, 100, None) == 4 * 3 * 300
    assert fused.moved_bytes(3, 100, 100, ActivationQuant()) == 3 * (400 + 100 + 4)
    assert fused.moved_bytes(3, 100, 100, ActivationQuant(0.1)) == 3 * 500 + 4
