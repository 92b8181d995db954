"""Falcon-H1: Mamba-2 and attention side by side behind one norm, then an MLP; a multiplier for what each linear makes.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from fptq_runtime.kernels.base import Array, Ops
from fptq_runtime.models.block import Block, Edge, LinearSpec, Model
from fptq_runtime.models.fields import Fields, dense_config
from fptq_runtime.models.layers import attend, head, mlp, norms_of, read
from fptq_runtime.models.llama import llama_like, read_attention
from fptq_runtime.models.mamba import mamba2, mamba_config, mixed, written

MODULES = {"mlp_norm": "pre_ff_layernorm"}


def falcon_h1(fields: Fields) -> Model:
    for name in ("attention_bias", "mlp_bias", "mamba_proj_bias", "projectors_bias"):
        fields.only(name, (False,), False)
    fields.only("hidden_act", ("silu", "swish"), "silu")  # which the convolution shares with the MLP
    config = dense_config(fields, "FalconH1ForCausalLM", default_positions=8192)
    hidden, eps = config.hidden_size, fields.number("rms_norm_eps", 1e-5, high=1.0)
    norm, attention = norms_of("rms", hidden, eps), read_attention(fields, config)
    model = llama_like(
        fields, config, attention, norm=lambda name, module: norm(name, MODULES.get(name, module)),
        up=("feed_forward.gate_proj", "feed_forward.up_proj"), down="feed_forward.down_proj",
        last_norm="model.final_layernorm")
    normed = fields.flag("mamba_rms_norm", False)
    inner = fields.integer("mamba_d_ssm", 1024) if fields.data.get("mamba_d_ssm", 1024) is not None else None
    space, taps = mamba_config(fields, hidden, eps, 128, 1, 256, 4, inner)
    space = replace(space, gate_last=normed and fields.flag("mamba_norm_before_gate", True))
    mixer = mamba2("mamba", hidden, space, taps, bias=False, out_bias=False,
                   conv_bias=fields.flag("mamba_conv_bias", True), normed=normed)
    width, part = config.intermediate_size, space.groups * space.state
    z, x, b, c, dt = _numbers(fields, "ssm_multipliers", 5)
    gate, down = _numbers(fields, "mlp_multipliers", 2)
    factors = {
        "in": _rows((space.channels, x), (part, b), (part, c), (space.channels, z), (space.heads, dt)),
        "out": _rows((hidden, _number(fields, "ssm_out_multiplier"))),
        "qkv": _rows((attention.q_size, 1.0), (attention.kv_size, _number(fields, "key_multiplier")),
                     (attention.kv_size, 1.0)),
        "o": _rows((hidden, _number(fields, "attention_out_multiplier"))),
        "up": _rows((width, gate), (width, 1.0)), "down": _rows((hidden, down)),
    }
    linears = tuple(_multiplied(linear, factors[linear.name]) for linear in (*mixer.linears, *model.blocks[0].linears))
    edges = (Edge("input_norm", ("in", "qkv")),
             *(edge for edge in model.blocks[0].edges if edge.writer != "input_norm"))
    forward = partial(side_by_side, _number(fields, "ssm_in_multiplier"), _number(fields, "attention_in_multiplier"))
    factor = _number(fields, "lm_head_multiplier")

    def logits(ops: Ops[Any], block: Block, x: Any) -> Any:
        return ops.scale(head(ops, block, x), factor)

    return replace(
        model, stem=replace(model.stem, scale=_number(fields, "embedding_multiplier")),
        blocks=tuple(replace(block, forward=forward, linears=linears, edges=edges, recurrent=mixer.recurrent,
                             residual=("out", "o", "down")) for block in model.blocks),
        head=replace(model.head, forward=logits))


def side_by_side(mixing: float, attending: float, ops: Ops[Any], block: Block, x: Any) -> Any:
    """x + out(mixer(mixing · norm(x))) + o(attention(attending · norm(x))), then + mlp(norm of that)."""
    h = ops.norm(x, block.norms["input_norm"], None)

    def made_of(factor: float, linear: Any) -> Any:
        return ops.linear(ops.quantize(h if factor == 1 else ops.scale(h, factor), linear.act), linear)

    made = mixed(ops, block, made_of(mixing, block.linears["in"]))
    attended, x = attend(ops, block, made_of(attending, block.linears["qkv"]), x)
    x = written(ops, block, made, ops.linear(attended, block.linears["o"], x))
    return mlp(ops, block, read(ops, block, x, "mlp_norm", "up"), x)


def _number(fields: Fields, name: str) -> float:
    return fields.number(name, 1.0, 1e-9)


def _numbers(fields: Fields, name: str, count: int) -> tuple[float, ...]:
    return (1.0,) * count if fields.get(name) is None else fields.numbers(name, count, 1e-9)


def _rows(*parts: tuple[int, float]) -> Array:
    """So many rows of each factor, float32."""
    return np.concatenate([np.full(rows, factor, np.float32) for rows, factor in parts])


def _multiplied(linear: LinearSpec, factor: Array) -> LinearSpec:
    return linear if np.all(factor == 1) else replace(linear, multiplier=factor)
