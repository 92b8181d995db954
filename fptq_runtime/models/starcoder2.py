"""StarCoder2: Llama with LayerNorms, biases everywhere and an MLP without a gate."""

from __future__ import annotations

from fptq_runtime.models.block import Model
from fptq_runtime.models.fields import Fields, dense_config
from fptq_runtime.models.layers import norms_of
from fptq_runtime.models.llama import llama_like, read_attention
from fptq_runtime.models.mistral import read_window


def starcoder2(fields: Fields) -> Model:
    config = dense_config(fields, "Starcoder2ForCausalLM", default_positions=4096, tied=True)
    window = None if fields.get("sliding_window") is None else read_window(fields)
    bias = fields.flag("use_bias", True)
    norm = norms_of("layer", config.hidden_size, fields.number("norm_epsilon", 1e-5, high=1.0), bias=True)
    return llama_like(fields, config, read_attention(fields, config), windows=(window,) * config.num_layers,
                      qkv_bias=bias, o_bias=bias, mlp_bias=bias, norm=norm, gated=False, curve="gelu_pytorch_tanh",
                      up=("mlp.c_fc",), down="mlp.c_proj")
