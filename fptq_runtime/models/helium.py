"""Helium: Llama with rope's pairs side by side."""

from __future__ import annotations

from fptq_runtime.models.block import Model
from fptq_runtime.models.fields import Fields, dense_config
from fptq_runtime.models.layers import halves_of_qkv
from fptq_runtime.models.llama import llama_like, read_attention


def helium(fields: Fields) -> Model:
    config = dense_config(fields, "HeliumForCausalLM", default_head_dim=128, default_positions=4096)
    attention = read_attention(fields, config, theta=100000.0)
    return llama_like(fields, config, attention, qkv_bias=fields.flag("attention_bias", False), eps=1e-8,
                      mlp_bias=fields.flag("mlp_bias", False), order=halves_of_qkv(attention))
