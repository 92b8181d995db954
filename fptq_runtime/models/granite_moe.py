"""GraniteMoE: Granite with experts in the MLP's place, all of them in one tensor."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fptq_runtime.kernels.base import Ops
from fptq_runtime.models.block import Block, Model, Stacked
from fptq_runtime.models.fields import Fields, dense_config
from fptq_runtime.models.granite import with_multipliers
from fptq_runtime.models.layers import attend, read
from fptq_runtime.models.llama import llama_like, read_attention
from fptq_runtime.models.moe import expert_linears, experts, read_routing, with_experts


def granite_moe(fields: Fields) -> Model:
    config = dense_config(fields, "GraniteMoeForCausalLM")
    routing = read_routing(fields, "num_local_experts", default_experts=8, default_top_k=2, normalise=True)
    linears = expert_linears(
        "block_sparse_moe", routing, config.hidden_size, config.intermediate_size, router="router.layer",
        stacked=(Stacked("block_sparse_moe.input_linear.weight"), Stacked("block_sparse_moe.output_linear.weight")))
    bias = fields.flag("attention_bias", False)
    llama = llama_like(fields, config, read_attention(fields, config), qkv_bias=bias, o_bias=bias)
    model = with_experts(with_multipliers(fields, llama), routing, linears)
    share = fields.number("residual_multiplier", 1.0, 1e-9)

    def forward(ops: Ops[Any], block: Block, x: Any) -> Any:
        attended, x = attend(ops, block, read(ops, block, x, "input_norm", "qkv"), x)
        x = ops.add(x, ops.scale(ops.linear(attended, block.linears["o"]), share))
        return ops.add(x, ops.scale(experts(ops, block, ops.norm(x, block.norms["mlp_norm"], None)), share))

    return replace(model, blocks=tuple(replace(block, forward=forward) for block in model.blocks))
