"""Pieces of a forward that many families share, over any backend's ops."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from fptq_runtime.kernels.base import Float32Array, Ops
from fptq_runtime.models.block import Attention, Block, BlockSpec, Edge, LinearSpec, NormSpec


def read(ops: Ops[Any], block: Block, x: Any, norm: str, linear: str) -> Any:
    """A linear of the normalised x."""
    reader = block.linears[linear]
    return ops.linear(ops.norm(x, block.norms[norm], reader.act), reader)


def attend(ops: Ops[Any], block: Block, qkv: Any, x: Any) -> tuple[Any, Any]:
    """What `o` reads, and x: all rows of both, or in the last block those that need logits."""
    q = ops.rope_and_cache(qkv, block.attention)
    attended = ops.attention(q, block.attention, block.linears["o"].act, block.last)
    return attended, ops.select_rows(x) if block.last else x


def mlp(ops: Ops[Any], block: Block, up: Any, residual: Any = None) -> Any:
    """`down` of the activation of what `up` made."""
    assert block.spec.activation is not None
    down = block.linears["down"]
    return ops.linear(ops.activation(up, block.spec.activation, down.act), down, residual)


def pre_norm(ops: Ops[Any], block: Block, x: Any) -> Any:
    """x + o(attention(norm(x))), then + mlp(norm of that): GPT-2's order, and nearly everyone's since."""
    attended, x = attend(ops, block, read(ops, block, x, "input_norm", "qkv"), x)
    x = ops.linear(attended, block.linears["o"], x)
    return mlp(ops, block, read(ops, block, x, "mlp_norm", "up"), x)


def parallel(ops: Ops[Any], block: Block, x: Any) -> Any:
    """x + o(attention(norm(x))) + mlp(norm(x)), behind one norm or one of its own each (GPT-J, GPT-NeoX)."""
    attended, x = attend(ops, block, read(ops, block, x, "input_norm", "qkv"), x)
    up = read(ops, block, x, "mlp_norm" if "mlp_norm" in block.norms else "input_norm", "up")
    return mlp(ops, block, up, ops.linear(attended, block.linears["o"], x))


PRE_NORM_EDGES = (Edge("input_norm", ("qkv",)), Edge("qkv", ("o",), "attention"), Edge("mlp_norm", ("up",)))
ONE_NORM_EDGES = (Edge("input_norm", ("qkv", "up")), Edge("qkv", ("o",), "attention"))
GATE = Edge("up", ("down",), "gate")


def norms_of(kind: Literal["rms", "layer"], size: int, eps: float, *, bias: bool = False, offset: float = 0.0,
             scaled: bool = True) -> Callable[[str, str], NormSpec]:
    """What makes a family's norms over [size], by name and module."""
    def norm(name: str, module: str) -> NormSpec:
        return NormSpec(name, (module,), (size,), kind, eps, bias and scaled, offset, scaled)

    return norm


def head(ops: Ops[Any], block: Block, x: Any) -> Any:
    """Logits of the normalised rows. [R, V]"""
    return read(ops, block, x, "norm", "head")


def head_spec(norm: NormSpec, module: str, vocab_size: int, hidden_size: int, bias: bool = False,
              forward: Any = head) -> BlockSpec:
    """The head: a linear behind a norm like the others."""
    return BlockSpec("", "", forward, (LinearSpec("head", (module,), (vocab_size,), hidden_size, bias),), (norm,),
                     (Edge("norm", ("head",)),))


def alibi_slopes(num_heads: int) -> Float32Array:
    """float32 [num_heads]: a geometric sequence, filled up from the next power of two (ALiBi, arXiv 2108.12409)."""
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    slopes += [2 ** (-4 * (2 * i + 1) / power) for i in range(num_heads - power)]
    return np.array(slopes, dtype=np.float32)


def halves(dim: int, rotated: int) -> np.ndarray:
    """The order of a head's dimensions in which rope's pairs, stored side by side as (2i, 2i + 1) of the first
    `rotated`, stand as (i, i + rotated / 2)."""
    return np.concatenate((np.arange(0, rotated, 2), np.arange(1, rotated, 2), np.arange(rotated, dim)))


def halves_of_qkv(attention: Attention) -> np.ndarray:
    """`halves` for every head of q and k in the rows q | k | v; those of v stay."""
    dim, rope = attention.head_dim, attention.rope
    heads = np.arange(attention.q_size + attention.kv_size).reshape(-1, dim)
    turned = heads if rope is None else heads[:, halves(dim, rope.dim)]
    return np.concatenate((turned.ravel(), np.arange(attention.kv_size) + attention.q_size + attention.kv_size))


def interleaved(num_heads: int, head_dim: int, parts: int = 3) -> np.ndarray:
    """The row order of a fused qkv that is stored as [head, (q, k, v), head_dim]."""
    return np.arange(num_heads * parts * head_dim).reshape(num_heads, parts, head_dim).swapaxes(0, 1).ravel()
