"""Ministral 8B: Mistral with windows in the layers that `layer_types` names."""

from __future__ import annotations

from fptq_runtime.models.block import Model
from fptq_runtime.models.fields import Fields, dense_config
from fptq_runtime.models.gemma2 import read_sliding
from fptq_runtime.models.llama import llama_like, read_attention
from fptq_runtime.models.mistral import read_window


def ministral(fields: Fields) -> Model:
    config = dense_config(fields, "MinistralForCausalLM", default_positions=131072)
    window = read_window(fields)
    near = read_sliding(fields, config, config.num_layers + 1)
    return llama_like(fields, config, read_attention(fields, config),
                      windows=[window if each else None for each in near])
