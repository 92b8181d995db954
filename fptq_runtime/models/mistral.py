"""Mistral: Llama with a sliding window in every layer."""

from __future__ import annotations

from fptq_runtime.models.block import Model
from fptq_runtime.models.fields import Fields, dense_config
from fptq_runtime.models.llama import llama_like, read_attention


def mistral(fields: Fields) -> Model:
    config = dense_config(fields, "MistralForCausalLM")
    window = read_window(fields)
    return llama_like(fields, config, read_attention(fields, config), windows=(window,) * config.num_layers)


def read_window(fields: Fields, default: int = 4096) -> int | None:
    """transformers takes the default where the field is missing; null is no window."""
    if fields.data.get("sliding_window", 0) is None:
        return None
    return fields.integer("sliding_window", default, high=1 << 24)
