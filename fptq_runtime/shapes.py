"""Well-known model shapes with random W4A8 weights: what a machine would do with them, without their checkpoints."""

from __future__ import annotations

import numpy as np
from ml_dtypes import bfloat16

from fptq_runtime.config import ModelConfig, RopeConfig
from fptq_runtime.kernels.base import ActivationQuant, AttentionSpec, Backend, Embedding, Linear, Norm, QuantizedWeight
from fptq_runtime.models.decoder import Block, Decoder, Head, Stem, prepare_block, prepare_head, prepare_stem
from fptq_runtime.models.layers import rope_tables

GROUP_SIZE = 128
POSITIONS = 32768


def _llama(vocab: int, hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, dim: int) -> ModelConfig:
    return ModelConfig(
        architecture="LlamaForCausalLM", vocab_size=vocab, hidden_size=hidden, intermediate_size=intermediate,
        num_layers=layers, num_heads=heads, num_kv_heads=kv_heads, head_dim=dim, max_position_embeddings=POSITIONS,
        norm="rms", norm_eps=1e-5, activation="silu_mul", rope=RopeConfig(500000.0),
    )


SHAPES = {
    "llama-3.2-1b": _llama(128256, 2048, 8192, 16, 32, 8, 64),
    "qwen2.5-0.5b": _llama(151936, 896, 4864, 24, 14, 2, 64),
    "llama-2-7b": _llama(32000, 4096, 11008, 32, 32, 32, 128),
    "llama-3-8b": _llama(128256, 4096, 14336, 32, 32, 8, 128),
}


def random_decoder(config: ModelConfig, backend: Backend, head_bits: int = 8) -> Decoder:
    """Per-token int8 activations, int4 group-128 weights, a head of 4 (group 128) or 8 (per channel) bits. Every layer
    has the same values in memory of its own."""
    stem, block, head = random_parameters(config, head_bits)
    blocks = []
    for layer in range(config.num_layers):
        block.attention.layer = layer
        blocks.append(prepare_block(block, backend))
    return Decoder(config, prepare_stem(stem, backend), blocks, prepare_head(head, backend))


def random_parameters(config: ModelConfig, head_bits: int) -> tuple[Stem, Block, Head]:
    """The stem, the first block and the head."""
    generator = np.random.default_rng(0)
    hidden, dim = config.hidden_size, config.head_dim

    def linear(name: str, n: int, k: int, bits: int = 4) -> Linear:
        group = GROUP_SIZE if bits == 4 and k % GROUP_SIZE == 0 else k
        packed = generator.integers(-(1 << 31), 1 << 31, (n, -(-k * bits // 32)), np.int32)
        scale = np.full((n, k // group), k**-0.5 / 2 ** (bits - 1), bfloat16)
        return Linear(name, QuantizedWeight(packed, scale, 4 if bits == 4 else 8, group), act=ActivationQuant())

    norm = Norm("rms", np.ones(hidden, bfloat16), None, config.norm_eps)
    assert config.rope is not None
    rope = rope_tables(config.rope, dim, config.max_position_embeddings)
    block = Block(
        norm,
        linear("qkv", (config.num_heads + 2 * config.num_kv_heads) * dim, hidden),
        AttentionSpec(0, config.num_heads, config.num_kv_heads, dim, dim**-0.5, rope=rope),
        linear("o", hidden, config.num_heads * dim),
        norm,
        linear("up", 2 * config.intermediate_size, hidden),
        linear("down", hidden, config.intermediate_size),
    )
    head = linear("lm_head", config.vocab_size, hidden, head_bits)
    embedding = np.empty((config.vocab_size, hidden), bfloat16)
    for row in embedding:
        row[:] = generator.standard_normal(hidden, np.float32)
    return Stem(Embedding(embedding)), block, Head(norm, head, head.act)
