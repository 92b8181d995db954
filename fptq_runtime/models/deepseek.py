"""DeepSeek V2 and V3, and GLM-4.7-Flash: keys and values of all heads are made of one small vector a token, beside a
key with rope that they share; experts in groups, beside shared ones. What is cached are the keys and values of each
head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from fptq_runtime.kernels.base import Int32Array, Ops, Routing
from fptq_runtime.models.block import Attention, Block, BlockSpec, Edge, LinearSpec, Model, NormSpec
from fptq_runtime.models.fields import Fields, ModelError, dense_config
from fptq_runtime.models.layers import halves, read
from fptq_runtime.models.llama import llama_like
from fptq_runtime.models.moe import (
    behind_norm,
    expert_linears,
    read_grouped_routing,
    read_groups,
    read_routing,
    shared_linears,
    with_experts,
)
from fptq_runtime.models.rope import read_mscale, read_rope

V2 = {"max_position_embeddings": 2048, "moe_intermediate_size": 1407, "n_shared_experts": 2, "q_lora_rank": 1536,
      "n_routed_experts": 64, "first_k_dense_replace": 0}
V3 = {"max_position_embeddings": 4096, "moe_intermediate_size": 2048, "n_shared_experts": 1, "q_lora_rank": 1536,
      "n_routed_experts": 256, "first_k_dense_replace": 3, "n_group": 8, "topk_group": 4, "num_experts_per_tok": 8,
      "routed_scaling_factor": 2.5}
GLM = {"max_position_embeddings": 202752, "moe_intermediate_size": 1536, "n_shared_experts": 1, "q_lora_rank": 768,
       "n_routed_experts": 64, "num_experts_per_tok": 4, "routed_scaling_factor": 1.8, "rms_norm_eps": 1e-5,
       "qk_nope_head_dim": 192, "v_head_dim": 256}  # what config.json may leave out


def deepseek_v2(fields: Fields) -> Model:
    fields = Fields({**V2, **fields.data}, fields.where)
    fields.only("mlp_bias", (False,), False)
    fields.only("norm_topk_prob", (False,), False)
    method = fields.only("topk_method", ("greedy", "group_limited_greedy"), "greedy")
    routing = replace(read_routing(fields, ("n_routed_experts", "num_experts"), normalise=False),
                      scale=fields.number("routed_scaling_factor", 1.0, 1e-9))
    if method == "group_limited_greedy":
        routing = read_groups(fields, routing)
    return _latent(fields, "DeepseekV2ForCausalLM", routing, _behind_dense(fields), interleaved=True)


def deepseek_v3(fields: Fields) -> Model:
    fields = Fields({**V3, **fields.data}, fields.where)
    return _latent(fields, "DeepseekV3ForCausalLM", read_grouped_routing(fields), _behind_dense(fields),
                   fields.flag("rope_interleave", True), "mlp.gate.e_score_correction_bias")


def glm4_moe_lite(fields: Fields) -> Model:
    """GLM-4.7-Flash: DeepSeek V3 with other sizes."""
    fields = Fields({**GLM, **fields.data}, fields.where)
    layers = fields.integer("num_hidden_layers", high=1 << 10)
    sparse = [layer > 0 for layer in range(layers)]
    if fields.get("mlp_layer_types") is not None:
        sparse = [kind == "sparse" for kind in fields.names("mlp_layer_types", ("dense", "sparse"), layers)]
    return _latent(fields, "Glm4MoeLiteForCausalLM", read_grouped_routing(fields), sparse,
                   fields.flag("rope_interleave", True), "mlp.gate.e_score_correction_bias")


def _behind_dense(fields: Fields) -> list[bool]:
    """Which layers have experts."""
    fields.only("moe_layer_freq", (1,), 1)
    first = fields.integer("first_k_dense_replace", low=0)
    return [layer >= first for layer in range(fields.integer("num_hidden_layers", high=1 << 10))]


@dataclass(frozen=True)
class Layout:
    """Where columns come from: of kv_a the vector that keys and values are made of; of q, kv_b and kv_a in one the rows
    q | k | v that attention reads; of what attention makes of values that zeros fill up, the values."""

    latent: Int32Array
    qkv: Int32Array
    values: Int32Array


def _latent(fields: Fields, architecture: str, routing: Routing, sparse: Sequence[bool], interleaved: bool,
            bias: str | None = None) -> Model:
    """sparse: which layers have experts. interleaved: rope's pairs lie side by side. bias: of the routing."""
    rope_dim, plain = fields.integer("qk_rope_head_dim", 64), fields.integer("qk_nope_head_dim", 128)
    dim, value_dim = rope_dim + plain, fields.integer("v_head_dim", 128)
    config = dense_config(Fields({**fields.data, "head_dim": dim}, fields.where), architecture)
    if config.num_kv_heads != config.num_heads or value_dim > dim:
        raise ModelError(f"config.json: latent attention has as many KV heads as heads, and v_head_dim {value_dim} is "
                         f"at most qk_nope_head_dim + qk_rope_head_dim, {dim}")
    rope = read_rope(fields, rope_dim, config.max_position_embeddings)
    attention = Attention(config.num_heads, config.num_heads, dim, dim**-0.5 * read_mscale(fields, rope)**2, rope=rope,
                          value_dim=value_dim)
    model = llama_like(fields, config, attention, o_bias=fields.flag("attention_bias", False))
    width = fields.integer("moe_intermediate_size")
    linears = (*expert_linears("mlp", routing, config.hidden_size, width),
               *shared_linears("mlp.shared_experts", config.hidden_size, width * fields.integer("n_shared_experts")))
    model = with_experts(model, routing, linears, sparse, bias)
    return replace(model, blocks=tuple(_attending(fields, block, attention, rope_dim, interleaved)
                                       for block in model.blocks))


def _attending(fields: Fields, block: BlockSpec, attention: Attention, rope_dim: int, interleaved: bool) -> BlockSpec:
    """With each head of q as rope's part and the other, and kv_b's rows as the heads' keys and then their values."""
    heads, dim, hidden = attention.num_heads, attention.head_dim, block.linear("o").n
    plain, value_dim = dim - rope_dim, attention.value_size // heads
    bias, kv_rank = fields.flag("attention_bias", False), fields.integer("kv_lora_rank", 512)
    turned = halves(rope_dim, rope_dim) if interleaved else np.arange(rope_dim)
    in_head = np.concatenate((plain + turned, np.arange(plain)))
    q_order = (np.arange(heads)[:, None] * dim + in_head).ravel()
    by_head = np.arange(heads * (plain + value_dim)).reshape(heads, -1)
    q_size, k_size, v_size = heads * dim, heads * plain, heads * value_dim
    linears = [
        LinearSpec("kv_a", ("self_attn.kv_a_proj_with_mqa",), (kv_rank + rope_dim,), hidden, bias,
                   np.concatenate((np.arange(kv_rank), kv_rank + turned))),
        LinearSpec("kv_b", ("self_attn.kv_b_proj",), (k_size + v_size,), kv_rank,
                   order=np.concatenate((by_head[:, :plain].ravel(), by_head[:, plain:].ravel()))),
    ]
    norms = [NormSpec("kv_a_norm", ("self_attn.kv_a_layernorm",), (kv_rank,), "rms", 1e-6, inner=True)]
    edges = [Edge("kv_a_norm", ("kv_b",)), Edge("kv_b", ("o",), "attention")]
    if fields.get("q_lora_rank") is None:
        linears.append(LinearSpec("q", ("self_attn.q_proj",), (q_size,), hidden, order=q_order))
        edges.append(Edge("input_norm", ("kv_a", "q")))
    else:
        q_rank = fields.integer("q_lora_rank")
        linears += [LinearSpec("q_a", ("self_attn.q_a_proj",), (q_rank,), hidden, bias),
                    LinearSpec("q_b", ("self_attn.q_b_proj",), (q_size,), q_rank, order=q_order)]
        norms.append(NormSpec("q_a_norm", ("self_attn.q_a_layernorm",), (q_rank,), "rms", 1e-6, inner=True))
        edges += [Edge("input_norm", ("kv_a", "q_a")), Edge("q_a_norm", ("q_b",))]
    shared = np.tile(q_size + k_size + v_size + kv_rank + np.arange(rope_dim), (heads, 1))
    keys = np.concatenate((shared, q_size + np.arange(k_size).reshape(heads, plain)), 1)
    values = np.pad(q_size + k_size + np.arange(v_size).reshape(heads, value_dim), ((0, 0), (0, dim - value_dim)),
                    constant_values=-1)
    layout = Layout(np.arange(kv_rank, dtype=np.int32),
                    np.concatenate((np.arange(q_size), keys.ravel(), values.ravel())).astype(np.int32),
                    (np.arange(heads)[:, None] * dim + np.arange(value_dim)).ravel().astype(np.int32))
    o = replace(block.linear("o"), k=v_size)
    return replace(
        block, forward=partial(latent_block, layout), norms=(*block.norms, *norms),
        linears=(*linears, o, *(linear for linear in block.linears if linear.name not in ("qkv", "o"))),
        edges=(*edges, *(edge for edge in block.edges if edge.writer not in ("input_norm", "qkv"))),
    )


def latent_block(layout: Layout, ops: Ops[Any], block: Block, x: Any) -> Any:
    """layers.pre_norm, with experts in the layers that have some, and attention through small vectors."""
    if "q" in block.linears:
        q = read(ops, block, x, "input_norm", "q")
    else:
        q = read(ops, block, read(ops, block, x, "input_norm", "q_a"), "q_a_norm", "q_b")
    kv_a, attention, o = read(ops, block, x, "input_norm", "kv_a"), block.attention, block.linears["o"]
    kv = read(ops, block, ops.columns((kv_a,), layout.latent), "kv_a_norm", "kv_b")
    qkv = ops.columns((q, kv, kv_a), layout.qkv)
    attended = ops.attention(ops.rope_and_cache(qkv, attention), attention, None, block.last)
    made = ops.quantize(ops.columns((attended,), layout.values), o.act)
    return behind_norm(ops, block, ops.linear(made, o, ops.select_rows(x) if block.last else x))
