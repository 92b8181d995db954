"""The network, written once: a dense pre-norm decoder over `Ops`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from fptq_runtime.config import ModelConfig
from fptq_runtime.kernels.base import (
    Activation,
    ActivationQuant,
    Backend,
    Ops,
    V,
)

ACTIVATIONS = {"silu_mul": Activation("silu", gated=True), "gelu_tanh": Activation("gelu_tanh")}


@dataclass
class Block:
    """One layer's parameters: `Linear`, `Norm` and `AttentionSpec`, or what a backend made of them.

    qkv stacks the rows of q, k and v; up stacks gate and up where the MLP is gated. The four `*_act` are kept beside
    the linears because the op *before* a linear quantizes its input.
    """

    input_norm: Any
    qkv: Any
    attention: Any
    o: Any
    mlp_norm: Any
    up: Any
    down: Any
    qkv_act: ActivationQuant | None = None
    o_act: ActivationQuant | None = None
    up_act: ActivationQuant | None = None
    down_act: ActivationQuant | None = None


@dataclass
class Stem:
    """What comes before the first block; `norm` is BLOOM's embedding LayerNorm."""

    embedding: Any
    norm: Any | None = None


@dataclass
class Head:
    norm: Any
    lm_head: Any
    act: ActivationQuant | None = None


def prepare_stem(stem: Stem, backend: Backend) -> Stem:
    return Stem(backend.prepare(stem.embedding), None if stem.norm is None else backend.prepare(stem.norm))


def prepare_head(head: Head, backend: Backend) -> Head:
    return Head(backend.prepare(head.norm), backend.prepare(head.lm_head), head.lm_head.act)


def prepare_block(block: Block, backend: Backend) -> Block:
    """Hand a block's parameters to a backend."""
    return Block(
        input_norm=backend.prepare(block.input_norm),
        qkv=backend.prepare(block.qkv),
        attention=backend.prepare(block.attention),
        o=backend.prepare(block.o),
        mlp_norm=backend.prepare(block.mlp_norm),
        up=backend.prepare(block.up),
        down=backend.prepare(block.down),
        qkv_act=block.qkv.act,
        o_act=block.o.act,
        up_act=block.up.act,
        down_act=block.down.act,
    )


class Decoder:
    """embed → blocks → head. The parts are callable one by one, which is how the quantizer walks them."""

    def __init__(self, config: ModelConfig, stem: Stem, blocks: Iterable[Block], head: Head) -> None:
        self.config = config
        self.stem = stem
        self.blocks = blocks
        self.head = head

    def __call__(self, ops: Ops[V]) -> V:
        x = run_stem(ops, self.stem)
        for index, block in enumerate(self.blocks):
            x = run_block(ops, self.config, block, x, last=index == self.config.num_layers - 1)
        return run_head(ops, self.head, x)


def run_stem(ops: Ops[V], stem: Stem) -> V:
    x = ops.embed(stem.embedding)
    return x if stem.norm is None else ops.norm(x, stem.norm, None)


def run_block(ops: Ops[V], config: ModelConfig, block: Block, x: V, last: bool = False) -> V:
    """[M, H]; of the last block, where other rows end as keys and values, only the rows that need logits. [R, H]"""
    qkv = ops.linear(ops.norm(x, block.input_norm, block.qkv_act), block.qkv)
    q = ops.rope_and_cache(qkv, block.attention)
    attended = ops.attention(q, block.attention, block.o_act, last)
    x = ops.linear(attended, block.o, residual=ops.select_rows(x) if last else x)
    up = ops.linear(ops.norm(x, block.mlp_norm, block.up_act), block.up)
    return ops.linear(ops.activation(up, ACTIVATIONS[config.activation], block.down_act), block.down, residual=x)


def run_head(ops: Ops[V], head: Head, x: V) -> V:
    return ops.linear(ops.norm(x, head.norm, head.act), head.lm_head)
