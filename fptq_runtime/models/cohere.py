"""Command R: attention and MLP side by side behind one LayerNorm without a bias, rope's pairs side by side, scaled
logits; Command R+ has a norm of each head's own for q and k. Command R7B and A (Cohere 2) have windows and rope in
three of four layers, and neither in the fourth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fptq_runtime.config import ModelConfig
from fptq_runtime.kernels.base import Ops
from fptq_runtime.models.block import Attention, Block, Model, NormSpec
from fptq_runtime.models.fields import Fields, dense_config
from fptq_runtime.models.gemma2 import read_sliding
from fptq_runtime.models.layers import halves, halves_of_qkv, head, norms_of, parallel
from fptq_runtime.models.llama import llama_like, read_attention
from fptq_runtime.models.mistral import read_window


def cohere(fields: Fields) -> Model:
    config = dense_config(fields, "CohereForCausalLM", default_positions=8192, tied=True)
    attention = read_attention(fields, config, theta=500000.0)
    if fields.flag("use_qk_norm", False):
        eps, dim = fields.number("layer_norm_eps", 1e-5, high=1.0), config.head_dim
        order = None if attention.rope is None else halves(dim, attention.rope.dim)
        attention = replace(
            attention,
            q_norm=NormSpec("q_norm", ("self_attn.q_norm",), (config.num_heads, dim), "layer", eps, order=order),
            k_norm=NormSpec("k_norm", ("self_attn.k_norm",), (config.num_kv_heads, dim), "layer", eps, order=order),
        )
    return command(fields, config, [attention] * config.num_layers)


def cohere2(fields: Fields) -> Model:
    config = dense_config(fields, "Cohere2ForCausalLM", default_positions=8192, tied=True)
    window, attention = read_window(fields), read_attention(fields, config)
    near = read_sliding(fields, config, fields.integer("sliding_window_pattern", 4))
    turning = replace(attention, sliding_window=window)
    return command(fields, config, [turning if each else replace(attention, rope=None) for each in near])


def command(fields: Fields, config: ModelConfig, attentions: Sequence[Attention]) -> Model:
    bias, scale = fields.flag("attention_bias", False), fields.number("logit_scale", 0.0625)
    model = llama_like(
        fields, config, attentions, qkv_bias=bias, o_bias=bias, forward=parallel,
        norm=norms_of("layer", config.hidden_size, fields.number("layer_norm_eps", 1e-5, high=1.0)),
    )

    def logits(ops: Ops[Any], block: Block, x: Any) -> Any:
        return ops.scale(head(ops, block, x), scale)

    def in_halves(attention: Attention | None) -> Any:
        return None if attention is None or attention.rope is None else halves_of_qkv(attention)

    blocks = tuple(replace(block, linears=(replace(block.linears[0], order=in_halves(block.attention)),
                                           *block.linears[1:])) for block in model.blocks)
    return replace(model, blocks=blocks, head=replace(model.head, forward=logits))
