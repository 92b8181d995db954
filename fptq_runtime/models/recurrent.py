"""Blocks whose attention something recurrent replaces, behind the same norms and before the same MLP or
experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from fptq_runtime.kernels.base import Ops
from fptq_runtime.models.block import Block, BlockSpec, Edge, LinearSpec, RecurrentSpec
from fptq_runtime.models.moe import behind_norm

MAX_TAPS = 16  # of a convolution


def instead_of_attention(block: BlockSpec, forward: Callable[[Ops[Any], Block, Any], Any],
                         linears: Sequence[LinearSpec], edges: Sequence[Edge], recurrent: Sequence[RecurrentSpec]
                         ) -> BlockSpec:
    """`llama_like`'s block with these in place of qkv and o; the last of the linears writes the residual stream."""
    replaced = {"qkv", "o"}
    return replace(
        block, forward=forward, attention=None, recurrent=tuple(recurrent),
        linears=(*linears, *(linear for linear in block.linears if linear.name not in replaced)),
        edges=(*edges, *(edge for edge in block.edges if not replaced & {edge.writer, *edge.readers})),
        residual=(linears[-1].name, *(name for name in block.residual if name not in replaced)),
    )


def leaving(ops: Ops[Any], block: Block, x: Any) -> Any:
    """x, or in the last block those rows of it that need logits."""
    return ops.select_rows(x) if block.last else x


def out_and_mlp(ops: Ops[Any], block: Block, out: str, made: Any, x: Any) -> Any:
    """x + out(made), then + the MLP or the experts of norm(that)."""
    linear = block.linears[out]
    return behind_norm(ops, block, ops.linear(ops.quantize(made, linear.act), linear, x))
