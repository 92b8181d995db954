"""Exact transforms: divide a linear's input channels by a scale, or shift them, and give it back in the linears that
read them. The block's edges say where 1/s goes: into the norm before, or into the rows that write the input."""

from __future__ import annotations

import torch

from fptq_runtime.kernels.base import Linear, Norm
from fptq_runtime.kernels.reference import to_numpy
from fptq_runtime.models.block import Attention, Block, Edge, Model
from fptq_runtime.models.readout import Basis
from fptq_runtime.quantizer.steps.base import BlockWork, QuantizationError, Target, float_weight


def foldable_scale(block: Block, reader: str, scale: torch.Tensor) -> torch.Tensor:
    """The nearest scale that has an exact fold, never below the wanted one: query heads that read one KV head share
    its v rows, so o's scale is the largest among them. [K]"""
    edge = block.spec.edge(reader)
    if edge is None or edge.through != "attention":
        return scale
    shared = by_heads(block, scale)
    return shared.amax(1, keepdim=True).expand_as(shared).flatten()


def fold_block(block: Block, reader: str, scale: torch.Tensor) -> None:
    """x' = x / scale for the input of linear `reader`, W'[:, i] = W[:, i] · scale_i in all that read it; the block
    computes the same function.

    `scale` [K] must be what `foldable_scale` returned, and the reader must have an edge.
    """
    edge = block.spec.edge(reader)
    assert edge is not None
    if block.bases is not None:
        divided = {name: block.bases.get(name, Basis()).divided(to_numpy(scale)) for name in edge.readers}
        block.bases = {**block.bases, **divided}
    if edge.through is None:
        _divide_norm(block.norms[edge.writer], scale)
    else:
        divide_rows(block.linears[edge.writer], per_row(block, edge, scale))
    for name in edge.readers:
        linear = block.linears[name]
        linear.weight = float_weight(linear) * scale


def fold(work: BlockWork, reader: str, scale: torch.Tensor) -> None:
    """`fold_block`, and the statistics follow."""
    fold_block(work.block, reader, scale)
    edge = work.block.spec.edge(reader)
    assert edge is not None
    for name in edge.readers:
        if name in work.targets:
            work.targets[name].stats.divide(scale)
    work.targets[reader].equalized = True


def refuse_without_norms(step: str, model: Model) -> None:
    """Raise QuantizationError where no norm writes what a block's linear reads, so that `step` has nothing to fold."""
    if not any(edge.through is None for block in model.blocks for edge in block.edges):
        raise QuantizationError(f"{step} does not work on {model.config.architecture}: its linears read the residual "
                                "stream, not a norm that could take their scales; leave the step out")


def by_heads(block: Block, x: torch.Tensor) -> torch.Tensor:
    """x [heads · D] as [KV heads, query heads that share one, D]."""
    attention = block.spec.attention
    assert isinstance(attention, Attention)
    return x.reshape(attention.num_kv_heads, -1, attention.value_size // attention.num_kv_heads)


def per_row(block: Block, edge: Edge, scale: torch.Tensor) -> torch.Tensor:
    """What the writer's last rows are divided by where the readers' inputs are divided by `scale` [K]."""
    return by_heads(block, scale)[:, 0].flatten() if edge.through == "attention" else scale


def can_shift(work: BlockWork, target: Target) -> bool:
    """The norm before it has a bias, and so has every linear that reads it."""
    norm = work.norm(target)
    edge = work.block.spec.edge(target.name)
    if norm is None or norm.bias is None or edge is None:
        return False
    return all(work.block.linears[name].bias is not None for name in edge.readers)


def shift(work: BlockWork, target: Target, offset: torch.Tensor) -> None:
    """x' = x - offset [K], bias' = bias + W · offset, for a target that `can_shift`; the block computes the same
    function."""
    norm, edge = work.norm(target), work.block.spec.edge(target.name)
    assert norm is not None and norm.bias is not None and edge is not None
    norm.bias = norm.bias - offset
    work.block.bases = None
    for name in edge.readers:
        linear = work.block.linears[name]
        linear.bias = linear.bias + float_weight(linear) @ offset
        if name in work.targets:
            work.targets[name].stats.shift(offset)


def _divide_norm(norm: Norm, scale: torch.Tensor) -> None:
    norm.weight = norm.weight / scale
    if norm.bias is not None:
        norm.bias = norm.bias / scale


def divide_rows(linear: Linear, scale: torch.Tensor) -> None:
    """The last rows, as many as `scale` has: v rows end q | k | v, up rows end gate | up."""
    weight = float_weight(linear)
    divisor = torch.ones(weight.shape[0])
    divisor[-scale.numel():] = scale
    linear.weight = weight / divisor[:, None]
    if linear.bias is not None:
        linear.bias = linear.bias / divisor
