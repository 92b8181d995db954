"""StableLM: rope on a part of each head, LayerNorms, a gated MLP; where asked for a norm of its own for each head of q
and k, and attention and MLP side by side behind one norm."""

from __future__ import annotations

from fptq_runtime.kernels.base import Activation
from fptq_runtime.models.block import Attention, BlockSpec, Edge, LinearSpec, Model, NormSpec, StemSpec
from fptq_runtime.models.fields import Fields, dense_config, read_curve
from fptq_runtime.models.layers import GATE, ONE_NORM_EDGES, PRE_NORM_EDGES, head_spec, parallel, pre_norm
from fptq_runtime.models.rope import read_rope


def stablelm(fields: Fields) -> Model:
    config = dense_config(fields, "StableLmForCausalLM", default_positions=4096)
    hidden, width, eps = config.hidden_size, config.intermediate_size, fields.number("layer_norm_eps", 1e-5, high=1.0)
    by_head = fields.flag("qk_layernorm", False)

    def head_norm(name: str, module: str, heads: int) -> NormSpec | None:
        modules = tuple(f"self_attn.{module}.norms.{i}" for i in range(heads))
        return NormSpec(name, modules, (heads, config.head_dim), "layer", eps) if by_head else None

    attention = Attention(
        config.num_heads, config.num_kv_heads, config.head_dim, config.head_dim**-0.5,
        rope=read_rope(fields, config.head_dim, config.max_position_embeddings, partial=0.25),
        q_norm=head_norm("q_norm", "q_layernorm", config.num_heads),
        k_norm=head_norm("k_norm", "k_layernorm", config.num_kv_heads),
    )
    qkv_bias = fields.flag("use_qkv_bias", False)
    linears = (
        LinearSpec("qkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                   (attention.q_size, attention.kv_size, attention.kv_size), hidden, qkv_bias),
        LinearSpec("o", ("self_attn.o_proj",), (hidden,), attention.q_size),
        LinearSpec("up", ("mlp.gate_proj", "mlp.up_proj"), (width, width), hidden),
        LinearSpec("down", ("mlp.down_proj",), (hidden,), width),
    )
    norms: tuple[NormSpec, ...] = (
        NormSpec("input_norm", ("input_layernorm",), (hidden,), "layer", eps, bias=True),
        NormSpec("mlp_norm", ("post_attention_layernorm",), (hidden,), "layer", eps, bias=True))
    edges: tuple[Edge, ...] = (*PRE_NORM_EDGES, GATE)
    side_by_side = fields.flag("use_parallel_residual", False)
    if side_by_side:
        norms, edges = norms[:1], (*ONE_NORM_EDGES, GATE)
    activation = Activation(read_curve(fields, "hidden_act", "silu"), gated=True)
    return Model(
        config,
        StemSpec("model.embed_tokens"),
        tuple(BlockSpec(f"layers.{i}", f"model.layers.{i}.", parallel if side_by_side else pre_norm, linears, norms,
                        edges, ("o", "down"), attention, activation) for i in range(config.num_layers)),
        head_spec(NormSpec("norm", ("model.norm",), (hidden,), "layer", eps, bias=True), "lm_head", config.vocab_size,
                  hidden),
    )
