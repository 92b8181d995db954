"""Qwen2: Llama whose q, k and v have a bias, with windows in its last layers where they are asked for."""

from __future__ import annotations

from fptq_runtime.config import ModelConfig
from fptq_runtime.models.block import Model
from fptq_runtime.models.fields import Fields, dense_config
from fptq_runtime.models.llama import llama_like, read_attention
from fptq_runtime.models.mistral import read_window


def qwen2(fields: Fields) -> Model:
    config = dense_config(fields, "Qwen2ForCausalLM", default_positions=32768)
    return llama_like(fields, config, read_attention(fields, config), windows=read_windows(fields, config),
                      qkv_bias=True)


def read_windows(fields: Fields, config: ModelConfig) -> tuple[int | None, ...]:
    """Each layer's: `layer_types` where it is given, else from layer `max_window_layers` on."""
    window = read_window(fields) if fields.flag("use_sliding_window", False) else None
    if window is None:
        return (None,) * config.num_layers
    if fields.get("layer_types") is None:
        first = fields.integer("max_window_layers", 28, low=0)
        return tuple(window if i >= first else None for i in range(config.num_layers))
    kinds = fields.names("layer_types", ("full_attention", "sliding_attention"), config.num_layers)
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
