"""Phi-3.5-MoE: Mixtral with LayerNorms, biases, longrope and a router of its own."""

from __future__ import annotations

from dataclasses import replace

from fptq_runtime.models.block import Model
from fptq_runtime.models.fields import Fields, ModelError, dense_config
from fptq_runtime.models.layers import norms_of
from fptq_runtime.models.llama import llama_like, read_attention
from fptq_runtime.models.mistral import read_window
from fptq_runtime.models.moe import expert_linears, read_routing, with_experts


def phimoe(fields: Fields) -> Model:
    config = dense_config(fields, "PhimoeForCausalLM", default_positions=131072)
    fields.only("num_experts_per_tok", (2,), 2)
    routing = replace(
        read_routing(fields, "num_local_experts", default_experts=16, default_top_k=2, normalise=False),
        scoring="sparsemixer", jitter=fields.number("router_jitter_noise", 0.01, high=1.0))
    bias, window = fields.flag("attention_bias", False), fields.get("sliding_window")
    norm = norms_of("layer", config.hidden_size, fields.number("rms_norm_eps", 1e-5, high=1.0), bias=True)
    model = llama_like(
        fields, config, read_attention(_with_mscale(fields), config, theta=1e6), qkv_bias=bias, o_bias=bias, norm=norm,
        windows=(None if window is None else read_window(fields),) * config.num_layers,
        head_bias=fields.flag("lm_head_bias", False))
    linears = expert_linears("block_sparse_moe", routing, config.hidden_size, config.intermediate_size, up=("w1", "w3"),
                             down="w2")
    return with_experts(model, routing, linears)


def _with_mscale(fields: Fields) -> Fields:
    """With what cosines and sines are multiplied by where everyone's longrope looks for it. Raises ModelError."""
    name = next((name for name in ("rope_scaling", "rope_parameters") if fields.get(name)), "")
    rope = fields.get(name)
    if not isinstance(rope, dict) or rope.get("rope_type", rope.get("type", "default")) == "default":
        return fields
    short, long = (Fields(rope, f"{fields.where}: {name}").number(f"{each}_mscale", 1.0, 1e-6)
                   for each in ("short", "long"))
    if short != long:
        raise ModelError(f"{fields.where}: {name}: short_mscale {short:g} and long_mscale {long:g} differ, which is "
                         "not supported")
    return Fields({**fields.data, name: {**rope, "attention_factor": short}}, fields.where)
