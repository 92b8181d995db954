"""OLMo 3: OLMo 2 with windows in three of four layers, whose rope is not scaled."""

from __future__ import annotations

from dataclasses import replace

from fptq_runtime.models.block import Model
from fptq_runtime.models.fields import Fields, dense_config
from fptq_runtime.models.gemma2 import read_sliding
from fptq_runtime.models.llama import read_attention
from fptq_runtime.models.mistral import read_window
from fptq_runtime.models.olmo2 import normalise_rows, post_norm
from fptq_runtime.models.rope import read_ropes

THETA = 500000.0


def olmo3(fields: Fields) -> Model:
    config = dense_config(fields, "Olmo3ForCausalLM")
    window = read_window(fields)
    full, sliding = read_ropes(fields, config.head_dim, config.max_position_embeddings, theta=THETA, local_theta=THETA)
    attention = normalise_rows(fields, read_attention(Fields({}), config))
    return post_norm(fields, config, [
        replace(attention, sliding_window=window, rope=sliding) if near else replace(attention, rope=full)
        for near in read_sliding(fields, config, 4)], fields.flag("attention_bias", False))
