"""Phi-1, 1.5 and 2: attention and MLP side by side behind one LayerNorm, rope on a part of each head, biases
everywhere, the head's too; where asked for a norm over each head of q and k."""

from __future__ import annotations

from dataclasses import replace

from fptq_runtime.models.block import Model, NormSpec
from fptq_runtime.models.fields import Fields, dense_config
from fptq_runtime.models.layers import norms_of, parallel
from fptq_runtime.models.llama import llama_like, read_attention


def phi(fields: Fields) -> Model:
    config = dense_config(fields, "PhiForCausalLM")
    eps, attention = fields.number("layer_norm_eps", 1e-5, high=1.0), read_attention(fields, config, partial=0.5)
    if fields.flag("qk_layernorm", False):
        q_norm, k_norm = (NormSpec(f"{each}_norm", (f"self_attn.{each}_layernorm",), (config.head_dim,), "layer", eps,
                                   bias=True) for each in "qk")
        attention = replace(attention, q_norm=q_norm, k_norm=k_norm)
    return llama_like(
        fields, config, attention, qkv_bias=True, o_bias=True, mlp_bias=True, head_bias=True, forward=parallel,
        norm=norms_of("layer", config.hidden_size, eps, bias=True), last_norm="model.final_layernorm", gated=False,
        curve="gelu_new", up=("mlp.fc1",), down="mlp.fc2", o="self_attn.dense",
    )
