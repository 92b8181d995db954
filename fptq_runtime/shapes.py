"""Well-known model shapes with random W4A8 weights: what a machine would do with them, without their checkpoints."""

from __future__ import annotations

import torch

from fptq_runtime.config import ModelConfig, RopeConfig
from fptq_runtime.kernels.base import ActivationQuant, AttentionSpec, Backend, Embedding, Linear, Norm, QuantizedWeight
from fptq_runtime.models.decoder import Block, Decoder, Head, Stem, prepare_block
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
}


def random_decoder(config: ModelConfig, backend: Backend, head_bits: int = 8) -> Decoder:
    """Per-token int8 activations, int4 group-128 weights, a head of 4 (group 128) or 8 (per channel) bits. Every layer
    has the same values in memory of its own."""
    generator = torch.Generator().manual_seed(0)
    hidden, dim = config.hidden_size, config.head_dim

    def linear(name: str, n: int, k: int, bits: int = 4) -> Linear:
        group = GROUP_SIZE if bits == 4 and k % GROUP_SIZE == 0 else k
        limit = 2 ** (bits - 1)
        codes = torch.randint(-limit, limit, (n, k), generator=generator, dtype=torch.int8)
        scale = torch.full((n, k // group), k**-0.5 / limit)
        return Linear(name, QuantizedWeight(codes, scale, 4 if bits == 4 else 8, group), act=ActivationQuant())

    norm = Norm("rms", torch.ones(hidden), None, config.norm_eps)
    assert config.rope is not None
    rope = rope_tables(config.rope, dim, config.max_position_embeddings)
    qkv = linear("qkv", (config.num_heads + 2 * config.num_kv_heads) * dim, hidden)
    o = linear("o", hidden, config.num_heads * dim)
    up = linear("up", 2 * config.intermediate_size, hidden)
    down = linear("down", hidden, config.intermediate_size)
    blocks = [
        prepare_block(Block(
            norm, qkv,
            AttentionSpec(layer, config.num_heads, config.num_kv_heads, dim, dim**-0.5, rope=rope),
            o, norm, up, down,
        ), backend)
        for layer in range(config.num_layers)
    ]
    head = linear("lm_head", config.vocab_size, hidden, head_bits)
    embedding = torch.randn(config.vocab_size, hidden, generator=generator).bfloat16()
    return Decoder(config, Stem(backend.prepare(Embedding(embedding))), blocks,
                   Head(backend.prepare(norm), backend.prepare(head), head.act))
