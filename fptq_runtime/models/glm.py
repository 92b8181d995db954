"""GLM-4: rope on the first half of each head in pairs side by side, gate and up in one tensor; GLM-4-0414 has norms
behind attention and MLP too."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fptq_runtime.models.block import Model
from fptq_runtime.models.fields import Fields, dense_config
from fptq_runtime.models.gemma2 import forward
from fptq_runtime.models.layers import halves_of_qkv, norms_of
from fptq_runtime.models.llama import llama_like, read_attention

EPS = 1.5625e-7


def glm(fields: Fields) -> Model:
    return fused(fields, "GlmForCausalLM")


def glm4(fields: Fields) -> Model:
    model = fused(fields, "Glm4ForCausalLM")
    norm = norms_of("rms", model.config.hidden_size, fields.number("rms_norm_eps", EPS, high=1.0))
    behind = norm("attention_norm", "post_self_attn_layernorm"), norm("output_norm", "post_mlp_layernorm")
    return replace(model, blocks=tuple(
        replace(block, forward=forward, norms=(*block.norms, *behind), residual=("attention_norm", "output_norm"))
        for block in model.blocks))


def fused(fields: Fields, architecture: str, **names: Any) -> Model:
    """names: `dense_config`'s, of fields."""
    config = dense_config(fields, architecture, default_head_dim=128, default_positions=131072, **names)
    attention = read_attention(fields, config, partial=0.5)
    return llama_like(fields, config, attention, eps=EPS, qkv_bias=fields.flag("attention_bias", True),
                      up=("mlp.gate_up_proj",), order=halves_of_qkv(attention))
