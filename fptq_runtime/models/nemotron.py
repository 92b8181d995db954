"""Nemotron-4 and Minitron: LayerNorms that store their weight less one, rope on a part of each head, a squared ReLU."""

from __future__ import annotations

from dataclasses import replace

from fptq_runtime.models.block import Model
from fptq_runtime.models.fields import Fields, dense_config
from fptq_runtime.models.layers import norms_of
from fptq_runtime.models.llama import biased_llama, read_attention


def nemotron(fields: Fields) -> Model:
    config = dense_config(fields, "NemotronForCausalLM", default_positions=4096)
    norm = norms_of("layer", config.hidden_size, fields.number("norm_eps", 1e-5, high=1.0), bias=True, offset=1.0)
    attention = read_attention(fields, config, partial=0.5)
    whole = {name: value for name, value in fields.data.items() if not name.startswith(("rope_", "partial_"))}
    model = biased_llama(Fields(whole), config, norm=norm, gated=False, curve="relu2")
    return replace(model, blocks=tuple(replace(block, attention=attention) for block in model.blocks))
