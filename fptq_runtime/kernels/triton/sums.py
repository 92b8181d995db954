"""What a linear that is split over K leaves, and how whoever reads it adds it up: in the kernel that follows, where
that is a norm or rope, or in one of its own."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

_REDUCE = 1024  # outputs a program of the reduction


class Sums:
    """Sums of segments, int32 or float32 [segments, M, N], and what makes y float32 [M, N] of them: y = Σ · unit ·
    row_scale [N] · x_scale [M] or [1] + bias [N] + residual [M, N]."""

    def __init__(self, partial: torch.Tensor, row_scale: torch.Tensor | None, x_scale: torch.Tensor | None,
                 bias: torch.Tensor | None, residual: torch.Tensor | None, unit: float) -> None:
        self._partial = partial
        self._row_scale, self._x_scale, self._bias, self._residual = row_scale, x_scale, bias, residual
        self._unit = unit
        self._value: torch.Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        return self._partial.shape[1:]

    @property
    def value(self) -> torch.Tensor:
        """y, added up in a kernel of its own unless another has written it."""
        if self._value is None:
            rows, width = self.shape
            self._value = torch.empty((rows, width), dtype=torch.float32, device=self._partial.device)
            _reduce_kernel[(triton.cdiv(width, _REDUCE), rows)](out=self._value, width=width, **arguments(self, False),
                                                                BLOCK=_REDUCE, num_warps=4)
        return self._value

    def written(self) -> torch.Tensor | None:
        """Where the kernel that reads this first puts y; None where it is there."""
        if self._value is not None:
            return None
        self._value = torch.empty(self.shape, dtype=torch.float32, device=self._partial.device)
        return self._value


def arguments(x: torch.Tensor | Sums, known: bool = True) -> dict[str, Any]:
    """What `summed` reads in a kernel that takes x. known: y itself, if there is one."""
    if isinstance(x, Sums) and known and x._value is not None:
        x = x._value
    if isinstance(x, torch.Tensor):
        return {"y_sums": x, "y_row_scale": None, "y_x_scale": None, "y_bias": None, "y_residual": None,
                "rows": x.shape[0], "SEGMENTS": 0, "UNIT": 1.0, "X_SCALE": "none"}
    scaling = "none" if x._x_scale is None else "one" if x._x_scale.numel() == 1 else "row"
    return {"y_sums": x._partial, "y_row_scale": x._row_scale, "y_x_scale": x._x_scale, "y_bias": x._bias,
            "y_residual": x._residual, "rows": x.shape[0], "SEGMENTS": x._partial.shape[0], "UNIT": x._unit,
            "X_SCALE": scaling}


@triton.jit
def epilogue(total, row_scale, x_scale, bias, residual, UNIT: tl.constexpr, SCALED: tl.constexpr,
              X_SCALE: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr):
    """y of an accumulator, the other tensors broadcast to its shape. A product and a sum are one fma wherever they
    meet, so that the kernels which end here cannot be compiled to different roundings."""
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
def summed(m, n, mask, y_sums, y_row_scale, y_x_scale, y_bias, y_residual, rows, width, SEGMENTS: tl.constexpr,
           UNIT: tl.constexpr, X_SCALE: tl.constexpr):
    """y at rows m and columns n, which broadcast to the mask's shape; SEGMENTS 0: it is y_sums."""
    place = m.to(tl.int64) * width + n
    if SEGMENTS == 0:
        return tl.load(y_sums + place, mask=mask, other=0.0)
    else:
        stride = rows.to(tl.int64) * width
        total = tl.zeros(mask.shape, y_sums.dtype.element_ty)
        for segment in tl.static_range(SEGMENTS):
            total += tl.load(y_sums + segment * stride + place, mask=mask, other=0)
        row_scale, x_scale, bias, residual = total, total, total, total
        if y_row_scale is not None:
            row_scale = tl.load(y_row_scale + n, mask=mask, other=0)
        if X_SCALE == "one":
            x_scale = tl.load(y_x_scale)
        elif X_SCALE == "row":
            x_scale = tl.load(y_x_scale + m)
        if y_bias is not None:
            bias = tl.load(y_bias + n, mask=mask, other=0)
        if y_residual is not None:
            residual = tl.load(y_residual + place, mask=mask, other=0)
        return epilogue(total, row_scale, x_scale, bias, residual, UNIT, y_row_scale is not None, X_SCALE,
                        y_bias is not None, y_residual is not None)


@triton.jit(do_not_specialize=["rows"])
def _reduce_kernel(out, y_sums, y_row_scale, y_x_scale, y_bias, y_residual, rows, width, SEGMENTS: tl.constexpr,
                   UNIT: tl.constexpr, X_SCALE: tl.constexpr, BLOCK: tl.constexpr):
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = tl.program_id(1)
    y = summed(m, n, n < width, y_sums, y_row_scale, y_x_scale, y_bias, y_residual, rows, width, SEGMENTS, UNIT,
               X_SCALE)
    tl.store(out + m.to(tl.int64) * width + n, y, mask=n < width)
