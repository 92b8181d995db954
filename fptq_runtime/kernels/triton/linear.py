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

from fptq_runtime.kernels.base import ActivationQuant, Array, Linear, QuantizedWeight
from fptq_runtime.kernels.reference import to_torch
from fptq_runtime.kernels.triton.adapters import DeviceAdapters
from fptq_runtime.kernels.triton.choice import Case, Choice, Dot, Kind, Tile, choose, segments
from fptq_runtime.kernels.triton.device import capability
from fptq_runtime.kernels.triton.linear_kernels import expand_kernel, linear_kernel
from fptq_runtime.kernels.triton.packing import TILE, Arithmetic, PackedWeight, pack_weight
from fptq_runtime.kernels.triton.sums import Sums
from fptq_runtime.kernels.triton.values import Quantized, interpreted

FLOAT_BLOCK = 64  # columns of K a step takes of a float weight


@dataclass(frozen=True)
class DeviceLinear:
    """A linear on the device. weight: packed, or float [N, K] as it was stored; bias float32 [N]."""

    name: str
    weight: PackedWeight | torch.Tensor
    bias: torch.Tensor | None
    act: ActivationQuant | None
    low_rank: tuple[DeviceLinear, DeviceLinear] | None = None  # down, up
    adapters: DeviceAdapters | None = None

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
    """`queue_linear`, added up."""
    y = queue_linear(x, linear, residual, invariant)
    return y.value if isinstance(y, Sums) else y


def queue_linear(x: torch.Tensor | Quantized, linear: DeviceLinear, residual: torch.Tensor | None,
                 invariant: bool) -> torch.Tensor | Sums:
    """x · Wᵀ + bias + residual, float32 [M, N], or its sums where it is split over K. x: Quantized where the linear has
    `act`, else float32 [M, K], which a bfloat16 or quantized weight reads as bfloat16 and a float16 one as float16, its
    finite range.

    invariant: a row has the same bits whatever M and the other rows. Else large M may go through cuBLAS.
    """
    choice = choose(kind(linear, x), _rows(x), linear.n, linear.k, capability(_tensor(x).device), invariant)
    return _queue(x, linear, residual, choice, invariant)


def run_choice(x: torch.Tensor | Quantized, linear: DeviceLinear, residual: torch.Tensor | None, choice: Choice,
               invariant: bool = True) -> torch.Tensor:
    """`run_linear` with the kernel and tiles of one's own choice, for a sweep; low-rank factors choose theirs."""
    y = _queue(x, linear, residual, choice, invariant)
    return y.value if isinstance(y, Sums) else y


def _queue(x: torch.Tensor | Quantized, linear: DeviceLinear, residual: torch.Tensor | None, choice: Choice,
           invariant: bool) -> torch.Tensor | Sums:
    if isinstance(x, Quantized) != (linear.act is not None):
        wants = "a float" if linear.act is None else "a quantized"
        raise ValueError(f"{linear.name} wants {wants} input")
    if _rows(x) == 0:
        return torch.empty((0, linear.n), dtype=torch.float32, device=_tensor(x).device)
    y = _product(x, linear, residual, choice)
    if linear.low_rank is None:
        return y
    down, up = linear.low_rank
    return queue_linear(run_linear(x, down, None, invariant), up, y.value if isinstance(y, Sums) else y, invariant)


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
             choice: Choice) -> torch.Tensor | Sums:
    """Without the low-rank factors."""
    values, x_scale = _operand(x, linear)
    weight = linear.weight
    epilogue = _Epilogue(x_scale, linear.bias, residual)
    if choice.method == "cublas":
        matrix = dequantized(weight) if isinstance(weight, PackedWeight) else weight
        return _sums(_mm(values, matrix)[None], epilogue, None, 1.0)
    if choice.method == "int_mm":
        assert isinstance(weight, PackedWeight)
        return _sums(_int_mm(values, expanded(weight))[None], epilogue, weight.scale, 1.0)
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
        n, k = weight.shape
        return _Weight(weight, "float", "row", n, k, n, TILE * k, k, FLOAT_BLOCK, FLOAT_BLOCK, 1, k)
    tiles, blocks, _, width = weight.values.shape
    values = weight.values
    if weight.codes == "int8":
        values = values.view(torch.int8)
    elif weight.codes == "fp8" and dot == "fp8":
        values = values.view(torch.float8_e4m3fn)
    return _Weight(values, weight.codes, weight.arithmetic, weight.n, weight.k, tiles * TILE,
                   blocks * TILE * width, width, TILE * width, width, weight.dots, weight.group_size, weight.scale,
                   weight.multiplier)


def _launch(x: torch.Tensor, weight: _Weight, epilogue: _Epilogue, choice: Choice) -> torch.Tensor | Sums:
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
        linear_kernel, (programs, count if split else 1), tile, x_ptr=x, w_ptr=weight.values, scale_ptr=weight.scale,
        multiplier_ptr=weight.multiplier, x_scale_ptr=own.x_scale, bias_ptr=own.bias, residual_ptr=own.residual,
        out_ptr=out, M=m, N=n, K=weight.k, w_count=weight.rows, tile_stride=weight.tile_stride,
        row_stride=weight.row_stride, block_stride=weight.block_stride, groups=weight.groups,
        CODES=weight.codes, ARITHMETIC=weight.arithmetic, WIDTH=weight.width,
        SLICES=1 if weight.arithmetic == "row" else weight.group_size // weight.width,
        SCALED=weight.scale is not None, X_SCALE=own.scaling, BIAS=own.bias is not None,
        RESIDUAL=own.residual is not None, SEGMENTS=taken, LENGTH=length, SPLIT=split, MASKED=not whole,
        ROWS=tile.rows, COLS=tile.cols, UNROLL=tile.unroll,
    )
    if not split:
        return out
    row_scale = weight.scale if weight.arithmetic != "grouped" else None
    return _sums(out, epilogue, row_scale, _unit(weight.codes, weight.arithmetic, integer))


def _sums(partial: torch.Tensor, epilogue: _Epilogue, row_scale: torch.Tensor | None, unit: float) -> Sums:
    return Sums(partial, row_scale, epilogue.x_scale, epilogue.bias, epilogue.residual, unit)


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
        expand_kernel, (tiles, blocks), Tile(TILE, width),
        w_ptr=weight.values, scale_ptr=weight.scale, multiplier_ptr=weight.multiplier, out_ptr=out, N=weight.n,
        K=weight.k, blocks=blocks, groups=groups,
        CODES=weight.codes, ARITHMETIC=weight.arithmetic, WIDTH=width, SLICES=max(weight.group_size // width, 1),
        INTEGER=dtype == torch.int8,
    )
    return out


def _launch_kernel(kernel: Any, grid: tuple[int, int], tile: Tile, **arguments: Any) -> None:
    kernel[grid](**arguments, num_warps=tile.warps, num_stages=tile.stages)
