"""Persimmon: rope on a part of each head, LayerNorms, one over each head of q and k, biases, a squared ReLU."""

from __future__ import annotations

from dataclasses import replace

from fptq_runtime.models.block import LinearSpec, Model, NormSpec
from fptq_runtime.models.fields import Fields, dense_config
from fptq_runtime.models.layers import interleaved, norms_of
from fptq_runtime.models.llama import llama_like, read_attention


def persimmon(fields: Fields) -> Model:
    config = dense_config(fields, "PersimmonForCausalLM", default_positions=16384, grouped=False)
    hidden, eps, attention = (config.hidden_size, fields.number("layer_norm_eps", 1e-5, high=1.0),
                              read_attention(fields, config, partial=0.5))
    if fields.flag("qk_layernorm", True):
        q_norm, k_norm = (NormSpec(f"{each}_norm", (f"self_attn.{each}_layernorm",), (config.head_dim,), "layer", eps,
                                   bias=True) for each in "qk")
        attention = replace(attention, q_norm=q_norm, k_norm=k_norm)
    model = llama_like(
        fields, config, attention, o_bias=True, mlp_bias=True, norm=norms_of("layer", hidden, eps, bias=True),
        last_norm="model.final_layernorm", gated=False, curve="relu2", up=("mlp.dense_h_to_4h",),
        down="mlp.dense_4h_to_h", o="self_attn.dense",
    )
    qkv = LinearSpec("qkv", ("self_attn.query_key_value",), (3 * hidden,), hidden, True,
                     interleaved(config.num_heads, config.head_dim))
    return replace(model, blocks=tuple(replace(block, linears=(qkv, *block.linears[1:])) for block in model.blocks))
