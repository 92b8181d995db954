"""Qwen2-MoE: Qwen2 with experts in the MLP's place, and beside them one that every token takes, behind a gate."""

from __future__ import annotations

from fptq_runtime.models.block import LinearSpec, Model
from fptq_runtime.models.fields import Fields, dense_config
from fptq_runtime.models.llama import llama_like, read_attention
from fptq_runtime.models.mistral import read_window
from fptq_runtime.models.moe import expert_linears, read_routing, shared_linears, sparse_layers, with_experts


def qwen2_moe(fields: Fields) -> Model:
    config = dense_config(fields, "Qwen2MoeForCausalLM", default_positions=32768)
    hidden = config.hidden_size
    routing = read_routing(fields, "num_experts", default_experts=60, default_top_k=4,
                           normalise=fields.flag("norm_topk_prob", False))
    model = llama_like(fields, config, read_attention(fields, config), windows=_read_windows(fields, config.num_layers),
                       qkv_bias=fields.flag("qkv_bias", True))
    linears = (
        *expert_linears("mlp", routing, hidden, fields.integer("moe_intermediate_size", 1408)),
        *shared_linears("mlp.shared_expert", hidden, fields.integer("shared_expert_intermediate_size", 5632)),
        LinearSpec("shared.gate", ("mlp.shared_expert_gate",), (1,), hidden, kept=True),
    )
    return with_experts(model, routing, linears, sparse_layers(fields, config.num_layers))


def _read_windows(fields: Fields, num_layers: int) -> tuple[int | None, ...]:
    """Each layer's: as `layer_types` has them, else every second one's of the first `max_window_layers`."""
    window = read_window(fields) if fields.flag("use_sliding_window", False) else None
    if window is None:
        return (None,) * num_layers
    if fields.get("layer_types") is None:
        first = fields.integer("max_window_layers", 28, low=0)
        return tuple(window if i % 2 == 0 and i < first else None for i in range(num_layers))
    kinds = fields.names("layer_types", ("full_attention", "sliding_attention"), num_layers)
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
