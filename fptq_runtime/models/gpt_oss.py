"""gpt-oss: biases everywhere, sinks, windows in every second layer, and experts with a clamped activation, all of them
in one tensor, as MXFP4 or in float."""

from __future__ import annotations

from dataclasses import replace

from fptq_runtime.kernels.base import Activation
from fptq_runtime.models.block import Model, Stacked
from fptq_runtime.models.fields import Fields, dense_config
from fptq_runtime.models.llama import llama_like, read_attention
from fptq_runtime.models.moe import expert_linears, read_routing, with_experts

YARN = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
        "original_max_position_embeddings": 4096}  # where config.json has no rope


def gpt_oss(fields: Fields) -> Model:
    if fields.get("rope_parameters") is None and fields.get("rope_scaling") is None:
        fields = Fields({**fields.data, "rope_parameters": YARN})
    config = dense_config(fields, "GptOssForCausalLM", default_head_dim=64, default_positions=131072)
    fields.only("swiglu_alpha", (1.702,), 1.702)
    fields.only("hidden_act", ("silu",), "silu")
    bias = fields.flag("attention_bias", True)
    window = fields.integer("sliding_window", 128, high=1 << 24)
    kinds = ["sliding_attention" if i % 2 == 0 else "full_attention" for i in range(config.num_layers)]
    if fields.get("layer_types") is not None:
        kinds = fields.names("layer_types", ("full_attention", "sliding_attention"), config.num_layers)
    routing = read_routing(fields, ("num_local_experts", "num_experts"), default_experts=128, default_top_k=4,
                           normalise=True)
    attention = replace(read_attention(fields, config, theta=150000.0), sinks="self_attn.sinks")
    model = llama_like(fields, config, attention, qkv_bias=bias, o_bias=bias,
                       windows=[window if kind == "sliding_attention" else None for kind in kinds])
    linears = expert_linears(
        "mlp", routing, config.hidden_size, config.intermediate_size, router="router", bias=True,
        stacked=(Stacked("mlp.experts.gate_up_proj", transposed=True, interleaved=True),
                 Stacked("mlp.experts.down_proj", transposed=True)))
    model = with_experts(model, routing, linears)
    activation = Activation("clamped_swiglu", gated=True, limit=fields.number("swiglu_limit", 7.0, low=1e-6))
    return replace(model, blocks=tuple(replace(block, activation=activation) for block in model.blocks))
