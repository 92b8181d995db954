"""Phi-3 and Phi-4: Llama with q, k and v in one tensor and gate and up in another, windows, and longrope."""

from __future__ import annotations

from fptq_runtime.kernels.base import Activation
from fptq_runtime.models.block import Attention, BlockSpec, LinearSpec, Model, NormSpec, StemSpec
from fptq_runtime.models.fields import Fields, dense_config, read_curve
from fptq_runtime.models.layers import GATE, PRE_NORM_EDGES, head_spec, pre_norm
from fptq_runtime.models.rope import read_rope


def phi3(fields: Fields) -> Model:
    config = dense_config(fields, "Phi3ForCausalLM", default_positions=4096)
    hidden, width, eps = config.hidden_size, config.intermediate_size, fields.number("rms_norm_eps", 1e-5, high=1.0)
    trained = Fields({"original_max_position_embeddings": 4096, **fields.data})
    window = fields.data.get("sliding_window")
    attention = Attention(
        config.num_heads, config.num_kv_heads, config.head_dim, config.head_dim**-0.5,
        None if window is None else fields.integer("sliding_window", high=1 << 24),
        read_rope(trained, config.head_dim, config.max_position_embeddings, partial=1.0,
                  aliases={"su": "longrope", "yarn": "longrope"}),
    )
    linears = (
        LinearSpec("qkv", ("self_attn.qkv_proj",), (attention.q_size + 2 * attention.kv_size,), hidden),
        LinearSpec("o", ("self_attn.o_proj",), (hidden,), attention.q_size),
        LinearSpec("up", ("mlp.gate_up_proj",), (2 * width,), hidden),
        LinearSpec("down", ("mlp.down_proj",), (hidden,), width),
    )
    norms = (NormSpec("input_norm", ("input_layernorm",), (hidden,), "rms", eps),
             NormSpec("mlp_norm", ("post_attention_layernorm",), (hidden,), "rms", eps))
    activation = Activation(read_curve(fields, "hidden_act", "silu"), gated=True)
    return Model(
        config,
        StemSpec("model.embed_tokens"),
        tuple(BlockSpec(f"layers.{i}", f"model.layers.{i}.", pre_norm, linears, norms, (*PRE_NORM_EDGES, GATE),
                        ("o", "down"), attention, activation) for i in range(config.num_layers)),
        head_spec(NormSpec("norm", ("model.norm",), (hidden,), "rms", eps), "lm_head", config.vocab_size, hidden),
    )
