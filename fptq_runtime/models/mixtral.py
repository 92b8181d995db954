"""Mixtral: Mistral with experts in the MLP's place."""

from __future__ import annotations

from fptq_runtime.models.block import Model
from fptq_runtime.models.fields import Fields, dense_config
from fptq_runtime.models.llama import llama_like, read_attention
from fptq_runtime.models.mistral import read_window
from fptq_runtime.models.moe import expert_linears, read_routing, with_experts


def mixtral(fields: Fields) -> Model:
    config = dense_config(fields, "MixtralForCausalLM", default_positions=131072)
    routing = read_routing(fields, ("num_local_experts", "num_experts"), default_experts=8, default_top_k=2,
                           normalise=True)
    window = read_window(fields) if fields.get("sliding_window") is not None else None
    attention = read_attention(fields, config, theta=1e6)
    model = llama_like(fields, config, attention, windows=(window,) * config.num_layers)
    linears = expert_linears("block_sparse_moe", routing, config.hidden_size, config.intermediate_size, up=("w1", "w3"),
                             down="w2")
    return with_experts(model, routing, linears)
