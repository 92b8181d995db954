"""EXAONE 4: norms behind attention and MLP alone, one over each head of q and k, and, where layers have windows, no
rope in those that have none."""

from __future__ import annotations

from dataclasses import replace

from fptq_runtime.models.block import Model, NormSpec
from fptq_runtime.models.fields import Fields, dense_config
from fptq_runtime.models.gemma2 import read_sliding
from fptq_runtime.models.llama import read_attention
from fptq_runtime.models.mistral import read_window
from fptq_runtime.models.olmo2 import EPS, post_norm


def exaone4(fields: Fields) -> Model:
    config = dense_config(fields, "Exaone4ForCausalLM")
    eps = fields.number("rms_norm_eps", EPS, high=1.0)
    attention = replace(
        read_attention(fields, config),
        q_norm=NormSpec("q_norm", ("self_attn.q_norm",), (config.head_dim,), "rms", eps),
        k_norm=NormSpec("k_norm", ("self_attn.k_norm",), (config.head_dim,), "rms", eps),
    )
    window = read_window(fields)
    if window is None:
        return post_norm(fields, config, [attention] * config.num_layers)
    pattern = fields.get("sliding_window_pattern", 4)
    if isinstance(pattern, str):  # "LLLG": local three times, then global
        pattern = len(pattern)
    near = read_sliding(Fields({**fields.data, "sliding_window_pattern": pattern}), config,
                        Fields({"sliding_window_pattern": pattern}).integer("sliding_window_pattern"))
    return post_norm(fields, config, [replace(attention, sliding_window=window) if each else
                                      replace(attention, rope=None) for each in near])
