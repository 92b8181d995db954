"""Well-known model shapes with random W4A8 weights: what a machine would do with them, without their checkpoints."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from ml_dtypes import bfloat16

from fptq_runtime.errors import FptqError
from fptq_runtime.kernels.base import ActivationQuant, AttentionSpec, Backend, Embedding, Linear, Norm, QuantizedWeight
from fptq_runtime.models.block import (
    Block,
    BlockSpec,
    Model,
    NormSpec,
    Stem,
    head_norms,
    prepare_block,
    prepare_stem,
)
from fptq_runtime.models.decoder import Decoder
from fptq_runtime.models.families import parse_config
from fptq_runtime.models.rope import rope_tables

GROUP_SIZES = (128, 64, 32)
POSITIONS = 32768


def _llama(vocab: int, hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, dim: int
           ) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"], "vocab_size": vocab, "hidden_size": hidden,
        "intermediate_size": intermediate, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "head_dim": dim, "max_position_embeddings": POSITIONS, "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "model_type": "llama", "hidden_act": "silu", "tie_word_embeddings": False,
    }


CONFIGS = {
    "llama-3.2-1b": _llama(128256, 2048, 8192, 16, 32, 8, 64),
    "qwen2.5-0.5b": _llama(151936, 896, 4864, 24, 14, 2, 64),
    "llama-2-7b": _llama(32000, 4096, 11008, 32, 32, 32, 128),
    "llama-3-8b": _llama(128256, 4096, 14336, 32, 32, 8, 128),
    "qwen3-30b-a3b-12-layers": {  # a quarter of its layers
        **_llama(151936, 2048, 6144, 12, 32, 4, 128), "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe", "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
        "norm_topk_prob": True, "rms_norm_eps": 1e-6,
    },
}  # as config.json would say it
SHAPES = {name: parse_config(config) for name, config in CONFIGS.items()}


def random_decoder(model: Model, backend: Backend, head_bits: int = 8) -> Decoder:
    """Per-token int8 activations, int4 weights in the largest groups that fit, a head of 4 (likewise) or 8 (per
    channel) bits. Every layer has the same values in memory of its own."""
    stem, block, head = random_parameters(model, head_bits)
    blocks = []
    for layer, spec in enumerate(model.blocks):
        block.attention.layer = layer
        last = layer == len(model.blocks) - 1
        blocks.append(prepare_block(replace(block, spec=spec, last=last), backend))
    return Decoder(model.config, prepare_stem(stem, backend), blocks, prepare_block(head, backend))


def random_parameters(model: Model, head_bits: int) -> tuple[Stem, Block, Block]:
    """The stem, the first block and the head, of a model whose blocks are alike and have RMS norms and one rope. A
    router's weights are in bfloat16, and random, so that tokens go to any expert alike."""
    config, spec = model.config, model.blocks[0]
    generator = np.random.default_rng(0)

    def linear(part: BlockSpec, name: str, bits: int = 4) -> Linear:
        n, k = part.linear(name).n, part.linear(name).k
        if part.linear(name).kept:
            return Linear(part.full_name(name), generator.standard_normal((n, k), np.float32).astype(bfloat16))
        group = next((size for size in GROUP_SIZES if bits == 4 and k % size == 0), k)
        packed = generator.integers(-(1 << 31), 1 << 31, (n, -(-k * bits // 32)), np.int32)
        scale = np.full((n, k // group), k**-0.5 / 2 ** (bits - 1), bfloat16)
        weight = QuantizedWeight(packed, scale, 4 if bits == 4 else 8, group)
        return Linear(part.full_name(name), weight, act=ActivationQuant(), experts=part.linear(name).experts)

    def norm(norm: NormSpec) -> Norm:
        return Norm("rms", np.ones(norm.shape, bfloat16), None, norm.eps)

    def norms(part: BlockSpec) -> dict[str, Norm]:
        return {each.name: norm(each) for each in part.norms}

    attention = spec.attention
    assert attention is not None and attention.rope is not None
    norms_of_heads = {role: norm(each) for role, each in head_norms(spec)}
    block = Block(
        spec, {each.name: linear(spec, each.name) for each in spec.linears}, norms(spec),
        AttentionSpec(0, config.num_heads, config.num_kv_heads, config.head_dim, attention.softmax_scale,
                      rope=rope_tables(attention.rope, config.max_position_embeddings),
                      q_norm=norms_of_heads.get("q_norm"), k_norm=norms_of_heads.get("k_norm")),
        routing=spec.routing,
    )
    head = Block(model.head, {"head": linear(model.head, "head", head_bits)}, norms(model.head))
    embedding = np.empty((config.vocab_size, config.hidden_size), bfloat16)
    for row in embedding:
        row[:] = generator.standard_normal(config.hidden_size, np.float32)
    return Stem(model.stem, Embedding(embedding)), block, head


class NoText:
    """What the engine asks of a tokenizer, for a model without a vocabulary."""

    def stream(self, skip_special_tokens: bool = True, prompt_token_ids: Sequence[int] = (),
               shown: Collection[int] = ()) -> NoText:
        return self

    def to_json(self) -> str:
        raise FptqError("a model without a vocabulary has no grammars")

    def step(self, token_id: int) -> str | None:
        return ""

    def flush(self) -> str:
        return ""
