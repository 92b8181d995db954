"""GPTQ (arXiv 2210.17323): weights rounded column after column, each rounding error made up for by the columns left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field, PositiveFloat, model_validator

from fptq_runtime.artifact.numerics import dequantize, quantize
from fptq_runtime.artifact.scheme import NumberType
from fptq_runtime.models.block import Block
from fptq_runtime.quantizer.calibrate import add_moments, block_inputs, paired_inputs
from fptq_runtime.quantizer.steps.base import BlockWork, QuantizationError, Target
from fptq_runtime.quantizer.steps.weights import Weights

COLUMNS = 128  # rounded one by one before their errors go into a matrix product
DAMP_RAISES = 3


class Gptq(Weights):
    """Find the codes of the least |(W - Ŵ)x|² over the inputs as they will be read, instead of the nearest ones.

    act_order: the columns with the largest inputs are rounded first, while most others are left to make up for them.
    Each group's scale is fixed before and columns keep their groups, so the artifact's layout stays.
    damp: of the Hessian's mean diagonal, added to its diagonal; ten times as much, up to three times over, where the
    Hessian is not positive definite, which the layer's reason then says.
    refits: how often the scales are fitted to the codes by least squares, and the weights rounded again with them.
    descents: how often then, column after column, each code becomes the best given all others, and with `refits` the
    scales are fitted again.
    asymmetric: aim for what the float model has at that place, W x̃, rather than W x (GPTAQ, arXiv 2504.02692), and go
    so much of the way there: one more pass over the calibration samples. Several linears of a block answer for the same
    drift, so that all of the way (true) suits `sequential` and many samples alone. drift_damp: `damp` of that fit, for
    the drift is known less well than the inputs.
    sequential: observe what each linear reads after those before it in its block, and the inputs' codes, are rounded;
    about two more passes, or four with `asymmetric`. Otherwise x is what the float block makes of what the quantized
    blocks before it give.
    """

    type: Literal["gptq"] = "gptq"  # type: ignore[assignment]
    clip: Literal["none", "mse"] = "mse"
    act_order: bool = True
    damp: PositiveFloat = 0.01
    refits: int = Field(default=0, ge=0, le=10)
    descents: int = Field(default=0, ge=0, le=20)
    asymmetric: float = Field(default=0.0, ge=0, le=1)
    drift_damp: PositiveFloat = 0.1
    sequential: bool = False

    @model_validator(mode="after")
    def _refittable(self) -> Gptq:
        if self.refits and self.scales != "float":
            raise ValueError(f"refits finds scales of any size; scales {self.scales!r} goes with refits 0")
        return self

    @property
    def wants_exact(self) -> bool:
        return self.asymmetric > 0

    @property
    def reads_inputs(self) -> bool:
        return True

    def wants_moments(self, head: bool) -> bool:
        return self.head_bits == 4 if head else not self.sequential

    def products(self, n: int, k: int, rows: int) -> float:
        moments = rows * k * k * (0.5 + self.wants_exact)
        again = (2 + 2 * self.wants_exact) * rows * n * k if self.sequential else 0
        rounding = k * k * (n * (1 + 2 * self.wants_exact + 3 * (self.refits + self.descents)) + k)
        return super().products(n, k, rows) + moments + again + rounding

    def moments_bytes(self, k: int) -> int:
        return 4 * k * k * (1 + self.wants_exact)

    def apply(self, work: BlockWork) -> None:
        exact = work.block.with_linears(lambda name, linear: replace(linear, act=None))  # before they are quantized
        if not self.sequential:
            self._observe(work, exact, [name for name, target in work.targets.items() if not target.has_moments])
        for name, target in work.targets.items():
            if self.sequential:
                self._observe(work, exact, [name])
            self._quantize(target)

    def _observe(self, work: BlockWork, exact: Block, names: Sequence[str]) -> None:
        """The moments of what these linears read as the block is, and as `exact` is."""
        if not names:
            return
        for stats in (part for name in names for part in work.targets[name].stats.parts()):
            stats.moments = None
        exactly = None if work.exact is None else block_inputs(work.exact, exact, names)
        for read, wanted in paired_inputs(block_inputs(work.states, work.block, names), exactly):
            for name, rows in read.items():
                for stats, own in zip(work.targets[name].stats.parts(), rows.experts(), strict=True):
                    if len(own.x):
                        add_moments(stats, own, None if rows.counts else wanted.get(name))

    def _round(self, target: Target) -> tuple[torch.Tensor, torch.Tensor]:
        moments, target.stats.moments = target.stats.moments, None  # as large as the weights, or larger
        if moments is None:
            return super()._round(target)
        hessian = moments.hessian.triu() + moments.hessian.triu(1).T
        importance = hessian.diagonal().clone()
        dead = importance == 0
        hessian.diagonal()[dead] = 1
        order = importance.argsort(descending=True, stable=True) if self.act_order else torch.arange(len(importance))
        factor = self._factor(target, hessian[order][:, order], self.damp)
        weight = target.weight
        if moments.drift is not None:
            made_up = solve(self._factor(target, hessian, self.drift_damp), weight @ moments.drift)
            weight = weight + self.asymmetric * made_up
        weight = weight.masked_fill(dead, 0)
        _, scale = self._nearest(target, weight, importance)
        num_bits = target.rounding.num_bits
        codes = round_columns(weight, scale, num_bits, factor, order, self.grid)
        for _ in range(self.refits):
            scale = fit_scale(weight, codes, scale, hessian)
            codes = round_columns(weight, scale, num_bits, factor, order, self.grid)
        for _ in range(self.descents):
            codes = descend(weight, codes, scale, num_bits, hessian, self.grid)
            if self.refits:
                scale = fit_scale(weight, codes, scale, hessian)
        return codes, scale

    @staticmethod
    def _factor(target: Target, hessian: torch.Tensor, share: float) -> torch.Tensor:
        """R of `triangular_factor`, damped by that share of the mean diagonal."""
        damp = share * float(hessian.diagonal().mean())
        for raised in range(DAMP_RAISES + 1):
            factor = triangular_factor(hessian, damp * 10**raised)
            if factor is not None:
                if raised:
                    target.reason += f"; Hessian damped by {share * 10**raised:g}"
                return factor
        raise QuantizationError(f"{target.linear.name}: the Hessian of its inputs is not positive definite, even "
                                f"damped by {share * 10**DAMP_RAISES:g}; calibrate on more text, or use 'weights'")


def triangular_factor(hessian: torch.Tensor, damp: float) -> torch.Tensor | None:
    """R, upper triangular, with R·Rᵀ = H + damp·I, or None where that is not positive definite. [K, K], decomposed in
    double precision"""
    flipped = hessian.flip(0, 1).double()
    flipped.diagonal().add_(damp)
    lower, failed = torch.linalg.cholesky_ex(flipped)
    return None if int(failed) else lower.flip(0, 1).float()


def solve(factor: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """X with X · R · Rᵀ = right. [N, K]"""
    half: torch.Tensor = torch.linalg.solve_triangular(factor.T, right, upper=False, left=False)
    solution: torch.Tensor = torch.linalg.solve_triangular(factor, half, upper=True, left=False)
    return solution


def round_columns(weight: torch.Tensor, scale: torch.Tensor, num_bits: int, factor: torch.Tensor,
                  order: torch.Tensor, grid: NumberType = "int") -> torch.Tensor:
    """Codes [N, K] on the grid for weight [N, K] and scale [N, G]; factor [K, K] is of the Hessian with its columns in
    `order`.

    With e = w - ŵ the squared error e·R·Rᵀ·eᵀ is a sum of squares, one a column, each of that column's error and those
    before it. So w_j + Σ_{i<j} e_i·R_ij / R_jj is what column j should be: GPTQ's own update without an inverse
    (arXiv 2507.18553).
    """
    n, k = weight.shape
    wanted = weight.T[order]  # [K, N], so that a column lies together
    scales = scale.float().T[order // (k // scale.shape[1])]
    feedback = factor / factor.diagonal()
    codes = torch.empty(k, n)
    errors = torch.empty(k, n)
    for start in range(0, k, COLUMNS):
        end = min(start + COLUMNS, k)
        carried = feedback[:start, start:end].T @ errors[:start]  # [columns, N]
        for j in range(start, end):
            w = wanted[j] + carried[j - start] + feedback[start:j, j] @ errors[start:j]
            codes[j] = quantize(w, scales[j], num_bits, grid)
            errors[j] = wanted[j] - codes[j] * scales[j]
    return codes[order.argsort()].T.to(torch.int8 if grid == "int" else torch.float8_e4m3fn).contiguous()


def descend(weight: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, num_bits: int, hessian: torch.Tensor,
            grid: NumberType = "int") -> torch.Tensor:
    """Codes [N, K] of no more squared error: each the best of the grid, given those of all other columns (coordinate
    descent, as in QuantEase, arXiv 2309.01885). `hessian` has no zero on its diagonal."""
    k = weight.shape[1]
    chosen = codes.float().T.contiguous()  # [K, N], so that a column lies together
    scales = scale.float().T.repeat_interleave(k // scale.shape[1], 0)
    errors = weight.T - chosen * scales
    for start in range(0, k, COLUMNS):
        end = min(start + COLUMNS, k)
        slopes = hessian[start:end] @ errors  # [columns, N]
        for j in range(start, end):
            old = chosen[j] * scales[j]
            chosen[j] = quantize(old + slopes[j - start] / hessian[j, j], scales[j], num_bits, grid)
            moved = chosen[j] * scales[j] - old
            errors[j] -= moved
            slopes[j - start :] -= hessian[j:end, j, None] * moved
    return chosen.T.to(codes.dtype).contiguous()


def fit_scale(weight: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """The scale [N, G] of the least error for these codes, each row's own least squares over its groups."""
    n, k = weight.shape
    groups = scale.shape[1]
    size = k // groups
    c = codes.float()
    error = weight - dequantize(codes, scale)
    right = (c * (error @ hessian)).reshape(n, groups, size).sum(-1)
    left = torch.stack([
        (c * (c[:, g : g + size] @ hessian[g : g + size])).reshape(n, groups, size).sum(-1) for g in range(0, k, size)
    ], 1)  # [N, G, G]
    # Damped towards the scale as it is, where the codes say nothing about it.
    left.diagonal(dim1=1, dim2=2).add_(1e-4 * left.diagonal(dim1=1, dim2=2).mean(-1, keepdim=True) + 1e-12)
    fitted = scale.float() + torch.linalg.solve(left, right)
    return torch.where(fitted > 0, fitted, scale.float()).to(scale.dtype)
