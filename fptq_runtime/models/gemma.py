"""Gemma 1: Llama with a scaled embedding and norms that store their weight less one."""

from __future__ import annotations

from dataclasses import replace

from fptq_runtime.models.block import Model
from fptq_runtime.models.fields import Fields, ModelError, dense_config
from fptq_runtime.models.layers import norms_of
from fptq_runtime.models.llama import llama_like, read_attention


def gemma1(fields: Fields) -> Model:
    config = dense_config(fields, "GemmaForCausalLM", default_head_dim=256, default_positions=8192, tied=True)
    if fields.flag("use_bidirectional_attention", False):
        raise ModelError("config.json: use_bidirectional_attention is not supported; a decoder looks back alone")
    if fields.get("hidden_act") == "gelu":  # the first releases' word for the other one
        fields = Fields({**fields.data, "hidden_act": "gelu_pytorch_tanh"}, fields.where)
    bias, hidden = fields.flag("attention_bias", False), config.hidden_size
    norm = norms_of("rms", hidden, fields.number("rms_norm_eps", 1e-6, high=1.0), offset=1.0)
    model = llama_like(fields, config, read_attention(fields, config), qkv_bias=bias, o_bias=bias, norm=norm,
                       curve="gelu_pytorch_tanh")
    return replace(model, stem=replace(model.stem, scale=hidden**0.5))
