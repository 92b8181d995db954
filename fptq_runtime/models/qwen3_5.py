"""Qwen 3.5: three of four layers have a gated delta net, the others attention whose output passes a gate."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from fptq_runtime.kernels.base import GatedDelta, Ops, ShortConv
from fptq_runtime.models.block import Attention, Block, BlockSpec, Edge, LinearSpec, Model, RecurrentSpec
from fptq_runtime.models.fields import MAX_HEAD_DIM, Fields, ModelError, dense_config
from fptq_runtime.models.layers import norms_of, read
from fptq_runtime.models.llama import llama_like, read_attention
from fptq_runtime.models.recurrent import MAX_TAPS, instead_of_attention, leaving, out_and_mlp


def qwen3_5(fields: Fields) -> Model:
    config = dense_config(fields, "Qwen3_5ForCausalLM", default_positions=32768, default_head_dim=256)
    bias, eps = fields.flag("attention_bias", False), fields.number("rms_norm_eps", 1e-6, high=1.0)
    of_heads = norms_of("rms", config.head_dim, eps, offset=1.0)
    attention = replace(read_attention(fields, config, partial=0.25), gated=True,
                        q_norm=of_heads("q_norm", "self_attn.q_norm"), k_norm=of_heads("k_norm", "self_attn.k_norm"))
    model = llama_like(fields, config, attention, qkv_bias=bias, o_bias=bias,
                       norm=norms_of("rms", config.hidden_size, eps, offset=1.0))
    return replace(model, blocks=tuple(
        _attending(block, attention) if kind == "full_attention" else _recurrent(fields, block, eps)
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


def _recurrent(fields: Fields, block: BlockSpec, eps: float) -> BlockSpec:
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
    linears = (
        LinearSpec("qkvz", ("linear_attn.in_proj_qkv", "linear_attn.in_proj_z"), (channels, values), hidden),
        LinearSpec("ba", ("linear_attn.in_proj_b", "linear_attn.in_proj_a"), (value_heads,) * 2, hidden, kept=True),
        LinearSpec("out", ("linear_attn.out_proj",), (hidden,), values),
    )
    conv = RecurrentSpec(ShortConv("conv", channels, taps, silu=True),
                         {"weight": ("linear_attn.conv1d.weight", (channels, 1, taps))})
    delta = RecurrentSpec(GatedDelta("delta", key_heads, value_heads, key_dim, value_dim, eps), {
        "a_log": ("linear_attn.A_log", (value_heads,)), "dt_bias": ("linear_attn.dt_bias", (value_heads,)),
        "norm_weight": ("linear_attn.norm.weight", (value_dim,))})
    return instead_of_attention(block, delta_net, linears, (Edge("input_norm", ("qkvz", "ba")),), (conv, delta))


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
