"""OLMoE: Llama with experts in the MLP's place, and q and k normalised over all their heads."""

from __future__ import annotations

from dataclasses import replace

from fptq_runtime.models.block import Model, NormSpec
from fptq_runtime.models.fields import Fields, dense_config
from fptq_runtime.models.llama import llama_like, read_attention
from fptq_runtime.models.moe import expert_linears, read_routing, with_experts


def olmoe(fields: Fields) -> Model:
    config = dense_config(fields, "OlmoeForCausalLM", default_positions=4096)
    fields.only("clip_qkv", (None,), None)
    routing = read_routing(fields, ("num_experts", "num_local_experts"), default_experts=64, default_top_k=8,
                           normalise=fields.flag("norm_topk_prob", False))
    eps, bias = fields.number("rms_norm_eps", 1e-5, high=1.0), fields.flag("attention_bias", False)
    attention = read_attention(fields, config)
    attention = replace(
        attention,
        q_norm=NormSpec("q_norm", ("self_attn.q_norm",), (attention.q_size,), "rms", eps),
        k_norm=NormSpec("k_norm", ("self_attn.k_norm",), (attention.kv_size,), "rms", eps),
    )
    model = llama_like(fields, config, attention, qkv_bias=bias, o_bias=bias)
    return with_experts(model, routing, expert_linears("mlp", routing, config.hidden_size, config.intermediate_size))
