"""Qwen3-MoE: Qwen3 with experts in the MLP's place, in all layers or in some."""

from __future__ import annotations

from fptq_runtime.models.block import Model
from fptq_runtime.models.fields import Fields, dense_config
from fptq_runtime.models.mistral import read_window
from fptq_runtime.models.moe import expert_linears, read_routing, sparse_layers, with_experts
from fptq_runtime.models.qwen3 import qwen3_like


def qwen3_moe(fields: Fields) -> Model:
    config = dense_config(fields, "Qwen3MoeForCausalLM", default_positions=32768)
    routing = read_routing(fields, ("num_experts", "num_local_experts"), default_experts=128, default_top_k=8,
                           normalise=fields.flag("norm_topk_prob", False))
    window = read_window(fields) if fields.flag("use_sliding_window", False) else None
    model = qwen3_like(fields, config, (window,) * config.num_layers)
    linears = expert_linears("mlp", routing, config.hidden_size, fields.integer("moe_intermediate_size", 768))
    return with_experts(model, routing, linears, sparse_layers(fields, config.num_layers))
