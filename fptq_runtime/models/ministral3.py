"""Ministral 3: Mistral with yarn. Queries beyond `original_max_position_embeddings` are scaled by their position, which
no kernel does: the context ends there."""

from __future__ import annotations

from dataclasses import replace

from fptq_runtime.models.block import Model
from fptq_runtime.models.fields import Fields, ModelError, dense_config
from fptq_runtime.models.llama import llama_like, read_attention
from fptq_runtime.models.mistral import read_window

ROPE = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 16384,
        "beta_fast": 32.0, "beta_slow": 1.0, "mscale_all_dim": 1.0, "mscale": 1.0, "llama_4_scaling_beta": 0.1}


def ministral3(fields: Fields) -> Model:
    fields = Fields({"rms_norm_eps": 1e-5, **fields.data,
                     "rope_parameters": fields.get(("rope_scaling", "rope_parameters"), ROPE), "rope_scaling": None})
    config = dense_config(fields, "Ministral3ForCausalLM", default_head_dim=128, default_positions=262144)
    attention = read_attention(fields, config)
    rope = fields.data["rope_parameters"]
    if isinstance(rope.get("llama_4_scaling_beta"), int | float) and rope["llama_4_scaling_beta"]:
        trained = Fields(rope, "config.json: rope_parameters").integer("original_max_position_embeddings", high=1 << 24)
        if isinstance(fields.data.get("original_max_position_embeddings"), int):  # which goes before, as in read_rope
            trained = min(trained, fields.integer("original_max_position_embeddings", high=1 << 24))
        config = replace(config, max_position_embeddings=min(config.max_position_embeddings, trained))
    elif rope.get("llama_4_scaling_beta") != 0:
        raise ModelError("config.json: rope_parameters: llama_4_scaling_beta must be a number, not "
                         f"{rope.get('llama_4_scaling_beta')!r}")
    window = None if fields.get("sliding_window") is None else read_window(fields)
    return llama_like(fields, config, attention, windows=(window,) * config.num_layers)
