"""Gemma 3, its text part: Gemma 2 with a norm over each head of q and k, and another rope in layers with a window."""

from __future__ import annotations

from dataclasses import replace

from fptq_runtime.config import ModelConfig
from fptq_runtime.models.block import Attention, Model, NormSpec
from fptq_runtime.models.fields import Fields, dense_config
from fptq_runtime.models.gemma2 import gemma, read_sliding
from fptq_runtime.models.mistral import read_window
from fptq_runtime.models.rope import RopeConfig, read_rope


def gemma3(fields: Fields) -> Model:
    config = dense_config(fields, "Gemma3ForCausalLM", default_head_dim=256, default_positions=131072, tied=True)
    window, eps = read_window(fields), fields.number("rms_norm_eps", 1e-6, high=1.0)
    everywhere, nearby = read_ropes(fields, config)
    attention = Attention(
        config.num_heads, config.num_kv_heads, config.head_dim, fields.number("query_pre_attn_scalar", 256, 1e-6)**-0.5,
        rope=everywhere,
        q_norm=NormSpec("q_norm", ("self_attn.q_norm",), (config.head_dim,), "rms", eps, offset=1.0),
        k_norm=NormSpec("k_norm", ("self_attn.k_norm",), (config.head_dim,), "rms", eps, offset=1.0),
        softcap=fields.optional("attn_logit_softcapping", None),
    )
    pattern = fields.integer("sliding_window_pattern", 6)
    sliding = read_sliding(fields, config, pattern)
    return gemma(fields, config, [replace(attention, sliding_window=window, rope=nearby) if near else attention
                                  for near in sliding], logits_cap=None)


def read_ropes(fields: Fields, config: ModelConfig) -> tuple[RopeConfig | None, RopeConfig | None]:
    """Of layers that attend to everything, and of those with a window. Before transformers 5 the second was its base
    frequency alone, and scaling was the first's."""
    sizes = config.head_dim, config.max_position_embeddings
    given = fields.data.get("rope_parameters")
    if isinstance(given, dict) and "sliding_attention" in given and not fields.data.get("rope_scaling"):
        return (read_rope(fields, *sizes, "full_attention", theta=1e6), read_rope(fields, *sizes, "sliding_attention"))
    theta = fields.number("rope_local_base_freq", 10000.0, low=1.0)
    return read_rope(fields, *sizes, "full_attention", theta=1e6), RopeConfig(theta, config.head_dim)
