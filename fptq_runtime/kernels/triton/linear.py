"""The linear layer: y = x · Wᵀ + bias + residual in float32, computed as Wx transposed so that 64 weight rows fill a
tensor-core tile (wgmma on sm_90) however few rows x has.

One kernel serves every weight: it walks blocks of K, unpacks with masks, multiplies slices of x, and ends a group with
its scale. The order of the float operations of an output depends on the weight alone:
- K is cut into segments, a function of (N, K) (`choice.segments`); a segment's sum starts at 0 and takes its groups in
  ascending order, acc = fma(float(int32 dot), scale, acc); segments are added in ascending order.
- Where an output is one integer sum ("row" and "two-level" weights with int8 inputs) no float is added at all.
- Then y = fma(acc · row scale, x scale, bias) + residual, fma and product spelt out so that no compiler chooses.
One program may take one segment (a second kernel adds them) or all; both give the same bits, as does any tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import triton
import triton.language as tl

from fptq_runtime.kernels.base import ActivationQuant, Array, Linear, QuantizedWeight
from fptq_runtime.kernels.reference import to_torch
from fptq_runtime.kernels.triton.choice import Case, Choice, Dot, Kind, Tile, choose, segments
from fptq_runtime.kernels.triton.device import capability
from fptq_runtime.kernels.triton.packing import TILE, Arithmetic, PackedWeight, pack_weight
from fptq_runtime.kernels.triton.values import Quantized, interpreted

FLOAT_BLOCK = 64  # columns of K a step takes of a float weight
_REDUCE = 1024  # outputs a program of the reduction


@dataclass(frozen=True)
class DeviceLinear:
    """A linear on the device. weight: packed, or float [N, K] as it was stored; bias float32 [N]."""

    name: str
    weight: PackedWeight | torch.Tensor
    bias: torch.Tensor | None
    act: ActivationQuant | None
    low_rank: tuple[DeviceLinear, DeviceLinear] | None = None  # down, up

    @property
    def n(self) -> int:
        return self.weight.n if isinstance(self.weight, PackedWeight) else self.weight.shape[0]

    @property
    def k(self) -> int:
        return self.weight.k if isinstance(self.weight, PackedWeight) else self.weight.shape[1]

    @property
    def nbytes(self) -> int:
        """Of weights, scales and low-rank factors: read for one product."""
        weight = self.weight
        own = weight.nbytes if isinstance(weight, PackedWeight) else weight.numel() * weight.element_size()
        return own + sum(part.nbytes for part in self.low_rank or ())


def pack_linear(linear: Linear, device: torch.device) -> DeviceLinear:
    """Raises ValueError, by the layer's name, for what the kernels do not take."""
    weight = linear.weight
    packed = (pack_weight(linear.name, weight, device) if isinstance(weight, QuantizedWeight)
              else _matrix(weight, device))
    bias = None if linear.bias is None else to_torch(linear.bias).to(device, torch.float32).contiguous()
    low_rank = None
    if linear.low_rank is not None:
        down, up = linear.low_rank
        low_rank = (_pack_down(f"{linear.name}.low_rank_down", down, linear.act, device),
                    DeviceLinear(f"{linear.name}.low_rank_up", _matrix(up, device), None, None))
    return DeviceLinear(linear.name, packed, bias, linear.act, low_rank)


def run_linear(x: torch.Tensor | Quantized, linear: DeviceLinear, residual: torch.Tensor | None,
               invariant: bool) -> torch.Tensor:
    """x · Wᵀ + bias + residual, float32 [M, N]. x: Quantized where the linear has `act`, else float32 [M, K], which a
    bfloat16 or quantized weight reads as bfloat16 and a float16 one as float16, its finite range.

    invariant: a row has the same bits whatever M and the other rows. Else large M may go through cuBLAS.
    """
    choice = choose(kind(linear, x), _rows(x), linear.n, linear.k, capability(_tensor(x).device), invariant)
    return run_choice(x, linear, residual, choice, invariant)


def run_choice(x: torch.Tensor | Quantized, linear: DeviceLinear, residual: torch.Tensor | None, choice: Choice,
               invariant: bool = True) -> torch.Tensor:
    """`run_linear` with the kernel and tiles of one's own choice, for a sweep; low-rank factors choose theirs."""
    if isinstance(x, Quantized) != (linear.act is not None):
        wants = "a float" if linear.act is None else "a quantized"
        raise ValueError(f"{linear.name} wants {wants} input")
    if _rows(x) == 0:
        return torch.empty((0, linear.n), dtype=torch.float32, device=_tensor(x).device)
    y = _product(x, linear, residual, choice)
    if linear.low_rank is None:
        return y
    down, up = linear.low_rank
    return run_linear(run_linear(x, down, None, invariant), up, y, invariant)


def describe(linear: DeviceLinear) -> tuple[str, str]:
    """Which kind of layer it is, and what runs it."""
    weight = linear.weight
    device = (weight.values if isinstance(weight, PackedWeight) else weight).device
    kernel = f"Triton, {_dot(linear, device)} dot"
    if isinstance(weight, torch.Tensor):
        return f"linear {str(weight.dtype).removeprefix('torch.')}", kernel
    scales = {"row": "", "two-level": ", two-level scales", "grouped": f", group {weight.group_size}"}
    return f"linear {weight.codes}{scales[weight.arithmetic]}{'' if linear.act else ', float input'}", kernel


def kind(linear: DeviceLinear, x: torch.Tensor | Quantized) -> Kind:
    """What `choice.py` chooses by."""
    arithmetic = linear.weight.arithmetic if isinstance(linear.weight, PackedWeight) else "float"
    return Kind(_dot(linear, _tensor(x).device), arithmetic)


def random_case(case: Case, device: torch.device) -> tuple[DeviceLinear, Quantized]:
    """A layer of random codes and an input for it, made on the device. Groups are multiples of 128."""
    width = 64 if case.codes in ("int4", "fp4") else 128
    tiles, blocks = -(-case.n // TILE), -(-case.k // 128)
    values = torch.randint(0, 256, (tiles, blocks, TILE, width), dtype=torch.uint8, device=device)
    groups = 1 if case.group_size is None else case.k // case.group_size
    row = torch.rand((tiles, 1, TILE), device=device) * 1e-3
    arithmetic: Arithmetic = "row" if case.group_size is None else "two-level" if case.two_level else "grouped"
    scale = row if arithmetic != "grouped" else row.expand(tiles, groups, TILE).bfloat16().contiguous()
    multiplier = torch.randint(1, 16, (tiles, groups, TILE), dtype=torch.int8, device=device)
    weight = PackedWeight(case.codes, arithmetic, case.n, case.k, width, case.group_size or case.k, values, scale,
                          multiplier if arithmetic == "two-level" else None)
    codes = torch.randint(-128, 128, (case.m, case.k), dtype=torch.int8, device=device)
    x = Quantized(codes, torch.rand(case.m, device=device) * 1e-2)
    return DeviceLinear(case.name, weight, None, ActivationQuant()), x


def dequantized(weight: PackedWeight, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """[N, K]: code · scale, rounded to dtype."""
    return _expand(weight, dtype)


def expanded(weight: PackedWeight) -> torch.Tensor:
    """int8 [N, K]: code · multiplier, exactly what stands before the row's scale of an integer weight that is not
    "grouped"."""
    if weight.arithmetic == "grouped" or weight.codes not in ("int4", "int8"):
        raise ValueError(f"{weight.arithmetic} {weight.codes} weights are not int8 times a scale a row")
    return _expand(weight, torch.int8)


def _matrix(weight: Array, device: torch.device) -> torch.Tensor:
    return to_torch(weight).to(device).contiguous()


def _pack_down(name: str, down: Array, act: ActivationQuant | None, device: torch.device) -> DeviceLinear:
    """Rows of int8 times a power of two stay integers where x is quantized; others are floats."""
    values = to_torch(down).to(device)
    if act is not None:
        exponent = torch.frexp(values.double().abs().amax(1, keepdim=True)).exponent
        scale = (exponent.long() - 7 + 1023 << 52).view(torch.float64)  # 2^(exponent - 7)
        codes = values.double() / scale  # the largest of a row is 64 to 127
        if bool((codes == codes.round()).all()):
            octets = torch.nn.functional.pad((codes + 128).to(torch.uint8), (0, -codes.shape[1] % 4))
            packed = QuantizedWeight(octets.view(torch.int32), scale.float(), 8, codes.shape[1])
            return DeviceLinear(name, pack_weight(name, packed, device), None, act)
    return DeviceLinear(name, values.contiguous(), None, act)


def _tensor(x: torch.Tensor | Quantized) -> torch.Tensor:
    return x.codes if isinstance(x, Quantized) else x


def _rows(x: torch.Tensor | Quantized) -> int:
    return _tensor(x).shape[0]


def _dot(linear: DeviceLinear, device: torch.device) -> Dot:
    """What is multiplied. FP8 where the device has it and both are floats of at most 8 bits; whatever else is not
    int8 is exact in bfloat16 (x of a weight-only layer: rounded to it)."""
    weight, act = linear.weight, linear.act
    if isinstance(weight, torch.Tensor):
        return cast(Dot, str(weight.dtype).removeprefix("torch."))
    if act is not None and act.type == "int" and weight.codes in ("int4", "int8"):
        return "int8"
    floats = act is not None and act.type == "float" and weight.codes in ("fp4", "fp8")
    return "fp8" if floats and capability(device) >= 89 and not interpreted() else "bfloat16"


def _operand(x: torch.Tensor | Quantized, linear: DeviceLinear) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x in the type that is multiplied, and its scale. The interpreter has no bfloat16: there float32 holds the same
    numbers."""
    dot = _dot(linear, _tensor(x).device)
    if isinstance(x, Quantized):
        if dot in ("int8", "fp8"):
            return x.codes.contiguous(), x.scale
        if isinstance(linear.weight, torch.Tensor):  # rounded as another float input would be
            return _rounded(x.codes.float() * x.scale.view(-1, 1), dot), None
        return _rounded(x.codes, dot), x.scale
    return _rounded(x, dot), None


def _rounded(x: torch.Tensor, dot: Dot) -> torch.Tensor:
    if dot == "float16":
        limit = torch.finfo(torch.float16).max
        x = x.clamp(-limit, limit)
    rounded = x.to(getattr(torch, dot)).contiguous()
    return rounded.float() if interpreted() else rounded


def _product(x: torch.Tensor | Quantized, linear: DeviceLinear, residual: torch.Tensor | None,
             choice: Choice) -> torch.Tensor:
    """Without the low-rank factors."""
    values, x_scale = _operand(x, linear)
    weight = linear.weight
    epilogue = _Epilogue(x_scale, linear.bias, residual)
    if choice.method == "cublas":
        matrix = dequantized(weight) if isinstance(weight, PackedWeight) else weight
        return _finish(_mm(values, matrix)[None], epilogue, None, 1.0)
    if choice.method in ("expand", "int_mm"):
        assert isinstance(weight, PackedWeight)
        codes = expanded(weight)
        if choice.method == "int_mm":
            return _finish(_int_mm(values, codes)[None], epilogue, weight.scale, 1.0)
        return _launch(values, _rows_of(codes, "int8", weight.scale), epilogue, choice)
    return _launch(values, _operands_of(weight, _dot(linear, values.device)), epilogue, choice)


@dataclass(frozen=True)
class _Epilogue:
    x_scale: torch.Tensor | None  # [M] or [1]
    bias: torch.Tensor | None
    residual: torch.Tensor | None

    @property
    def scaling(self) -> Literal["none", "one", "row"]:
        return "none" if self.x_scale is None else "one" if self.x_scale.numel() == 1 else "row"


@dataclass(frozen=True)
class _Weight:
    """A weight as the kernel reads it: strides in elements of a tile of 64 rows, a row and a block."""

    values: torch.Tensor
    codes: str
    arithmetic: str
    n: int
    k: int
    rows: int  # that exist in memory
    tile_stride: int
    row_stride: int
    block_stride: int
    width: int
    dots: int
    group_size: int
    scale: torch.Tensor | None = None
    multiplier: torch.Tensor | None = None

    @property
    def groups(self) -> int:
        """Of a tile's scales, or multipliers."""
        held = self.scale if self.multiplier is None else self.multiplier
        return 1 if held is None else held.shape[1]


def _operands_of(weight: PackedWeight | torch.Tensor, dot: Dot) -> _Weight:
    if isinstance(weight, torch.Tensor):
        return _rows_of(weight, "float", None)
    tiles, blocks, _, width = weight.values.shape
    values = weight.values
    if weight.codes == "int8":
        values = values.view(torch.int8)
    elif weight.codes == "fp8" and dot == "fp8":
        values = values.view(torch.float8_e4m3fn)
    return _Weight(values, weight.codes, weight.arithmetic, weight.n, weight.k, tiles * TILE,
                   blocks * TILE * width, width, TILE * width, width, weight.dots, weight.group_size, weight.scale,
                   weight.multiplier)


def _rows_of(matrix: torch.Tensor, codes: str, scale: torch.Tensor | None) -> _Weight:
    """[N, K] as it lies, one scale a row."""
    n, k = matrix.shape
    width = FLOAT_BLOCK if codes == "float" else 128
    return _Weight(matrix, codes, "row", n, k, n, TILE * k, k, width, width, 1, k, scale)


def _launch(x: torch.Tensor, weight: _Weight, epilogue: _Epilogue, choice: Choice) -> torch.Tensor:
    m, n, tile = x.shape[0], weight.n, choice.tile
    block = weight.width * weight.dots
    count, columns = segments(n, weight.k)
    length = columns // block
    split = choice.method == "split" and count > 1
    integer = x.dtype == torch.int8 and weight.arithmetic != "grouped"
    out = torch.empty((count, m, n) if split else (m, n), dtype=torch.int32 if split and integer else torch.float32,
                      device=x.device)
    programs = triton.cdiv(n, tile.rows) * triton.cdiv(m, tile.cols)
    if integer and not split:  # nothing is rounded: no need to stop
        count, length = 1, triton.cdiv(weight.k, block)
    taken = 1 if split else count
    whole = weight.k == count * length * block and length % tile.unroll == 0
    own = _Epilogue(None, None, None) if split else epilogue  # the reduction's is not compiled in here as well
    _launch_kernel(
        _linear_kernel, (programs, count if split else 1), tile,
        x, weight.values, weight.scale, weight.multiplier, own.x_scale, own.bias, own.residual, out,
        m, n, weight.k, weight.rows, weight.tile_stride, weight.row_stride, weight.block_stride,
        weight.groups,
        CODES=weight.codes, ARITHMETIC=weight.arithmetic, WIDTH=weight.width,
        SLICES=1 if weight.arithmetic == "row" else weight.group_size // weight.width,
        SCALED=weight.scale is not None, X_SCALE=own.scaling, BIAS=own.bias is not None,
        RESIDUAL=own.residual is not None, SEGMENTS=taken, LENGTH=length, SPLIT=split, MASKED=not whole,
        ASM=not interpreted(), ROWS=tile.rows, COLS=tile.cols, UNROLL=tile.unroll,
    )
    if not split:
        return out
    row_scale = weight.scale if weight.arithmetic != "grouped" else None
    return _finish(out, epilogue, row_scale, _unit(weight.codes, weight.arithmetic, integer))


def _finish(partial: torch.Tensor, epilogue: _Epilogue, row_scale: torch.Tensor | None, unit: float) -> torch.Tensor:
    """The sum over [segments, M, N] in ascending order, scaled, with bias and residual."""
    count, m, n = partial.shape
    out = torch.empty((m, n), dtype=torch.float32, device=partial.device)
    _launch_kernel(
        _reduce_kernel, (triton.cdiv(n, _REDUCE), m), Tile(1, _REDUCE),
        partial, row_scale, epilogue.x_scale, epilogue.bias, epilogue.residual, out, m, n,
        SEGMENTS=count, UNIT=unit, SCALED=row_scale is not None, X_SCALE=epilogue.scaling,
        BIAS=epilogue.bias is not None, RESIDUAL=epilogue.residual is not None, BLOCK=_REDUCE,
    )
    return out


def _unit(codes: str, arithmetic: str, integer: bool) -> float:
    """What an accumulator counts in: 4-bit integers enter as 16 times themselves, E2M1 as E4M3 of 1/64."""
    if codes == "int4":
        return 1.0 if integer and arithmetic == "two-level" else 1 / 16
    return 64.0 if codes == "fp4" else 1.0


def _mm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x · weightᵀ, accumulated and returned in float32."""
    x = x.to(weight.dtype)  # int8 and FP8 codes are exact in bfloat16
    if weight.device.type != "cuda":
        return x.float() @ weight.float().t()
    if weight.dtype == torch.float32:
        return x @ weight.t()
    return torch.mm(x, weight.t(), out_dtype=torch.float32)


def _int_mm(x: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """int32 of int8 x · codesᵀ. On a CPU without VNNI torch's own saturates; double precision holds these sums."""
    if codes.device.type != "cuda":
        return (x.double() @ codes.double().t()).int()
    return torch._int_mm(x, codes.t())


def _expand(weight: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
    out = torch.empty((weight.n, weight.k), dtype=dtype, device=weight.values.device)
    tiles, blocks, _, width = weight.values.shape
    groups = weight.scale.shape[1] if weight.multiplier is None else weight.multiplier.shape[1]
    _launch_kernel(
        _expand_kernel, (tiles, blocks), Tile(TILE, width),
        weight.values, weight.scale, weight.multiplier, out, weight.n, weight.k, blocks, groups,
        CODES=weight.codes, ARITHMETIC=weight.arithmetic, WIDTH=width, SLICES=max(weight.group_size // width, 1),
        INTEGER=dtype == torch.int8,
    )
    return out


def _launch_kernel(kernel: Any, grid: tuple[int, int], tile: Tile, *args: Any, **constants: Any) -> None:
    kernel[grid](*args, **constants, num_warps=tile.warps, num_stages=tile.stages)


@triton.jit
def _low(p, ASM: tl.constexpr):
    """int8: 16 times the two's complement low nibble. The assembler keeps four bytes in a register."""
    if ASM:
        return tl.inline_asm_elementwise("{ .reg .b32 t; shl.b32 t, $1, 4; and.b32 $0, t, 0xF0F0F0F0; }", "=r,r", [p],
                                         dtype=tl.int8, is_pure=True, pack=4)
    else:
        return (p << 4).to(tl.int8, bitcast=True)


@triton.jit
def _high(p, ASM: tl.constexpr):
    if ASM:
        return tl.inline_asm_elementwise("and.b32 $0, $1, 0xF0F0F0F0;", "=r,r", [p], dtype=tl.int8, is_pure=True,
                                         pack=4)
    else:
        return (p & 0xF0).to(tl.int8, bitcast=True)


@triton.jit
def _e4m3_low(p, ASM: tl.constexpr):
    """uint8: E4M3 of 1/64 of the low nibble's E2M1; both exponents' biases differ by 6, subnormals included."""
    if ASM:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 s, m; shl.b32 s, $1, 4; and.b32 s, s, 0x80808080; shl.b32 m, $1, 2; "
            "lop3.b32 $0, m, 0x1C1C1C1C, s, 0xEA; }", "=r,r", [p], dtype=tl.uint8, is_pure=True, pack=4)
    else:
        return ((p << 4) & 0x80) | ((p << 2) & 0x1C)


@triton.jit
def _e4m3_high(p, ASM: tl.constexpr):
    if ASM:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 s, m; and.b32 s, $1, 0x80808080; shr.u32 m, $1, 2; "
            "lop3.b32 $0, m, 0x1C1C1C1C, s, 0xEA; }", "=r,r", [p], dtype=tl.uint8, is_pure=True, pack=4)
    else:
        return (p & 0x80) | ((p >> 2) & 0x1C)


@triton.jit
def _e4m3_value(bits):
    """float32 of E4M3 bits by integer operations, which every device has. NaN is read as ±480."""
    wide = bits.to(tl.int32)
    return (((wide & 0x80) << 24) | ((wide & 0x7F) << 20)).to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120


@triton.jit
def _slice(p, HIGH: tl.constexpr, CODES: tl.constexpr, element: tl.constexpr, ASM: tl.constexpr):
    """The weights of one dot, in the type of x."""
    if p.dtype == element:  # straight from shared memory, no register in between
        return p
    elif CODES == "int4":
        w = _high(p, ASM) if HIGH else _low(p, ASM)
        return w if element == tl.int8 else w.to(element)
    elif CODES == "int8" or CODES == "float":
        return p.to(element)
    else:
        if CODES == "fp4":
            bits = _e4m3_high(p, ASM) if HIGH else _e4m3_low(p, ASM)
        else:
            bits = p
        if element == tl.float8e4nv:
            return bits.to(tl.float8e4nv, bitcast=True)
        else:
            return _e4m3_value(bits).to(element)


@triton.jit
def _dot_product(w, x, acc):
    """w · x + acc; acc None is 0."""
    if x.dtype == tl.int8:
        return tl.dot(w, x, acc, out_dtype=tl.int32)
    else:
        return tl.dot(w, x, acc, input_precision="ieee")


@triton.jit
def _accumulate(acc, products, scale, CODES: tl.constexpr):
    """A group's products, [ROWS, COLS], times its scale (or multiplier), [ROWS]."""
    if acc.dtype == tl.int32:  # two-level
        if CODES == "int4":
            products = products >> 4  # exact
        return acc + products * scale.to(tl.int32)[:, None]
    else:
        return tl.fma(products.to(tl.float32), tl.broadcast_to(scale.to(tl.float32)[:, None], acc.shape), acc)


@triton.jit
def _segment(
    w_rows, x_cols, scale_rows,  # pointers [ROWS], [COLS], [ROWS]
    inside,  # [COLS]
    first, K, block_stride,
    CODES: tl.constexpr, ARITHMETIC: tl.constexpr, WIDTH: tl.constexpr, SLICES: tl.constexpr, MASKED: tl.constexpr,
    ASM: tl.constexpr, UNROLL: tl.constexpr, LENGTH: tl.constexpr,
):
    """Σ over LENGTH blocks from the first; MASKED where those beyond K are not all there. [ROWS, COLS]"""
    ROWS: tl.constexpr = w_rows.shape[0]
    COLS: tl.constexpr = x_cols.shape[0]
    element: tl.constexpr = x_cols.dtype.element_ty
    NONE: tl.constexpr = 0.0 if element.is_floating() else 0
    TWO: tl.constexpr = CODES == "int4" or CODES == "fp4"
    DOTS: tl.constexpr = 2 if TWO else 1
    JOINT: tl.constexpr = ARITHMETIC == "row" or SLICES % DOTS == 0  # a block lies within a group
    CHAINED: tl.constexpr = ARITHMETIC == "row" and element != tl.float8e4nv  # FP8 dots keep few bits: add often
    LOADS: tl.constexpr = 1 if JOINT else 2
    TOTAL: tl.constexpr = tl.int32 if element == tl.int8 and ARITHMETIC != "grouped" else tl.float32
    acc = tl.zeros((ROWS, COLS), TOTAL)
    columns = tl.arange(0, WIDTH)
    limit = tl.minimum(K, (first + LENGTH) * (WIDTH * DOTS))
    for step in range(0, LENGTH, UNROLL):
        b = first + step
        scales = ()  # all are loaded before the first dot, so that one wait serves them
        if ARITHMETIC != "row":
            for i in tl.static_range(UNROLL * LOADS):
                piece = (b * DOTS + i * (DOTS // LOADS)) // SLICES * 64
                held = not MASKED or (b + i // LOADS) * (WIDTH * DOTS) < limit
                scales = scales + (tl.load(scale_rows + piece, mask=held, other=0),)  # type: ignore[assignment] # noqa: RUF005
        for u in tl.static_range(UNROLL):
            k = (b + u) * (WIDTH * DOTS) + columns
            wp = w_rows[:, None] + ((b + u) * block_stride + columns)[None, :]
            xp = x_cols[None, :] + k[:, None]
            if MASKED:
                p = tl.load(wp, mask=(k < limit)[None, :], other=0)
                x = tl.load(xp, mask=inside[None, :] & (k < limit)[:, None], other=NONE)
            else:
                p = tl.load(wp)
                x = tl.load(xp, mask=inside[None, :], other=NONE)
            if CHAINED:
                acc = _dot_product(_slice(p, False, CODES, element, ASM), x, acc)
            else:
                products = _dot_product(_slice(p, False, CODES, element, ASM), x, None)
            if TWO:
                if MASKED:
                    x = tl.load(xp + WIDTH, mask=inside[None, :] & (k + WIDTH < limit)[:, None], other=NONE)
                else:
                    x = tl.load(xp + WIDTH, mask=inside[None, :], other=NONE)
                high = _slice(p, True, CODES, element, ASM)
                if CHAINED:
                    acc = _dot_product(high, x, acc)
                elif JOINT:
                    products = _dot_product(high, x, products)
                else:
                    acc = _accumulate(acc, products, scales[u * LOADS], CODES)
                    products = _dot_product(high, x, None)
            if not CHAINED:
                if ARITHMETIC == "row":
                    acc = acc + products
                else:
                    acc = _accumulate(acc, products, scales[u * LOADS + LOADS - 1], CODES)
    return acc


@triton.jit
def _epilogue(total, row_scale, x_scale, bias, residual, UNIT: tl.constexpr, SCALED: tl.constexpr,
              X_SCALE: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr):
    """y of an accumulator, the other tensors broadcast to its shape. A product and a sum are one fma wherever they
    meet, so that the two kernels which end here cannot be compiled to different roundings."""
    y = total.to(tl.float32)
    if UNIT != 1:
        y = y * UNIT  # a power of two: exact
    if SCALED and X_SCALE == "none":
        factor = tl.broadcast_to(row_scale, y.shape)
    elif SCALED:
        y = y * row_scale
    if X_SCALE != "none":
        factor = tl.broadcast_to(x_scale, y.shape)
    if SCALED or X_SCALE != "none":
        if BIAS:
            y = tl.fma(y, factor, tl.broadcast_to(bias, y.shape))
            if RESIDUAL:
                y = y + residual
        elif RESIDUAL:
            y = tl.fma(y, factor, residual)
        else:
            y = y * factor
    else:
        if BIAS:
            y = y + bias
        if RESIDUAL:
            y = y + residual
    return y


@triton.jit
def _write(total, m_first, n_first, scale_ptr, x_scale_ptr, bias_ptr, residual_ptr, out_ptr, M, N,
           CODES: tl.constexpr, ARITHMETIC: tl.constexpr, SCALED: tl.constexpr, X_SCALE: tl.constexpr,
           BIAS: tl.constexpr, RESIDUAL: tl.constexpr):
    """The outputs of the accumulators [rows, columns] that begin at row m_first and column n_first of y."""
    SHIFTED: tl.constexpr = ARITHMETIC == "two-level" and total.dtype == tl.int32
    UNIT: tl.constexpr = (1 if SHIFTED else 0.0625) if CODES == "int4" else 64 if CODES == "fp4" else 1
    ROW_SCALED: tl.constexpr = SCALED and ARITHMETIC != "grouped"
    rows, columns = tl.arange(0, total.shape[0]), tl.arange(0, total.shape[1])
    n, m = n_first + rows, m_first + columns
    valid = (n < N)[:, None] & (m < M)[None, :]
    at = m_first.to(tl.int64) * N + n_first + ((columns * N)[None, :] + rows[:, None])
    row_scale, x_scale, bias, residual = total, total, total, total
    if ROW_SCALED:
        row_scale = tl.load(scale_ptr + n, mask=n < N, other=0)[:, None]
    if X_SCALE == "one":
        x_scale = tl.load(x_scale_ptr)
    elif X_SCALE == "row":
        x_scale = tl.load(x_scale_ptr + m, mask=m < M, other=0)[None, :]
    if BIAS:
        bias = tl.load(bias_ptr + n, mask=n < N, other=0)[:, None]
    if RESIDUAL:
        residual = tl.load(residual_ptr + at, mask=valid, other=0)
    y = _epilogue(total, row_scale, x_scale, bias, residual, UNIT, ROW_SCALED, X_SCALE, BIAS, RESIDUAL)
    tl.store(out_ptr + at, y, mask=valid)


@triton.jit(do_not_specialize=["M"])  # one compilation for every batch
def _linear_kernel(
    x_ptr,  # [M, K]
    w_ptr,
    scale_ptr,  # [tiles, groups or 1, 64]
    multiplier_ptr,  # [tiles, groups, 64]
    x_scale_ptr, bias_ptr,
    residual_ptr,  # [M, N]
    out_ptr,  # float32 [M, N]; SPLIT: sums of segments, [segments, M, N]
    M, N, K, w_count, tile_stride, row_stride, block_stride, groups,
    CODES: tl.constexpr, ARITHMETIC: tl.constexpr, WIDTH: tl.constexpr, SLICES: tl.constexpr, SCALED: tl.constexpr,
    X_SCALE: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, SEGMENTS: tl.constexpr, LENGTH: tl.constexpr,
    SPLIT: tl.constexpr, MASKED: tl.constexpr, ASM: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """A program has ROWS rows of W and COLS of x, over SEGMENTS of LENGTH blocks; SPLIT: each of them is a program."""
    BAND: tl.constexpr = 8  # column tiles that take turns at one row tile, so that W is read from memory once
    n_tiles, m_tiles = tl.cdiv(N, ROWS), tl.cdiv(M, COLS)
    band = tl.program_id(0) // (BAND * n_tiles)
    within = tl.program_id(0) % (BAND * n_tiles)
    height = tl.minimum(m_tiles - band * BAND, BAND)
    n_first = (within // height) * ROWS
    m_first = (band * BAND + within % height) * COLS
    offsets = tl.arange(0, ROWS)
    n = n_first + offsets
    first_tile = n_first // 64
    row = tl.minimum(n, w_count - 1)
    tile = row // 64 - first_tile
    w_rows = w_ptr + first_tile.to(tl.int64) * tile_stride + (tile * tile_stride + row % 64 * row_stride)
    m = m_first + tl.arange(0, COLS)
    inside = m < M
    x_cols = x_ptr + m_first.to(tl.int64) * K + tl.arange(0, COLS) * K
    scale_rows = w_rows
    if ARITHMETIC == "grouped":
        scale_rows = scale_ptr + first_tile.to(tl.int64) * groups * 64 + (tile * groups * 64 + row % 64)
    elif ARITHMETIC == "two-level":
        scale_rows = multiplier_ptr + first_tile.to(tl.int64) * groups * 64 + (tile * groups * 64 + row % 64)
    first = tl.program_id(1) * LENGTH
    if SEGMENTS == 1:
        total = _segment(w_rows, x_cols, scale_rows, inside, first, K, block_stride, CODES, ARITHMETIC, WIDTH, SLICES,
                         MASKED, ASM, UNROLL, LENGTH)
    else:
        total = tl.zeros((ROWS, COLS), tl.float32)
        for _ in range(SEGMENTS):
            total += _segment(w_rows, x_cols, scale_rows, inside, first, K, block_stride, CODES, ARITHMETIC, WIDTH,
                              SLICES, MASKED, ASM, UNROLL, LENGTH)
            first += LENGTH
    if SPLIT:
        at = (tl.program_id(1).to(tl.int64) * M + m_first) * N + n_first
        tl.store(out_ptr + at + ((tl.arange(0, COLS) * N)[None, :] + offsets[:, None]), total,
                 mask=(n < N)[:, None] & inside[None, :])
    elif COLS == 256:  # by quarters, or the residuals of all fill the registers
        halves = tl.split(tl.reshape(total, (ROWS, 2, COLS // 2)).permute(0, 2, 1))
        for i in tl.static_range(2):
            quarters = tl.split(tl.reshape(halves[i], (ROWS, 2, COLS // 4)).permute(0, 2, 1))
            for j in tl.static_range(2):
                _write(quarters[j], m_first + (2 * i + j) * (COLS // 4), n_first, scale_ptr, x_scale_ptr, bias_ptr,
                       residual_ptr, out_ptr, M, N, CODES, ARITHMETIC, SCALED, X_SCALE, BIAS, RESIDUAL)
    else:
        _write(total, m_first, n_first, scale_ptr, x_scale_ptr, bias_ptr, residual_ptr, out_ptr, M, N, CODES,
               ARITHMETIC, SCALED, X_SCALE, BIAS, RESIDUAL)


@triton.jit(do_not_specialize=["M"])
def _reduce_kernel(
    partial_ptr,  # int32 or float32 [SEGMENTS, M, N]
    scale_ptr, x_scale_ptr, bias_ptr, residual_ptr, out_ptr, M, N,
    SEGMENTS: tl.constexpr, UNIT: tl.constexpr, SCALED: tl.constexpr, X_SCALE: tl.constexpr, BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr, BLOCK: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = tl.program_id(1)
    valid = n < N
    place = m.to(tl.int64) * N
    stride = M.to(tl.int64) * N
    total = tl.zeros((BLOCK,), partial_ptr.dtype.element_ty)
    for segment in tl.static_range(SEGMENTS):
        total += tl.load(partial_ptr + segment * stride + place + n, mask=valid, other=0)
    row_scale, x_scale, bias, residual = total, total, total, total
    if SCALED:
        row_scale = tl.load(scale_ptr + n, mask=valid, other=0)
    if X_SCALE == "one":
        x_scale = tl.load(x_scale_ptr)
    elif X_SCALE == "row":
        x_scale = tl.load(x_scale_ptr + m)
    if BIAS:
        bias = tl.load(bias_ptr + n, mask=valid, other=0)
    if RESIDUAL:
        residual = tl.load(residual_ptr + place + n, mask=valid, other=0)
    y = _epilogue(total, row_scale, x_scale, bias, residual, UNIT, SCALED, X_SCALE, BIAS, RESIDUAL)
    tl.store(out_ptr + place + n, y, mask=valid)


@triton.jit
def _expand_kernel(w_ptr, scale_ptr, multiplier_ptr, out_ptr, N, K, blocks, groups, CODES: tl.constexpr,
                   ARITHMETIC: tl.constexpr, WIDTH: tl.constexpr, SLICES: tl.constexpr, INTEGER: tl.constexpr):
    """A tile's block, row by row: codes times multipliers (INTEGER), or the floats that they stand for."""
    tile, block = tl.program_id(0), tl.program_id(1)
    rows, columns = tl.arange(0, 64), tl.arange(0, WIDTH)
    DOTS: tl.constexpr = 2 if CODES == "int4" or CODES == "fp4" else 1
    start = (tile.to(tl.int64) * blocks + block) * (64 * WIDTH)
    p = tl.load(w_ptr + start + (rows[:, None] * WIDTH + columns[None, :]))
    if CODES == "int8":
        p = p.to(tl.int8, bitcast=True)
    for i in tl.static_range(DOTS):
        group = tl.minimum((block * DOTS + i) // SLICES, groups - 1)
        w = _slice(p, i == 1, CODES, tl.float32, False)
        if CODES == "int4":
            w = w * 0.0625
        elif CODES == "fp4":
            w = w * 64
        if ARITHMETIC == "two-level":
            w = w * tl.load(multiplier_ptr + (tile * groups + group) * 64 + rows)[:, None].to(tl.float32)
        if ARITHMETIC == "grouped":
            w = w * tl.load(scale_ptr + (tile * groups + group) * 64 + rows)[:, None].to(tl.float32)
        elif not INTEGER:
            w = w * tl.load(scale_ptr + tile * 64 + rows)[:, None]
        n = tile * 64 + rows
        k = (block * DOTS + i) * WIDTH + columns
        at = n.to(tl.int64)[:, None] * K + k[None, :]
        tl.store(out_ptr + at, w.to(out_ptr.dtype.element_ty), mask=(n < N)[:, None] & (k < K)[None, :])
