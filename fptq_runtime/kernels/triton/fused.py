"""What lies between the linears: embedding, norms, activations, and quantization, a row of x to a program.

Numbers are artifact/numerics.py's: a code is x / scale rounded half to even, a dynamic scale max|x| / 127.5 (int8) or
/ 448 (FP8). The same float row gives the reference's very codes and scale; sums of a norm are in another order than
torch's. A row's bits depend on its width alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import triton
import triton.language as tl

from fptq_runtime.kernels.base import Activation, ActivationQuant, Array, Embedding, Norm
from fptq_runtime.kernels.reference import to_torch
from fptq_runtime.kernels.triton.sums import Sums, arguments, summed
from fptq_runtime.kernels.triton.values import Quantized

SMALLEST_SCALE = tl.constexpr(torch.finfo(torch.float32).eps)  # of an all-zero row
ROUND = tl.constexpr(12582912.0)  # 1.5 · 2^23: what is added to |x| < 2^22 leaves x's nearest integer, half to even
ROUND_BITS = tl.constexpr(0x4B400000)

# What a kernel makes of its row.
FLOAT, STATIC, DYNAMIC = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)

_SOFTCAP_BLOCK = 1024  # elements a program


@dataclass(frozen=True)
class DeviceNorm:
    kind: Literal["rms", "layer"]
    weight: torch.Tensor  # float32 [H]
    bias: torch.Tensor | None  # float32 [H]
    eps: float


def prepare_norm(norm: Norm, device: torch.device) -> DeviceNorm:
    return DeviceNorm(norm.kind, floats(norm.weight, device), None if norm.bias is None else floats(norm.bias, device),
                      norm.eps)


def prepare_embedding(embedding: Embedding, device: torch.device) -> torch.Tensor:
    """[V, H] in the checkpoint's own type."""
    return to_torch(embedding.weight).to(device).contiguous()


def floats(array: Array, device: torch.device) -> torch.Tensor:
    """A parameter in float32."""
    return to_torch(array).to(device, torch.float32).contiguous()


def embed(indices: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Rows of the table [V, H] for token ids or positions int32 [M]. float32 [M, H]"""
    rows, width = indices.shape[0], table.shape[1]
    out = torch.empty((rows, width), dtype=torch.float32, device=table.device)
    if rows:
        _embed_kernel[(rows,)](indices, table, out, width, BLOCK=triton.next_power_of_2(width),
                               num_warps=_warps(width))
    return out


def norm(x: torch.Tensor | Sums, weight: torch.Tensor, bias: torch.Tensor | None, eps: float,
         kind: Literal["rms", "layer"], act: ActivationQuant | None) -> torch.Tensor | Quantized:
    """RMSNorm or LayerNorm of each row of x float32 [M, H], then quantize; sums are added up on the way."""
    rows, width = x.shape
    out, scale = result(rows, width, act, weight.device)
    if rows:
        read = arguments(x)  # before there is a place for y
        _norm_kernel[(rows,)](
            **read, y=x.written() if isinstance(x, Sums) else None, weight=weight,
            bias=weight if bias is None else bias, out=octets(out), scale=scale, eps=eps, width=width,
            LAYER=kind == "layer", BIAS=bias is not None, MODE=mode_of(act), FP8=is_fp8(act),
            BLOCK=triton.next_power_of_2(width), num_warps=_warps(width), enable_fp_fusion=False)
    return out if act is None else Quantized(out, scale)


def activation(x: torch.Tensor, activation: Activation, act: ActivationQuant | None) -> torch.Tensor | Quantized:
    """What an MLP does between its linears, float32 [M, N] to [M, activation.width(N)], then quantize."""
    return _elementwise(x, activation, act)


def quantize(x: torch.Tensor, act: ActivationQuant | None) -> torch.Tensor | Quantized:
    """float32 [M, K] as a linear with that `act` reads it."""
    return x if act is None else _elementwise(x, None, act)


def softcap(x: torch.Tensor, cap: float) -> torch.Tensor:
    """cap · tanh(x / cap), float32."""
    out = torch.empty_like(x)
    if x.numel():
        _softcap_kernel[(triton.cdiv(x.numel(), _SOFTCAP_BLOCK),)](x, out, float(cap), x.numel(), BLOCK=_SOFTCAP_BLOCK,
                                                                   num_warps=4, enable_fp_fusion=False)
    return out


def moved_bytes(rows: int, width_in: int, width_out: int, act: ActivationQuant | None) -> int:
    """What a call on float32 [rows, width_in] must read and write at least; parameters are not counted.

    norm, quantize: width_in = width_out; a gated activation: width_in = 2 · width_out; embed: width_in is
    half of H for a table of 16 bits, and act None.
    """
    if act is None:
        return 4 * rows * (width_in + width_out)
    return rows * (4 * width_in + width_out) + 4 * (rows if act.scale is None else 1)


def _elementwise(x: torch.Tensor, activation: Activation | None,
                 act: ActivationQuant | None) -> torch.Tensor | Quantized:
    rows, width = x.shape[0], x.shape[1] if activation is None else activation.width(x.shape[1])
    out, scale = result(rows, width, act, x.device)
    if rows:
        _activation_kernel[(rows,)](
            x, octets(out), scale, 0.0 if activation is None else float(activation.limit), width,
            CURVE="none" if activation is None else activation.curve,
            GATED=activation is not None and activation.gated, MODE=mode_of(act), FP8=is_fp8(act),
            BLOCK=triton.next_power_of_2(width), num_warps=_warps(width), enable_fp_fusion=False)
    return out if act is None else Quantized(out, scale)


def result(rows: int, width: int, act: ActivationQuant | None,
            device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Where a kernel writes, and the scales: filled in already where they are static."""
    dtype = torch.float32 if act is None else torch.float8_e4m3fn if act.type == "float" else torch.int8
    out = torch.empty((rows, width), dtype=dtype, device=device)
    if act is not None and act.scale is not None:
        return out, torch.full((1,), act.scale, dtype=torch.float32, device=device)
    return out, torch.empty(0 if act is None else rows, dtype=torch.float32, device=device)


def octets(out: torch.Tensor) -> torch.Tensor:
    """As kernels write it: FP8 by its bits, for Ampere has no such type."""
    return out.view(torch.uint8) if out.dtype == torch.float8_e4m3fn else out


def mode_of(act: ActivationQuant | None) -> int:
    """FLOAT, STATIC or DYNAMIC."""
    return 0 if act is None else 2 if act.scale is None else 1


def is_fp8(act: ActivationQuant | None) -> bool:
    return act is not None and act.type == "float"


def _warps(width: int) -> int:
    """About 16 elements a thread, so that one row's latency is short; a function of the width alone."""
    return int(min(max(triton.next_power_of_2(width) // 512, 1), 16))


@triton.jit
def token_scale(x, axis: tl.constexpr, FP8: tl.constexpr):
    """The dynamic scale of rows along an axis; NaN where a row has one. Bits of magnitudes are ordered as integers."""
    largest = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis).to(tl.float32, bitcast=True)
    scale = tl.div_rn(largest, largest * 0.0 + (448.0 if FP8 else 127.5))
    return tl.where(scale == 0.0, SMALLEST_SCALE, scale)


@triton.jit
def codes_of(x, scale, FP8: tl.constexpr):
    """x / scale on the 8-bit grid, int8 or the bits of E4M3; shapes are equal."""
    scaled = tl.div_rn(x, scale)
    if FP8:
        codes = _e4m3_bits(tl.clamp(scaled, -448.0, 448.0))
    else:
        codes = ((tl.clamp(scaled, -128.0, 127.0) + ROUND) - ROUND).to(tl.int8)
    return codes


@triton.jit
def _e4m3_bits(x):
    """Half to even. x within ±448. uint8"""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    normal = ((magnitude + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)  # 3 bits of mantissa, a bias of 7
    subnormal = (tl.abs(x) * 512.0 + ROUND).to(tl.int32, bitcast=True) - ROUND_BITS  # steps of 2^-9 below 2^-6
    return (tl.where(magnitude < 0x3C800000, subnormal, normal) | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def _store_row(x, out, scale, row, width, columns, MODE: tl.constexpr, FP8: tl.constexpr):
    """x [BLOCK], zeros beyond the width."""
    inside = columns < width
    target = out + row.to(tl.int64) * width + columns
    if MODE == FLOAT:
        tl.store(target, x, mask=inside)
    else:
        if MODE == DYNAMIC:
            row_scale = token_scale(x, 0, FP8)
            tl.store(scale + row, row_scale)
        else:
            row_scale = tl.load(scale)
        tl.store(target, codes_of(x, tl.zeros_like(x) + row_scale, FP8), mask=inside)


@triton.jit
def _embed_kernel(indices, table, out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    index = tl.load(indices + row).to(tl.int64)
    x = tl.load(table + index * width + columns, mask=columns < width, other=0.0)
    tl.store(out + row.to(tl.int64) * width + columns, x.to(tl.float32), mask=columns < width)


@triton.jit(do_not_specialize=["rows"])
def _norm_kernel(y_sums, y_row_scale, y_x_scale, y_bias, y_residual, rows, y, weight, bias, out, scale, eps, width,
                 SEGMENTS: tl.constexpr, UNIT: tl.constexpr, X_SCALE: tl.constexpr, LAYER: tl.constexpr,
                 BIAS: tl.constexpr, MODE: tl.constexpr, FP8: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    v = summed(row, columns, inside, y_sums, y_row_scale, y_x_scale, y_bias, y_residual, rows, width, SEGMENTS, UNIT,
               X_SCALE)
    if y is not None:
        tl.store(y + row.to(tl.int64) * width + columns, v, mask=inside)
    w = tl.load(weight + columns, mask=inside, other=0.0)
    count = width.to(tl.float32)
    if LAYER:
        v = tl.where(inside, v - tl.div_rn(tl.sum(v, 0), count), 0.0)
    variance = tl.div_rn(tl.sum(v * v, 0), count)
    z = v * tl.div_rn(1.0, tl.sqrt_rn(variance + eps)) * w
    if BIAS:
        z += tl.load(bias + columns, mask=inside, other=0.0)
    _store_row(z, out, scale, row, width, columns, MODE, FP8)


@triton.jit
def tanh(x):
    """Cephes' tanhf: a polynomial near 0, where 1 - 2 / (e^2|x| + 1) cancels."""
    size = tl.abs(x)
    square = x * x
    near = (((-5.70498872745e-3 * square + 2.06390887954e-2) * square - 5.37397155531e-2) * square
            + 1.33314422036e-1) * square - 3.33332819422e-1
    far = 1.0 - 2.0 / (tl.exp(2.0 * size) + 1.0)
    return tl.where(size < 0.625, near * square * x + x, tl.where(x < 0.0, -far, far))


@triton.jit
def _softcap_kernel(x, out, cap, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x + at, mask=at < count, other=0.0)
    tl.store(out + at, tanh(tl.div_rn(v, tl.zeros_like(v) + cap)) * cap, mask=at < count)


@triton.jit
def _curve(v, CURVE: tl.constexpr):
    """silu is v · sigmoid(v), gelu by tanh v · sigmoid(2 u), u = √(2/π) (v + 0.044715 v³). A NaN stays."""
    if CURVE == "silu":
        v = tl.div_rn(v, 1.0 + tl.exp(-v))
    elif CURVE == "gelu_tanh":
        v = tl.div_rn(v, 1.0 + tl.exp(-1.5957691216057308 * (v + 0.044715 * (v * v * v))))
    elif CURVE == "gelu":
        v = 0.5 * v * (1.0 + tl.erf(0.7071067811865476 * v))
    elif CURVE == "relu" or CURVE == "relu2":
        v = tl.where(v < 0.0, 0.0, v)
        if CURVE == "relu2":
            v = v * v
    else:
        tl.static_assert(CURVE == "none", "an unknown curve")
    return v


@triton.jit
def _activation_kernel(x, out, scale, limit, width, CURVE: tl.constexpr, GATED: tl.constexpr, MODE: tl.constexpr,
                       FP8: tl.constexpr, BLOCK: tl.constexpr):
    """A row of `Activation`; the curve "none" leaves it as it is."""
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    v_at = x + row.to(tl.int64) * width * (2 if GATED else 1) + columns
    v = tl.load(v_at, mask=inside, other=0.0)
    if GATED:
        up = tl.load(v_at + width, mask=inside, other=0.0)
        if CURVE == "clamped_swiglu":
            v = tl.where(v > limit, limit, v)
            up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
            v = tl.div_rn(v, 1.0 + tl.exp(-1.702 * v)) * (up + 1.0)
        else:
            v = _curve(v, CURVE) * up
    else:
        v = _curve(v, CURVE)
    _store_row(v, out, scale, row, width, columns, MODE, FP8)
