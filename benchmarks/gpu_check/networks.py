"""Small random networks, written over the ops with all that families differ in, and the steps of a scheduler."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch

from fptq_runtime.artifact.numerics import pack_codes, quantize_weight
from fptq_runtime.config import KVCacheDtype
from fptq_runtime.kernels.base import (
    Activation,
    ActivationQuant,
    Array,
    AttentionSpec,
    Backend,
    Embedding,
    Int32Array,
    Linear,
    Norm,
    QuantizedWeight,
    StepInput,
    StepLimits,
)
from fptq_runtime.kernels.reference import to_numpy

HIDDEN, INNER, VOCAB, POSITIONS = 64, 96, 97, 1024
SILU = Activation("silu", True)


@dataclass(frozen=True)
class Kind:
    """What a network differs in. rotated: dimensions that rope turns. qk_norm: what a weight spans."""

    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    activation: Activation = SILU
    norm: Literal["rms", "layer"] = "rms"
    rotated: int = 16
    alibi: bool = False
    window: int | None = None
    qk_norm: Literal["shared", "own", "row"] | None = None
    norm_after_rope: bool = False
    sinks: bool = False
    softcap: float | None = None
    parallel: bool = False  # attention and MLP read the same norm
    positions: bool = False  # learned ones
    bias: bool = False
    act: ActivationQuant | None = field(default_factory=ActivationQuant)
    bits: Literal[4, 8] = 4
    group_size: int | None = 32
    rank: int = 0


KINDS = {
    "llama": Kind(), "llama float": Kind(act=None),
    "qwen 3, window": Kind(head_dim=32, rotated=32, qk_norm="shared", window=40, act=ActivationQuant(0.03)),
    "bloom": Kind(norm="layer", activation=Activation("gelu_tanh"), rotated=0, alibi=True, bias=True, kv_heads=4,
                  bits=8, group_size=None),
    "low rank": Kind(rank=3), "grouped heads": Kind(heads=12, kv_heads=2, head_dim=64, rotated=64),
    "gemma 2": Kind(activation=Activation("gelu_tanh", True), window=50, softcap=5.0, head_dim=256, rotated=256),
    "gpt-oss": Kind(activation=Activation("clamped_swiglu", True), window=30, sinks=True, bias=True),
    "olmo 2": Kind(heads=6, kv_heads=3, qk_norm="row"),
    "stablelm": Kind(norm="layer", rotated=4, qk_norm="own", norm_after_rope=True, parallel=True, head_dim=20),
    "opt": Kind(norm="layer", activation=Activation("relu"), rotated=0, positions=True, bias=True),
}


def limits(kind: Kind, layers: int, kv_dtype: KVCacheDtype, num_blocks: int = 80) -> StepLimits:
    return StepLimits(POSITIONS, 8, POSITIONS, POSITIONS, num_blocks, 32, kv_dtype, layers, kind.kv_heads,
                      kind.head_dim)


def network(kind: Kind, layers: int, backend: Backend) -> Callable[[Any], Any]:
    """The same parameters for every backend."""
    generator = torch.Generator().manual_seed(0)
    heads, kv_heads, dim = kind.heads, kind.kv_heads, kind.head_dim

    def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * scale

    def linear(name: str, n: int, k: int) -> Any:
        weight, bias = random(n, k, scale=k**-0.5), to_numpy(random(n, scale=0.1)) if kind.bias else None
        low_rank = None
        if kind.rank:
            down = torch.randint(-127, 128, (kind.rank, k), generator=generator).bfloat16() / 128
            low_rank = to_numpy(down), to_numpy(random(n, kind.rank, scale=0.3 * k**-0.5).bfloat16())
        held: Array | QuantizedWeight = to_numpy(weight.bfloat16())
        if kind.act is not None:
            group = kind.group_size if kind.group_size and k % kind.group_size == 0 else None
            codes, scale = quantize_weight(weight, kind.bits, group)
            held = QuantizedWeight(to_numpy(pack_codes(codes, kind.bits)), to_numpy(scale), kind.bits, group or k)
        return backend.prepare(Linear(name, held, bias, kind.act, low_rank))

    def norm(*shape: int) -> Norm:
        bias = to_numpy(random(*shape, scale=0.1)) if kind.norm == "layer" else None
        return Norm(kind.norm, to_numpy(1 + random(*shape, scale=0.1)), bias, 1e-5)

    def head_norm(count: int) -> Norm | None:
        shapes = {"shared": (dim,), "own": (count, dim), "row": (count * dim,)}
        return None if kind.qk_norm is None else norm(*shapes[kind.qk_norm])

    def attention(layer: int) -> Any:
        angles = np.arange(POSITIONS)[:, None] * 10000.0 ** (-np.arange(kind.rotated // 2) / max(kind.rotated / 2, 1))
        return backend.prepare(AttentionSpec(
            layer, heads, kv_heads, dim, dim**-0.5, kind.window if layer == 0 else None,
            (np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)) if kind.rotated else None,
            2.0 ** -np.arange(1, heads + 1, dtype=np.float32) if kind.alibi else None,
            head_norm(heads), head_norm(kv_heads), kind.norm_after_rope, kind.softcap,
            to_numpy(random(heads)) if kind.sinks else None))

    embedding, positions = (backend.prepare(Embedding(to_numpy(random(rows, HIDDEN)))) for rows in (VOCAB, POSITIONS))
    up = (1 + kind.activation.gated) * INNER
    blocks = [(attention(layer), [backend.prepare(norm(HIDDEN)) for _ in range(2)],
               linear("qkv", (heads + 2 * kv_heads) * dim, HIDDEN), linear("o", HIDDEN, heads * dim),
               linear("up", up, HIDDEN), linear("down", HIDDEN, INNER)) for layer in range(layers)]
    last, head = backend.prepare(norm(HIDDEN)), linear("head", VOCAB, HIDDEN)

    def forward(ops: Any) -> Any:
        x = ops.embed(embedding)
        if kind.positions:
            x = ops.add(x, ops.embed_positions(positions))
        for attention, norms, qkv, o, up, down in blocks:
            normed = ops.norm(x, norms[0], None)
            q = ops.rope_and_cache(ops.linear(ops.quantize(normed, qkv.act), qkv), attention)
            x = ops.linear(ops.attention(q, attention, o.act), o, x)
            read = ops.quantize(normed, up.act) if kind.parallel else ops.norm(x, norms[1], up.act)
            x = ops.linear(ops.activation(ops.linear(read, up), kind.activation, down.act), down, x)
        logits = ops.linear(ops.norm(ops.select_rows(x), last, head.act), head)
        return logits if kind.softcap is None else ops.softcap(logits, 3.0)

    return forward


@dataclass
class Tokens:
    """A sequence, its cache blocks, and how many of its tokens were computed."""

    token_ids: Sequence[int]
    table: list[int]
    computed: int = 0


class Batcher:
    """Hands out blocks in random order and packs steps."""

    def __init__(self, limits: StepLimits, rng: np.random.Generator) -> None:
        self.rng = rng
        self._size = limits.block_size
        self._free: list[int] = rng.permutation(limits.num_blocks).tolist()

    def sequence(self, token_ids: Sequence[int]) -> Tokens:
        return Tokens(token_ids, [self._free.pop() for _ in range(-(-len(token_ids) // self._size))])

    def step(self, parts: Sequence[tuple[Tokens, int]]) -> StepInput:
        """The next `count` tokens of each sequence, logits for all of them."""
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        starts, lengths = [0], []
        tables = np.zeros((len(parts), max(len(sequence.table) for sequence, _ in parts)), np.int32)
        for index, (sequence, count) in enumerate(parts):
            span = range(sequence.computed, sequence.computed + count)
            token_ids += [sequence.token_ids[p] for p in span]
            positions += span
            slots += [sequence.table[p // self._size] * self._size + p % self._size for p in span]
            sequence.computed += count
            starts.append(starts[-1] + count)
            lengths.append(sequence.computed)
            tables[index, : len(sequence.table)] = sequence.table
        return StepInput(_int32(token_ids), _int32(positions), _int32(slots), _int32(starts), _int32(lengths), tables,
                         np.arange(len(token_ids), dtype=np.int32), np.arange(len(parts), dtype=np.int32))


def _int32(values: list[int]) -> Int32Array:
    return np.asarray(values, np.int32)


def random_tokens(rng: np.random.Generator, length: int) -> list[int]:
    return [int(token) for token in rng.integers(0, VOCAB, length)]
