"""Exact transforms: divide a linear's input channels by a scale and give it back in the linear's own weight.

1/s goes into what produces the input: the norm before qkv and up, the v rows before o, the up rows before down.
"""

from __future__ import annotations

import torch

from fptq_runtime.config import ModelConfig
from fptq_runtime.kernels.base import Linear, Norm
from fptq_runtime.quantizer.calibrate import Kind
from fptq_runtime.quantizer.steps.base import BlockWork


def can_fold(config: ModelConfig, kind: Kind) -> bool:
    """GELU is not homogeneous, so nothing can be folded through it; silu(gate) · up is linear in up."""
    return kind != "down" or config.activation == "silu_mul"


def foldable_scale(config: ModelConfig, kind: Kind, scale: torch.Tensor) -> torch.Tensor:
    """The nearest scale that has an exact fold, never below the wanted one: query heads that read one KV head share
    its v rows, so o's scale is the largest among them. [K]"""
    if kind != "o":
        return scale
    shared = scale.reshape(config.num_kv_heads, -1, config.head_dim)  # [kv heads, sharing query heads, D]
    return shared.amax(1, keepdim=True).expand_as(shared).flatten()


def fold(work: BlockWork, kind: Kind, scale: torch.Tensor) -> None:
    """x' = x / scale for the input of `kind`, W'[:, i] = W[:, i] · scale_i; the block computes the same function.

    `scale` [K] must be what `foldable_scale` returned.
    """
    config, target = work.config, work.targets[kind]
    if target.norm is not None:
        _divide_norm(target.norm, scale)
    elif kind == "o":
        per_row = scale.reshape(config.num_kv_heads, -1, config.head_dim)[:, 0].flatten()  # [kv heads · D]
        _divide_last_rows(work, "qkv", per_row)
    else:
        _divide_last_rows(work, "up", scale)
    target.linear.weight = target.weight * scale
    target.stats.divide(scale)
    target.equalized = True


def _divide_norm(norm: Norm, scale: torch.Tensor) -> None:
    norm.weight = norm.weight / scale
    if norm.bias is not None:
        norm.bias = norm.bias / scale


def _divide_last_rows(work: BlockWork, kind: Kind, scale: torch.Tensor) -> None:
    """The v rows end q | k | v, the up rows end gate | up."""
    target = work.targets[kind]
    linear: Linear = target.linear
    divisor = torch.ones(target.weight.shape[0])
    divisor[-scale.numel():] = scale
    linear.weight = target.weight / divisor[:, None]
    if linear.bias is not None:
        linear.bias = linear.bias / divisor
