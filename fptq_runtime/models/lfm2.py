"""LFM2: most layers have a short convolution between two gates, some Qwen 3's attention."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from fptq_runtime.kernels.base import Ops, ShortConv
from fptq_runtime.models.block import Block, BlockSpec, Edge, LinearSpec, Model, RecurrentSpec
from fptq_runtime.models.fields import Fields, ModelError, dense_config
from fptq_runtime.models.layers import norms_of, read
from fptq_runtime.models.llama import llama_like, read_attention
from fptq_runtime.models.recurrent import MAX_TAPS, instead_of_attention, leaving, out_and_mlp

NORMS = {"input_norm": "operator_norm", "mlp_norm": "ffn_norm"}


def lfm2(fields: Fields) -> Model:
    config = dense_config(fields, "Lfm2ForCausalLM", default_positions=128000, intermediate=_width(fields),
                          tied=fields.flag("tie_embedding", True))
    hidden, eps = config.hidden_size, fields.number("norm_eps", 1e-5, high=1.0)
    norm, of_heads = norms_of("rms", hidden, eps), norms_of("rms", config.head_dim, eps)
    attention = replace(read_attention(fields, config, theta=1e6), q_norm=of_heads("q_norm", "self_attn.q_layernorm"),
                        k_norm=of_heads("k_norm", "self_attn.k_layernorm"))
    model = llama_like(
        Fields({**fields.data, "hidden_act": "silu"}, fields.where), config, attention,
        norm=lambda name, module: norm(name, NORMS.get(name, module)), o="self_attn.out_proj",
        up=("feed_forward.w1", "feed_forward.w3"), down="feed_forward.w2", last_norm="model.embedding_norm")
    kinds = _layer_types(fields, config.num_layers)
    return replace(model, width_field=None, blocks=tuple(
        _convolving(fields, block, hidden) if kind == "conv" else block
        for block, kind in zip(model.blocks, kinds, strict=True)))


def _convolving(fields: Fields, block: BlockSpec, hidden: int) -> BlockSpec:
    """With rows B | x | C, which the checkpoint has as B | C | x."""
    bias, taps = fields.flag("conv_bias", False), fields.integer("conv_L_cache", 3, high=MAX_TAPS)
    b, c, x = np.arange(3 * hidden).reshape(3, hidden)
    linears = (LinearSpec("in", ("conv.in_proj",), (3 * hidden,), hidden, bias, np.concatenate((b, x, c))),
               LinearSpec("out", ("conv.out_proj",), (hidden,), hidden, bias))
    edges = (Edge("input_norm", ("in",)), Edge("in", ("out",), "conv"))
    arrays: dict[str, tuple[str, tuple[int, ...]]] = {"weight": ("conv.conv.weight", (hidden, 1, taps))}
    if bias:
        arrays["bias"] = ("conv.conv.bias", (hidden,))
    conv = RecurrentSpec(ShortConv("conv", hidden, taps, gated=True), arrays)
    return instead_of_attention(block, conv_block, linears, edges, (conv,))


def conv_block(ops: Ops[Any], block: Block, x: Any) -> Any:
    """layers.pre_norm with a gated convolution in attention's place."""
    [conv] = block.recurrent
    made = ops.short_conv(read(ops, block, x, "input_norm", "in"), conv)
    return out_and_mlp(ops, block, "out", leaving(ops, block, made), leaving(ops, block, x))


def _width(fields: Fields) -> int:
    """Of the MLP, after config.json's rule for it."""
    width = fields.integer(("block_ff_dim", "intermediate_size"), 12288, high=1 << 19)
    if not fields.flag("block_auto_adjust_ff_dim", True):
        return width
    width = int(2 * width / 3)
    factor = fields.optional("block_ffn_dim_multiplier", 1.0)
    if factor is None:
        return width
    multiple = fields.integer("block_multiple_of", 256)
    return multiple * -(-int(factor * width) // multiple)


def _layer_types(fields: Fields, num_layers: int) -> list[str]:
    """Raises ModelError."""
    if fields.get("layer_types") is not None:
        return fields.names("layer_types", ("conv", "full_attention"), num_layers)
    attending = fields.get("full_attn_idxs", list(range(num_layers)))
    if not isinstance(attending, list):
        raise ModelError(f"config.json: full_attn_idxs must be a list of layers, not {attending!r}")
    return ["full_attention" if layer in attending else "conv" for layer in range(num_layers)]
