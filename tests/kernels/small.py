"""Random decoders with every option a family may have, and the steps of a scheduler that mixes sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch

from fptq_runtime.artifact.numerics import pack_codes, quantize_weight
from fptq_runtime.config import KVCacheDtype, ModelConfig
from fptq_runtime.kernels.base import (
    Activation,
    ActivationQuant,
    Array,
    AttentionSpec,
    Backend,
    Embedding,
    Linear,
    Norm,
    QuantizedWeight,
    Routing,
    StepInput,
    StepLimits,
)
from fptq_runtime.kernels.reference import to_numpy, to_torch
from fptq_runtime.models.block import Block, BlockSpec, NormSpec, Stem, StemSpec, prepare_block, prepare_stem
from fptq_runtime.models.decoder import Decoder
from fptq_runtime.models.layers import alibi_slopes, head_spec, pre_norm
from fptq_runtime.models.moe import pre_norm_moe
from fptq_runtime.models.rope import RopeConfig, rope_tables
from fptq_runtime.models.weights import fuse

VOCAB = 97
SILU = Activation("silu", gated=True)


@dataclass(frozen=True)
class Options:
    hidden: int = 64
    intermediate: int = 96
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    norm: Literal["rms", "layer"] = "rms"
    activation: Activation = SILU
    rope: bool = True
    alibi: bool = False
    window: int | None = None
    qk_norm: bool = False
    bias: bool = False
    embedding_norm: bool = False
    act: Literal["float", "static", "dynamic", "weight-only", "mixed"] = "float"  # mixed: dynamic for o and down
    bits: Literal[4, 8] = 4
    group_size: int | None = 32
    rank: int = 0  # of each linear's low-rank factors
    dtype: torch.dtype = torch.float32
    max_len: int = 1024
    routing: Routing | None = None  # to experts in the MLP's place, beside a shared one behind a gate


def limits(options: Options, kv_dtype: KVCacheDtype = "float32", block_size: int = 32, num_blocks: int = 80,
           max_tokens: int = 1024) -> StepLimits:
    return StepLimits(
        max_tokens=max_tokens, max_seqs=8, max_logits_rows=max_tokens, max_model_len=options.max_len,
        num_blocks=num_blocks, block_size=block_size, kv_dtype=kv_dtype, num_layers=options.layers,
        num_kv_heads=options.kv_heads, head_dim=options.head_dim,
    )


def make_decoder(options: Options, backend: Backend, seed: int = 0) -> Decoder:
    """The same parameters for every backend."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, scale: float = 1.0) -> Array:
        return to_numpy((torch.randn(shape, generator=generator) * scale).to(options.dtype))

    def linear(name: str, n: int, k: int) -> Linear:
        weight = random(n, k, scale=k**-0.5)
        bias = random(n, scale=0.1) if options.bias else None
        low_rank = None
        if options.rank:
            down = torch.randint(-127, 128, (options.rank, k), generator=generator).bfloat16() / 128
            up = (0.3 * k**-0.5 * torch.randn((n, options.rank), generator=generator)).bfloat16()
            low_rank = to_numpy(down), to_numpy(up)
        if options.act == "float":
            return Linear(name, weight, bias, None, low_rank)
        codes, scale = quantize_weight(to_torch(weight), options.bits, options.group_size)
        weight_only = options.act == "weight-only" or (options.act == "mixed" and name not in ("o", "down"))
        act = None if weight_only else ActivationQuant(0.03 if options.act == "static" else None)
        packed = to_numpy(pack_codes(codes, options.bits))
        quantized = QuantizedWeight(packed, to_numpy(scale), options.bits, options.group_size or k)
        return Linear(name, quantized, bias, act, low_rank)

    def experts(name: str, n: int, k: int, count: int) -> Linear:
        return fuse(name, [linear(f"{name}.{i}", n, k) for i in range(count)], experts=count)

    def norm(width: int) -> Norm:
        bias = random(width, scale=0.1) if options.norm == "layer" else None
        return Norm(options.norm, 1 + random(width, scale=0.1), bias, 1e-5)

    heads, kv_heads, dim, hidden = options.heads, options.kv_heads, options.head_dim, options.hidden
    rope = rope_tables(RopeConfig(10000.0, dim), options.max_len) if options.rope else None
    up = options.intermediate * (2 if options.activation.gated else 1)
    forward = pre_norm if options.routing is None else pre_norm_moe
    spec = BlockSpec("layers", "", forward, (), (), (), activation=options.activation, routing=options.routing)
    blocks = []
    for layer in range(options.layers):
        qkv = linear("qkv", (heads + 2 * kv_heads) * dim, hidden)
        attention = AttentionSpec(
            layer, heads, kv_heads, dim, dim**-0.5, options.window, rope,
            alibi_slopes(heads) if options.alibi else None,
            Norm("rms", 1 + random(dim, scale=0.1), None, 1e-6) if options.qk_norm else None,
            Norm("rms", 1 + random(dim, scale=0.1), None, 1e-6) if options.qk_norm else None,
        )
        norms = {"input_norm": norm(hidden)}
        linears = {"qkv": qkv, "o": linear("o", hidden, heads * dim)}
        norms["mlp_norm"] = norm(hidden)
        linears |= {"up": linear("up", up, hidden), "down": linear("down", hidden, options.intermediate)}
        if options.routing is not None:
            count = options.routing.num_experts
            linears["shared.up"], linears["shared.down"] = linears.pop("up"), linears.pop("down")
            linears |= {"router": Linear("router", random(count, hidden, scale=2 * hidden**-0.5)),
                        "shared.gate": Linear("gate", random(1, hidden, scale=hidden**-0.5)),
                        "experts.up": experts("up", up, hidden, count),
                        "experts.down": experts("down", hidden, options.intermediate, count)}
        block = Block(spec, linears, norms, attention, layer == options.layers - 1, options.routing)
        blocks.append(prepare_block(block, backend))
    head = linear("lm_head", VOCAB, hidden)
    config = ModelConfig("Test", VOCAB, hidden, options.intermediate, options.layers, heads, kv_heads, dim,
                         options.max_len)
    stem = Stem(StemSpec("embedding"), Embedding(random(VOCAB, hidden)),
                norm=norm(hidden) if options.embedding_norm else None)
    last = Block(head_spec(NormSpec("norm", ("norm",), (hidden,), options.norm, 1e-5), "lm_head", VOCAB, hidden),
                 {"head": head}, {"norm": norm(hidden)})
    return Decoder(config, prepare_stem(stem, backend), blocks, prepare_block(last, backend))


def int32(values: Any) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.asarray(values, dtype=np.int32)


@dataclass
class Tokens:
    token_ids: Sequence[int]
    table: list[int]
    state_slot: int
    computed: int = 0


@dataclass
class Batcher:
    """Hands out blocks in random order and packs steps."""

    limits: StepLimits
    rng: np.random.Generator
    free: list[int] = field(default_factory=list)
    free_slots: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.free = self.rng.permutation(self.limits.num_blocks).tolist()
        self.free_slots = list(range(self.limits.max_seqs, -1, -1))  # one more than a step may have

    def sequence(self, token_ids: Sequence[int]) -> Tokens:
        count = -(-len(token_ids) // self.limits.block_size)
        return Tokens(token_ids, [self.free.pop() for _ in range(count)], self.free_slots.pop())

    def release(self, sequence: Tokens) -> None:
        self.free.extend(sequence.table)
        self.free_slots.append(sequence.state_slot)

    def step(self, parts: Sequence[tuple[Tokens, int]]) -> StepInput:
        """The next `count` tokens of each sequence, logits for all of them."""
        size = self.limits.block_size
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        starts, lens = [0], []
        tables = np.zeros((len(parts), max(len(s.table) for s, _ in parts)), dtype=np.int32)
        for i, (sequence, count) in enumerate(parts):
            span = range(sequence.computed, sequence.computed + count)
            token_ids += [sequence.token_ids[p] for p in span]
            positions += span
            slots += [sequence.table[p // size] * size + p % size for p in span]
            sequence.computed += count
            starts.append(starts[-1] + count)
            lens.append(sequence.computed)
            tables[i, : len(sequence.table)] = sequence.table
        return StepInput(int32(token_ids), int32(positions), int32(slots), int32(starts), int32(lens), tables,
                         int32(range(len(token_ids))), int32([sequence.state_slot for sequence, _ in parts]))


def random_tokens(rng: np.random.Generator, length: int) -> list[int]:
    return rng.integers(0, VOCAB, length).tolist()
