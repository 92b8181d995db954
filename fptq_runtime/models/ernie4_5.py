"""ERNIE 4.5, dense: Llama with rope's pairs side by side and one flag for all biases."""

from __future__ import annotations

from fptq_runtime.models.block import Model
from fptq_runtime.models.fields import Fields, dense_config
from fptq_runtime.models.layers import halves_of_qkv
from fptq_runtime.models.llama import llama_like, read_attention


def ernie4_5(fields: Fields) -> Model:
    config = dense_config(fields, "Ernie4_5ForCausalLM", default_head_dim=128, default_positions=131072, tied=True)
    attention, bias = read_attention(fields, config, theta=500000.0), fields.flag("use_bias", False)
    return llama_like(fields, config, attention, qkv_bias=bias, o_bias=bias, mlp_bias=bias, eps=1e-5,
                      order=halves_of_qkv(attention))
