"""Hunyuan, dense: Llama with an RMSNorm over each head of q and k behind rope, whose base is scaled by `alpha`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from fptq_runtime.config import ModelConfig
from fptq_runtime.models.block import Model, NormSpec
from fptq_runtime.models.fields import Fields, dense_config
from fptq_runtime.models.llama import llama_like, read_attention


def hunyuan(fields: Fields) -> Model:
    config = dense_config(fields, "HunYuanDenseV1ForCausalLM")
    eps, bias = fields.number("rms_norm_eps", 1e-5, high=1.0), fields.flag("attention_bias", False)
    q_norm, k_norm = (NormSpec(f"{name[0]}_norm", (f"self_attn.{name}_layernorm",), (config.head_dim,), "rms", eps)
                      for name in ("query", "key"))
    attention = replace(read_attention(with_alpha(fields, config), config), q_norm=q_norm, k_norm=k_norm,
                        norm_after_rope=True)
    return llama_like(fields, config, attention, qkv_bias=bias, o_bias=bias, eps=1e-5)


def with_alpha(fields: Fields, config: ModelConfig) -> Fields:
    """A "dynamic" rope with `alpha` is a plain one of a base that is alpha^(d / (d - 2)) as large."""
    given = fields.data.get("rope_scaling") or fields.data.get("rope_parameters")
    if not isinstance(given, Mapping) or not given.get("alpha") \
            or given.get("rope_type", given.get("type")) != "dynamic" or config.head_dim <= 2:
        return fields
    rope = Fields({"rope_theta": fields.data.get("rope_theta"), **given}, f"{fields.where}: rope_parameters")
    theta = rope.number("rope_theta", 10000.0, low=1.0) * rope.number("alpha") ** (
        config.head_dim / (config.head_dim - 2))
    return Fields({**fields.data, "rope_scaling": None, "rope_parameters": {"rope_theta": theta}}, fields.where)
