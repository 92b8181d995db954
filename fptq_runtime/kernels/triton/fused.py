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

from fptq_runtime.kernels.base import ActivationQuant, Array, Embedding, Norm
from fptq_runtime.kernels.reference import to_torch
from fptq_runtime.kernels.triton.values import Quantized

SMALLEST_SCALE = tl.constexpr(torch.finfo(torch.float32).eps)  # of an all-zero row
ROUND = tl.constexpr(12582912.0)  # 1.5 · 2^23: what is added to |x| < 2^22 leaves x's nearest integer, half to even
ROUND_BITS = tl.constexpr(0x4B400000)

# What a kernel makes of its row.
FLOAT, STATIC, DYNAMIC = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)

Kind = Literal["silu_mul", "gelu_tanh"]


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


def embed(token_ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Rows of the table [V, H] for token ids int32 [M]. float32 [M, H]"""
    rows, width = token_ids.shape[0], table.shape[1]
    out = torch.empty((rows, width), dtype=torch.float32, device=table.device)
    if rows:
        _embed_kernel[(rows,)](token_ids, table, out, width, BLOCK=triton.next_power_of_2(width),
                               num_warps=_warps(width))
    return out


def norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float,
         kind: Literal["rms", "layer"], act: ActivationQuant | None) -> torch.Tensor | Quantized:
    """RMSNorm or LayerNorm of each row of x float32 [M, H], then quantize."""
    rows, width = x.shape
    out, scale = result(rows, width, act, x.device)
    if rows:
        _norm_kernel[(rows,)](
            x, weight, weight if bias is None else bias, octets(out), scale, eps, width, LAYER=kind == "layer",
            BIAS=bias is not None, MODE=mode_of(act), FP8=is_fp8(act), BLOCK=triton.next_power_of_2(width),
            num_warps=_warps(width), enable_fp_fusion=False)
    return out if act is None else Quantized(out, scale)


def activation(x: torch.Tensor, kind: Kind, act: ActivationQuant | None) -> torch.Tensor | Quantized:
    """silu_mul: silu(x[:, :I]) · x[:, I:], float32 [M, 2I] to [M, I]; gelu_tanh keeps the width. Then quantize."""
    rows = x.shape[0]
    width = x.shape[1] // 2 if kind == "silu_mul" else x.shape[1]
    return _elementwise(x, rows, width, {"silu_mul": 1, "gelu_tanh": 2}[kind], act)


def quantize(x: torch.Tensor, act: ActivationQuant | None) -> torch.Tensor | Quantized:
    """float32 [M, K] as a linear with that `act` reads it."""
    return x if act is None else _elementwise(x, x.shape[0], x.shape[1], 0, act)


def moved_bytes(rows: int, width_in: int, width_out: int, act: ActivationQuant | None) -> int:
    """What a call on float32 [rows, width_in] must read and write at least; parameters are not counted.

    norm, quantize: width_in = width_out; silu_mul: width_in = 2 · width_out; embed: width_in is half of H for a table
    of 16 bits, and act None.
    """
    if act is None:
        return 4 * rows * (width_in + width_out)
    return rows * (4 * width_in + width_out) + 4 * (rows if act.scale is None else 1)


def _elementwise(x: torch.Tensor, rows: int, width: int, kind: int,
                 act: ActivationQuant | None) -> torch.Tensor | Quantized:
    out, scale = result(rows, width, act, x.device)
    if rows:
        _activation_kernel[(rows,)](
            x, octets(out), scale, width, KIND=kind, MODE=mode_of(act), FP8=is_fp8(act),
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
def _embed_kernel(token_ids, table, out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    token = tl.load(token_ids + row).to(tl.int64)
    x = tl.load(table + token * width + columns, mask=columns < width, other=0.0)
    tl.store(out + row.to(tl.int64) * width + columns, x.to(tl.float32), mask=columns < width)


@triton.jit
def _norm_kernel(x, weight, bias, out, scale, eps, width, LAYER: tl.constexpr, BIAS: tl.constexpr, MODE: tl.constexpr,
                 FP8: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    v = tl.load(x + row.to(tl.int64) * width + columns, mask=inside, other=0.0)
    w = tl.load(weight + columns, mask=inside, other=0.0)
    count = width.to(tl.float32)
    if LAYER:
        v = tl.where(inside, v - tl.div_rn(tl.sum(v, 0), count), 0.0)
    variance = tl.div_rn(tl.sum(v * v, 0), count)
    y = v * tl.div_rn(1.0, tl.sqrt_rn(variance + eps)) * w
    if BIAS:
        y += tl.load(bias + columns, mask=inside, other=0.0)
    _store_row(y, out, scale, row, width, columns, MODE, FP8)


@triton.jit
def _activation_kernel(x, out, scale, width, KIND: tl.constexpr, MODE: tl.constexpr, FP8: tl.constexpr,
                       BLOCK: tl.constexpr):
    """KIND 0: as it is; 1: silu · mul; 2: gelu by tanh, which is x · sigmoid(2 u), u = √(2/π) (x + 0.044715 x³)."""
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    start = row.to(tl.int64) * width * (2 if KIND == 1 else 1)
    v = tl.load(x + start + columns, mask=inside, other=0.0)
    if KIND == 1:
        up = tl.load(x + start + width + columns, mask=inside, other=0.0)
        v = tl.div_rn(v, 1.0 + tl.exp(-v)) * up
    if KIND == 2:
        v = tl.div_rn(v, 1.0 + tl.exp(-1.5957691216057308 * (v + 0.044715 * (v * v * v))))
    _store_row(v, out, scale, row, width, columns, MODE, FP8)
