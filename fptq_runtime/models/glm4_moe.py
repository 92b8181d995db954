"""GLM-4-MoE (GLM-4.5, 4.6): Llama with biases of q, k and v and rope on a part of each head; behind the first layers,
experts chosen by sigmoid scores with a bias, beside shared ones."""

from __future__ import annotations

from dataclasses import replace

from fptq_runtime.models.block import Model, NormSpec
from fptq_runtime.models.fields import Fields, dense_config
from fptq_runtime.models.llama import llama_like, read_attention
from fptq_runtime.models.moe import expert_linears, read_grouped_routing, shared_linears, with_experts


def glm4_moe(fields: Fields) -> Model:
    config = dense_config(fields, "Glm4MoeForCausalLM", default_positions=131072)
    hidden, eps = config.hidden_size, fields.number("rms_norm_eps", 1e-5, high=1.0)
    attention = read_attention(fields, config, partial=0.5)
    if fields.flag("use_qk_norm", False):
        attention = replace(
            attention,
            q_norm=NormSpec("q_norm", ("self_attn.q_norm",), (config.head_dim,), "rms", eps),
            k_norm=NormSpec("k_norm", ("self_attn.k_norm",), (config.head_dim,), "rms", eps),
        )
    routing = read_grouped_routing(fields, default_experts=128, default_top_k=8)
    width = fields.integer("moe_intermediate_size", 1408)
    model = llama_like(fields, config, attention, qkv_bias=fields.flag("attention_bias", False))
    linears = (*expert_linears("mlp", routing, hidden, width),
               *shared_linears("mlp.shared_experts", hidden, width * fields.integer("n_shared_experts", 1)))
    dense = fields.integer("first_k_dense_replace", 1, low=0)
    return with_experts(model, routing, linears, [layer >= dense for layer in range(config.num_layers)],
                        routing_bias="mlp.gate.e_score_correction_bias")
