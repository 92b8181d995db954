"""Jais 2: Llama with LayerNorms, biases and a squared ReLU."""

from __future__ import annotations

from fptq_runtime.models.block import Model
from fptq_runtime.models.fields import Fields, dense_config
from fptq_runtime.models.layers import norms_of
from fptq_runtime.models.llama import biased_llama


def jais2(fields: Fields) -> Model:
    config = dense_config(fields, "Jais2ForCausalLM", default_positions=8192)
    norm = norms_of("layer", config.hidden_size, fields.number("layer_norm_eps", 1e-5, high=1.0), bias=True)
    bias = fields.flag("attention_bias", True)
    return biased_llama(fields, config, qkv_bias=bias, o_bias=bias, mlp_bias=fields.flag("mlp_bias", True), norm=norm,
                        gated=False, curve="relu2")
