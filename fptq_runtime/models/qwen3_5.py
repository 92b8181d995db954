"""Qwen 3.5 and Qwen3-Next: three of four layers have a gated delta net, the others attention whose output passes a
gate; behind either an MLP, or experts beside one that every token takes, behind a gate too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fptq_runtime.config import ModelConfig
from fptq_runtime.kernels.base import GatedDelta, Ops, Routing, ShortConv
from fptq_runtime.models.block import Attention, Block, BlockSpec, Edge, LinearSpec, Model, RecurrentSpec, Stacked
from fptq_runtime.models.fields import MAX_HEAD_DIM, Fields, ModelError, dense_config
from fptq_runtime.models.layers import norms_of, read
from fptq_runtime.models.llama import llama_like, read_attention
from fptq_runtime.models.moe import expert_linears, read_routing, shared_linears, sparse_layers, with_experts
from fptq_runtime.models.recurrent import MAX_TAPS, instead_of_attention, leaving, out_and_mlp


def qwen3_5(fields: Fields) -> Model:
    return _hybrid(fields, dense_config(fields, "Qwen3_5ForCausalLM", default_positions=32768, default_head_dim=256))


def qwen3_5_moe(fields: Fields) -> Model:
    config = dense_config(fields, "Qwen3_5MoeForCausalLM", default_positions=32768, default_head_dim=256,
                          intermediate=fields.integer("moe_intermediate_size", 512))
    routing = read_routing(fields, "num_experts", default_experts=256, default_top_k=8, normalise=True)
    return _hybrid(fields, config, routing)


def qwen3_next(fields: Fields) -> Model:
    """Whose q, k, v and z are one tensor by key heads, and b and a another."""
    config = dense_config(fields, "Qwen3NextForCausalLM", default_positions=32768, default_head_dim=256)
    routing = read_routing(fields, "num_experts", default_experts=512, default_top_k=10,
                           normalise=fields.flag("norm_topk_prob", True))
    return _hybrid(fields, config, routing, sparse_layers(fields, config.num_layers), by_key_heads=True)


def _hybrid(fields: Fields, config: ModelConfig, routing: Routing | None = None, sparse: Sequence[bool] = (),
            by_key_heads: bool = False) -> Model:
    """With experts where there is a routing, in the layers that `sparse` says, or in all."""
    bias, eps = fields.flag("attention_bias", False), fields.number("rms_norm_eps", 1e-6, high=1.0)
    of_heads = norms_of("rms", config.head_dim, eps, offset=1.0)
    attention = replace(read_attention(fields, config, partial=0.25), gated=True,
                        q_norm=of_heads("q_norm", "self_attn.q_norm"), k_norm=of_heads("k_norm", "self_attn.k_norm"))
    model = llama_like(fields, config, attention, qkv_bias=bias, o_bias=bias,
                       norm=norms_of("rms", config.hidden_size, eps, offset=1.0))
    if routing is not None:
        hidden, width = config.hidden_size, fields.integer("moe_intermediate_size", 512)
        model = with_experts(model, routing, (
            *expert_linears("mlp", routing, hidden, width, stacked=(Stacked("mlp.experts.gate_up_proj"),
                                                                    Stacked("mlp.experts.down_proj"))),
            *shared_linears("mlp.shared_expert", hidden, fields.integer("shared_expert_intermediate_size", 512)),
            LinearSpec("shared.gate", ("mlp.shared_expert_gate",), (1,), hidden, kept=True)), sparse)
    return replace(model, blocks=tuple(
        _attending(block, attention) if kind == "full_attention" else _recurrent(fields, block, eps, by_key_heads)
        for block, kind in zip(model.blocks, _layer_types(fields, config.num_layers), strict=True)))


def _attending(block: BlockSpec, attention: Attention) -> BlockSpec:
    """With rows gate | q | k | v; the checkpoint has each head's q before its gate."""
    size, kv = attention.q_size, attention.kv_size
    by_head = np.arange(2 * size).reshape(attention.num_heads, 2, attention.head_dim)
    order = np.concatenate((by_head[:, 1].ravel(), by_head[:, 0].ravel(), np.arange(2 * size, 2 * (size + kv))))
    qkv, *others = block.linears
    return replace(block, forward=gated_attention,
                   linears=(replace(qkv, sizes=(2 * size, kv, kv), order=order), *others))


def gated_attention(ops: Ops[Any], block: Block, x: Any) -> Any:
    """layers.pre_norm whose attention passes a gate on its way to `o`."""
    qkv = read(ops, block, x, "input_norm", "qkv")
    attended = ops.attention(ops.rope_and_cache(qkv, block.attention), block.attention, None, block.last)
    return out_and_mlp(ops, block, "o", ops.gate(attended, leaving(ops, block, qkv)), leaving(ops, block, x))


def _recurrent(fields: Fields, block: BlockSpec, eps: float, by_key_heads: bool) -> BlockSpec:
    """Raises ModelError."""
    fields.only("hidden_act", ("silu", "swish"), "silu")  # which the convolution shares with the MLP
    key_heads, value_heads = (fields.integer(f"linear_num_{each}_heads", default, high=1 << 10)
                              for each, default in (("key", 16), ("value", 32)))
    key_dim, value_dim = (fields.integer(f"linear_{each}_head_dim", 128, high=MAX_HEAD_DIM)
                          for each in ("key", "value"))
    if value_heads % key_heads:
        raise ModelError(f"config.json: {value_heads} linear_num_value_heads are not a multiple of {key_heads} "
                         "linear_num_key_heads")
    taps = fields.integer("linear_conv_kernel_dim", 4, high=MAX_TAPS)
    hidden, values = block.linears[0].k, value_heads * value_dim
    channels = 2 * key_heads * key_dim + values
    qkvz = LinearSpec("qkvz", ("linear_attn.in_proj_qkv", "linear_attn.in_proj_z"), (channels, values), hidden)
    ba = LinearSpec("ba", ("linear_attn.in_proj_b", "linear_attn.in_proj_a"), (value_heads,) * 2, hidden, kept=True)
    if by_key_heads:
        each = values // key_heads
        qkvz = replace(qkvz, modules=("linear_attn.in_proj_qkvz",), sizes=(qkvz.n,),
                       order=_apart(key_heads, (key_dim, key_dim, each, each)))
        ba = replace(ba, modules=("linear_attn.in_proj_ba",), sizes=(ba.n,),
                     order=_apart(key_heads, (value_heads // key_heads,) * 2))
    linears = (qkvz, ba, LinearSpec("out", ("linear_attn.out_proj",), (hidden,), values))
    conv = RecurrentSpec(ShortConv("conv", channels, taps, silu=True),
                         {"weight": ("linear_attn.conv1d.weight", (channels, 1, taps))})
    delta = RecurrentSpec(GatedDelta("delta", key_heads, value_heads, key_dim, value_dim, eps), {
        "a_log": ("linear_attn.A_log", (value_heads,)), "dt_bias": ("linear_attn.dt_bias", (value_heads,)),
        "norm_weight": ("linear_attn.norm.weight", (value_dim,))})
    return instead_of_attention(block, delta_net, linears, (Edge("input_norm", ("qkvz", "ba")),), (conv, delta))


def _apart(heads: int, sizes: Sequence[int]) -> np.ndarray:
    """The row order of a tensor that is stored as [head, rows of each size]: each size's rows of all heads together."""
    stored = np.arange(heads * sum(sizes)).reshape(heads, -1)
    return np.concatenate([part.ravel() for part in np.split(stored, np.cumsum(sizes)[:-1], axis=1)])


def delta_net(ops: Ops[Any], block: Block, x: Any) -> Any:
    """layers.pre_norm with a gated delta net in attention's place. What b and a make is not rounded: a state remembers
    it."""
    h, (qkvz, ba) = ops.norm(x, block.norms["input_norm"], None), (block.linears["qkvz"], block.linears["ba"])
    conv, delta = block.recurrent
    mixed = ops.short_conv(ops.linear(ops.quantize(h, qkvz.act), qkvz), conv)
    made = ops.gated_delta(mixed, ops.linear(ops.quantize(h, ba.act), ba), delta)
    return out_and_mlp(ops, block, "out", leaving(ops, block, made), leaving(ops, block, x))


def _layer_types(fields: Fields, num_layers: int) -> list[str]:
    kinds = ("linear_attention", "full_attention")
    if fields.get("layer_types") is not None:
        return fields.names("layer_types", kinds, num_layers)
    interval = fields.integer("full_attention_interval", 4)
    return [kinds[(layer + 1) % interval == 0] for layer in range(num_layers)]
