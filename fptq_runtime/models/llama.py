"""Llama: pre-norms, rotary attention with grouped KV heads, a gated MLP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fptq_runtime.config import ModelConfig
from fptq_runtime.kernels.base import Activation
from fptq_runtime.models.block import Attention, BlockSpec, LinearSpec, Model, NormSpec, StemSpec
from fptq_runtime.models.fields import Fields, dense_config, read_curve
from fptq_runtime.models.layers import GATE, PRE_NORM_EDGES, head_spec, pre_norm
from fptq_runtime.models.rope import read_rope


def llama(fields: Fields) -> Model:
    config = dense_config(fields, "LlamaForCausalLM")
    bias = fields.flag("attention_bias", False)
    return llama_like(fields, config, read_attention(fields, config), qkv_bias=bias, o_bias=bias,
                      mlp_bias=fields.flag("mlp_bias", False))


def read_attention(fields: Fields, config: ModelConfig) -> Attention:
    return Attention(
        config.num_heads, config.num_kv_heads, config.head_dim, config.head_dim**-0.5,
        rope=read_rope(fields, config.head_dim, config.max_position_embeddings),
    )


def llama_like(fields: Fields, config: ModelConfig, attention: Attention, *, windows: Sequence[int | None] = (),
               qkv_bias: bool = False, o_bias: bool = False, mlp_bias: bool = False) -> Model:
    """Llama's tensors and order of things around another attention. windows: each layer's; none unless given."""
    hidden, width, eps = config.hidden_size, config.intermediate_size, fields.number("rms_norm_eps", 1e-6, high=1.0)
    linears = (
        LinearSpec("qkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                   (attention.q_size, attention.kv_size, attention.kv_size), hidden, qkv_bias),
        LinearSpec("o", ("self_attn.o_proj",), (hidden,), attention.q_size, o_bias),
        LinearSpec("up", ("mlp.gate_proj", "mlp.up_proj"), (width, width), hidden, mlp_bias),
        LinearSpec("down", ("mlp.down_proj",), (hidden,), width, mlp_bias),
    )
    norms = (NormSpec("input_norm", ("input_layernorm",), (hidden,), "rms", eps),
             NormSpec("mlp_norm", ("post_attention_layernorm",), (hidden,), "rms", eps))
    activation = Activation(read_curve(fields, "hidden_act", "silu"), gated=True)
    return Model(
        config,
        StemSpec("model.embed_tokens"),
        tuple(BlockSpec(f"layers.{i}", f"model.layers.{i}.", pre_norm, linears, norms, (*PRE_NORM_EDGES, GATE),
                        ("o", "down"), replace(attention, sliding_window=window), activation)
              for i, window in enumerate(windows or (None,) * config.num_layers)),
        head_spec(NormSpec("norm", ("model.norm",), (hidden,), "rms", eps), "lm_head", config.vocab_size, hidden),
    )
