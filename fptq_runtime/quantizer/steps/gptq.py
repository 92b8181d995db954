"""GPTQ (arXiv 2210.17323): weights rounded column after column, each rounding error made up for by the columns left."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from pydantic import Field, PositiveFloat

from fptq_runtime.artifact.numerics import dequantize, quantize_weight
from fptq_runtime.kernels.reference import quantize_activations
from fptq_runtime.quantizer.calibrate import Kind, block_inputs, head_inputs
from fptq_runtime.quantizer.steps.base import BlockWork, HeadWork, QuantizationError, Target
from fptq_runtime.quantizer.steps.weights import Weights, search_clip

COLUMNS = 128  # rounded one by one before their errors go into a matrix product
DAMP_RAISES = 3


class Gptq(Weights):
    """Find the codes of the least |(W - Ŵ)x|² over the inputs as they will be read, instead of the nearest ones.

    act_order: the columns with the largest inputs are rounded first, while most others are left to make up for them.
    Each group's scale is fixed before and columns keep their groups, so the artifact's layout stays.
    damp: of the Hessian's mean diagonal, added to its diagonal; ten times as much, up to three times over, where the
    Hessian is not positive definite, which the layer's reason then says.
    refits: how often the scales are fitted to the codes by least squares, and the weights rounded again with them.
    """

    type: Literal["gptq"] = "gptq"  # type: ignore[assignment]
    clip: Literal["none", "mse"] = "mse"
    act_order: bool = True
    damp: PositiveFloat = 0.01
    refits: int = Field(default=0, ge=0, le=10)

    def apply(self, work: BlockWork) -> None:
        for kind, hessian in _hessians(block_inputs(work.states, work.block)).items():
            work.targets[kind].hessian = hessian
        super().apply(work)

    def apply_head(self, work: HeadWork) -> None:
        if self.head_bits == 4:
            act = work.target.linear.act
            inputs = head_inputs(work.states, work.head)
            work.target.hessian = _hessians({"head": quantize_activations(x, act)} for x in inputs)["head"]
        super().apply_head(work)

    def _round(self, target: Target, num_bits: Literal[4, 8], group: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        if target.hessian is None:
            return super()._round(target, num_bits, group)
        hessian, target.hessian = target.hessian, None
        importance = hessian.diagonal().clone()
        dead = importance == 0
        weight = target.weight.masked_fill(dead, 0)
        hessian.diagonal()[dead] = 1
        clip = target.clip
        if clip is None and self.clip == "mse":
            clip = search_clip(weight, importance, num_bits, group)
        scale = quantize_weight(weight, num_bits, group, clip, torch.bfloat16)[1]
        order = importance.argsort(descending=True, stable=True) if self.act_order else torch.arange(len(importance))
        factor = self._factor(target, hessian[order][:, order])
        codes = round_columns(weight, scale, num_bits, factor, order)
        for _ in range(self.refits):
            scale = fit_scale(weight, codes, scale, hessian)
            codes = round_columns(weight, scale, num_bits, factor, order)
        return codes, scale

    def _factor(self, target: Target, hessian: torch.Tensor) -> torch.Tensor:
        """R of `triangular_factor`, damped."""
        damp = self.damp * float(hessian.diagonal().mean())
        for raised in range(DAMP_RAISES + 1):
            try:
                factor = triangular_factor(hessian, damp * 10**raised)
            except torch.linalg.LinAlgError:
                continue
            if raised:
                target.reason += f"; Hessian damped by {self.damp * 10**raised:g}"
            return factor
        raise QuantizationError(f"{target.linear.name}: the Hessian of its inputs is not positive definite, even "
                                f"damped by {self.damp * 10**DAMP_RAISES:g}; calibrate on more text, or use 'weights'")


def triangular_factor(hessian: torch.Tensor, damp: float) -> torch.Tensor:
    """R, upper triangular, with R·Rᵀ = H + damp·I. Raises LinAlgError. [K, K], decomposed in double precision"""
    flipped = hessian.flip(0, 1).double()
    flipped.diagonal().add_(damp)
    return torch.linalg.cholesky(flipped).flip(0, 1).float()


def round_columns(weight: torch.Tensor, scale: torch.Tensor, num_bits: int, factor: torch.Tensor,
                  order: torch.Tensor) -> torch.Tensor:
    """Codes [N, K] int8 for weight [N, K] and scale [N, G]; factor [K, K] is of the Hessian with columns in `order`.

    With e = w - ŵ the squared error e·R·Rᵀ·eᵀ is a sum of squares, one a column, each of that column's error and those
    before it. So w_j + Σ_{i<j} e_i·R_ij / R_jj is what column j should be: GPTQ's own update without an inverse
    (arXiv 2507.18553).
    """
    n, k = weight.shape
    limit = 2 ** (num_bits - 1)
    wanted = weight.T[order]  # [K, N], so that a column lies together
    scales = scale.float().T[order // (k // scale.shape[1])]
    feedback = factor / factor.diagonal()
    codes = torch.empty(k, n, dtype=torch.int8)
    errors = torch.empty(k, n)
    for start in range(0, k, COLUMNS):
        end = min(start + COLUMNS, k)
        carried = feedback[:start, start:end].T @ errors[:start]  # [columns, N]
        for j in range(start, end):
            w = wanted[j] + carried[j - start] + feedback[start:j, j] @ errors[start:j]
            codes[j] = (w / scales[j]).round_().clamp_(-limit, limit - 1)
            errors[j] = wanted[j] - codes[j] * scales[j]
    restored = torch.empty_like(codes)
    restored[order] = codes
    return restored.T.contiguous()


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
    left.diagonal(dim1=1, dim2=2).add_(1e-4 * left.diagonal(dim1=1, dim2=2).mean(-1, keepdim=True) + 1e-12)
    fitted = scale.float() + torch.linalg.solve(left, right)
    return torch.where(fitted > 0, fitted, scale.float()).to(scale.dtype)


def _hessians(inputs: Iterable[Mapping[Kind, torch.Tensor]]) -> dict[Kind, torch.Tensor]:
    """Σ 2xxᵀ of each linear's inputs, which come in minibatches [rows, K]. Each [K, K]"""
    hessians: dict[Kind, torch.Tensor] = {}
    for batch in inputs:
        for kind, x in batch.items():
            if kind not in hessians:
                hessians[kind] = torch.zeros(x.shape[1], x.shape[1])
            hessians[kind].addmm_(x.T, x, alpha=2)
    return hessians
