"""Exact transforms: divide a linear's input channels by a scale, or shift them, and give it back in the linear itself.

1/s goes into what produces the input: the norm before qkv and up, the v rows before o, the up rows before down.
"""

from __future__ import annotations

import torch

from fptq_runtime.config import ModelConfig
from fptq_runtime.kernels.base import Linear, Norm
from fptq_runtime.models.decoder import Block
from fptq_runtime.quantizer.calibrate import Kind
from fptq_runtime.quantizer.steps.base import BlockWork, Target, float_weight


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


def fold_block(config: ModelConfig, block: Block, kind: Kind, scale: torch.Tensor) -> None:
    """x' = x / scale for the input of `kind`, W'[:, i] = W[:, i] · scale_i; the block computes the same function.

    `scale` [K] must be what `foldable_scale` returned.
    """
    if kind == "qkv":
        _divide_norm(block.input_norm, scale)
    elif kind == "up":
        _divide_norm(block.mlp_norm, scale)
    elif kind == "o":
        per_row = scale.reshape(config.num_kv_heads, -1, config.head_dim)[:, 0].flatten()  # [kv heads · D]
        _divide_last_rows(block.qkv, per_row)
    else:
        _divide_last_rows(block.up, scale)
    reader: Linear = {"qkv": block.qkv, "o": block.o, "up": block.up, "down": block.down}[kind]
    reader.weight = float_weight(reader) * scale


def fold(work: BlockWork, kind: Kind, scale: torch.Tensor) -> None:
    """`fold_block`, and the statistics follow."""
    fold_block(work.config, work.block, kind, scale)
    work.targets[kind].stats.divide(scale)
    work.targets[kind].equalized = True


def can_shift(target: Target) -> bool:
    """The norm before it has a bias, and so has the linear: BLOOM's."""
    return target.norm is not None and target.norm.bias is not None and target.linear.bias is not None


def shift(target: Target, offset: torch.Tensor) -> None:
    """x' = x - offset [K], bias' = bias + W · offset, for a target that `can_shift`; the block computes the same
    function."""
    norm, linear = target.norm, target.linear
    assert norm is not None and norm.bias is not None and linear.bias is not None
    norm.bias = norm.bias - offset
    linear.bias = linear.bias + target.weight @ offset
    target.stats.shift(offset)


def _divide_norm(norm: Norm, scale: torch.Tensor) -> None:
    norm.weight = norm.weight / scale
    if norm.bias is not None:
        norm.bias = norm.bias / scale


def _divide_last_rows(linear: Linear, scale: torch.Tensor) -> None:
    """The v rows end q | k | v, the up rows end gate | up."""
    weight = float_weight(linear)
    divisor = torch.ones(weight.shape[0])
    divisor[-scale.numel():] = scale
    linear.weight = weight / divisor[:, None]
    if linear.bias is not None:
        linear.bias = linear.bias / divisor
