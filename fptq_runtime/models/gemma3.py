"""Gemma 3, its text part: Gemma 2 with a norm over each head of q and k, and another rope in layers with a window."""

from __future__ import annotations

from dataclasses import replace

from fptq_runtime.models.block import Attention, Model, NormSpec
from fptq_runtime.models.fields import Fields, dense_config
from fptq_runtime.models.gemma2 import gemma, read_sliding
from fptq_runtime.models.mistral import read_window
from fptq_runtime.models.rope import read_ropes

SIZES = {"vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
         "num_attention_heads": 8, "num_key_value_heads": 4}  # which Google's configs leave out


def gemma3(fields: Fields) -> Model:
    fields = Fields({**SIZES, **fields.data}, fields.where)
    config = dense_config(fields, "Gemma3ForCausalLM", default_head_dim=256, default_positions=131072, tied=True)
    window, eps = read_window(fields), fields.number("rms_norm_eps", 1e-6, high=1.0)
    everywhere, nearby = read_ropes(fields, config.head_dim, config.max_position_embeddings, theta=1e6,
                                    local_theta=10000.0, local_theta_name="rope_local_base_freq")
    fields.only("attn_logit_softcapping", (None,), None)
    attention = Attention(
        config.num_heads, config.num_kv_heads, config.head_dim, fields.number("query_pre_attn_scalar", 256, 1e-6)**-0.5,
        rope=everywhere,
        q_norm=NormSpec("q_norm", ("self_attn.q_norm",), (config.head_dim,), "rms", eps, offset=1.0),
        k_norm=NormSpec("k_norm", ("self_attn.k_norm",), (config.head_dim,), "rms", eps, offset=1.0),
    )
    pattern = fields.integer("sliding_window_pattern", 6)
    sliding = read_sliding(fields, config, pattern)
    return gemma(fields, config, [replace(attention, sliding_window=window, rope=nearby) if near else attention
                                  for near in sliding], logits_cap=None)
