"""GraniteMoE: Granite with experts in the MLP's place, all of them in one tensor."""

from __future__ import annotations

from fptq_runtime.models.block import Model
from fptq_runtime.models.fields import Fields, dense_config
from fptq_runtime.models.granite import granite_experts, with_multipliers
from fptq_runtime.models.llama import llama_like, read_attention
from fptq_runtime.models.moe import with_experts


def granite_moe(fields: Fields) -> Model:
    config = dense_config(fields, "GraniteMoeForCausalLM")
    bias = fields.flag("attention_bias", False)
    model = llama_like(fields, config, read_attention(fields, config), qkv_bias=bias, o_bias=bias)
    return with_multipliers(fields, with_experts(
        model, *granite_experts(fields, config.hidden_size, config.intermediate_size)))
