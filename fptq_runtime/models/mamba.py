"""Mamba and Falcon-Mamba, whose layers are nothing but a selective state space; and the Mamba-2 mixer of hybrids.

A row of what the mixer makes is brought into the order of kernels/base.py's StateSpace: x | B | C | z | dt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from fptq_runtime.kernels.base import Int32Array, Ops, ShortConv, StateSpace
from fptq_runtime.models.block import (
    Block,
    BlockSpec,
    Edge,
    LinearSpec,
    Model,
    NormSpec,
    RecurrentSpec,
    StemSpec,
)
from fptq_runtime.models.fields import MAX_HEAD_DIM, Fields, ModelError, dense_config
from fptq_runtime.models.layers import head_spec, norms_of, read
from fptq_runtime.models.recurrent import MAX_TAPS, leaving

MAX_STATE = 1 << 12
MAX_CHANNELS = 1 << 18


def mamba(fields: Fields) -> Model:
    return _mamba(fields, "MambaForCausalLM")


def falcon_mamba(fields: Fields) -> Model:
    """Mamba with norms, without weights, of dt, B and C."""
    return _mamba(fields, "FalconMambaForCausalLM", fields.number("mixer_rms_eps", 1e-6, high=1.0))


def _mamba(fields: Fields, architecture: str, inner_eps: float | None = None) -> Model:
    """inner_eps: of norms of dt, B and C."""
    fields.only("hidden_act", ("silu", "swish"), "silu")
    sizes = {"num_attention_heads": 1, "head_dim": 64, "num_key_value_heads": 1}  # of a cache that nothing is in
    hidden = fields.integer("hidden_size", high=1 << 16)
    inner = int(fields.integer("expand", 2, high=64) * hidden)
    config = dense_config(Fields({**fields.data, **sizes}, fields.where), architecture, intermediate=inner, tied=True,
                          default_positions=32768)
    state, taps = fields.integer("state_size", 16, high=MAX_STATE), fields.integer("conv_kernel", 4, high=MAX_TAPS)
    rank = -(-hidden // 16) if fields.get("time_step_rank", "auto") == "auto" else fields.integer("time_step_rank")
    bias, eps = fields.flag("use_bias", False), fields.number("layer_norm_epsilon", 1e-5, high=1.0)
    linears = (
        LinearSpec("in", ("mixer.in_proj",), (2 * inner,), hidden, bias),
        LinearSpec("x", ("mixer.x_proj",), (rank + 2 * state,), inner, kept=True, inner=True),
        LinearSpec("dt", ("mixer.dt_proj",), (inner,), rank, kept=True, inner=True),
        LinearSpec("out", ("mixer.out_proj",), (hidden,), inner, bias),
    )
    norm = norms_of("rms", hidden, eps)
    norms: tuple[NormSpec, ...] = (norm("input_norm", "norm"),)
    if inner_eps is not None:
        norms += tuple(NormSpec(name, (f"mixer.{name}",), (size,), "rms", inner_eps, scaled=False, inner=True)
                       for name, size in (("dt_norm", rank), ("b_norm", state), ("c_norm", state)))
    conv = convolution("mixer", inner, taps, fields.flag("use_conv_bias", True))
    space = RecurrentSpec(StateSpace("space", inner, 1, 1, state), {
        "a_log": ("mixer.A_log", (inner, state)), "d": ("mixer.D", (inner,)),
        "dt_bias": ("mixer.dt_proj.bias", (inner,))})
    columns = Columns.of(inner, rank, state)
    return Model(
        config,
        StemSpec("backbone.embeddings"),
        tuple(BlockSpec(f"layers.{i}", f"backbone.layers.{i}.", columns.forward, linears, norms,
                        (Edge("input_norm", ("in",)),), ("out",), recurrent=(conv, space))
              for i in range(config.num_layers)),
        head_spec(norm("norm", "backbone.norm_f"), "lm_head", config.vocab_size, hidden),
        bare_prefix="backbone.", width_field=None,
    )


@dataclass(frozen=True)
class Columns:
    """Where columns come from: of x | z what was convolved, of dt | B | C each of them, and the state space's row of
    x | z, B, C and dt."""

    x: Int32Array
    parts: tuple[Int32Array, ...]
    row: Int32Array

    @classmethod
    def of(cls, inner: int, rank: int, state: int) -> Columns:
        ends = np.cumsum((0, rank, state, state))
        made = np.arange(2 * inner, 2 * (inner + state))
        row = np.concatenate((np.arange(inner), made, np.arange(inner, 2 * inner), np.arange(inner) + made[-1] + 1))
        parts = tuple(np.arange(first, end, dtype=np.int32) for first, end in pairwise(ends))
        return cls(np.arange(inner, dtype=np.int32), parts, row.astype(np.int32))

    def forward(self, ops: Ops[Any], block: Block, x: Any) -> Any:
        """x + the mixer of norm(x)."""
        conv, space = block.recurrent
        xz = ops.short_conv(read(ops, block, x, "input_norm", "in"), conv)
        made = ops.linear(ops.columns((xz,), self.x), block.linears["x"])
        parts = [ops.columns((made,), part) for part in self.parts]
        if "dt_norm" in block.norms:
            parts = [ops.norm(part, block.norms[name], None)
                     for part, name in zip(parts, ("dt_norm", "b_norm", "c_norm"), strict=True)]
        dt, b, c = parts
        row = ops.columns((xz, b, c, ops.linear(dt, block.linears["dt"])), self.row)
        return written(ops, block, ops.state_space(row, space), leaving(ops, block, x))


def written(ops: Ops[Any], block: Block, made: Any, residual: Any = None) -> Any:
    """`out` of what a mixer made, + residual; in the last block those rows that need logits."""
    out = block.linears["out"]
    return ops.linear(ops.quantize(leaving(ops, block, made), out.act), out, residual)


def convolution(module: str, channels: int, taps: int, bias: bool) -> RecurrentSpec:
    """Over the first columns, then silu."""
    arrays: dict[str, tuple[str, tuple[int, ...]]] = {"weight": (f"{module}.conv1d.weight", (channels, 1, taps))}
    if bias:
        arrays["bias"] = (f"{module}.conv1d.bias", (channels,))
    return RecurrentSpec(ShortConv("conv", channels, taps, silu=True), arrays)


@dataclass(frozen=True, eq=False)
class Mixer:
    """Mamba-2's: its two linears, `in` with rows x | B | C | z | dt and `out`, and its two recurrent ops."""

    linears: tuple[LinearSpec, LinearSpec]
    recurrent: tuple[RecurrentSpec, RecurrentSpec]


def mixed(ops: Ops[Any], block: Block, row: Any) -> Any:
    """What `out` reads, of what `in` made."""
    conv, space = block.recurrent
    return ops.state_space(ops.short_conv(row, conv), space)


def mamba2(module: str, hidden: int, space: StateSpace, taps: int, *, bias: bool, out_bias: bool, conv_bias: bool,
           normed: bool = True) -> Mixer:
    """The mixer of the checkpoint's `module`, whose rows are z | x | B | C | dt. Raises ModelError."""
    inner, convolved = space.channels, space.convolved
    if space.heads % space.groups or space.head_dim > MAX_HEAD_DIM or space.convolved > MAX_CHANNELS:
        raise ModelError(f"config.json: Mamba's {space.heads} heads of {space.head_dim} must be a multiple of its "
                         f"{space.groups} groups, at most {MAX_HEAD_DIM} wide, and with them {MAX_CHANNELS} channels")
    rows = inner + convolved + space.heads
    z = np.arange(inner)
    order = np.concatenate((np.arange(inner, inner + convolved), z, np.arange(inner + convolved, rows)))
    heads = (space.heads,)
    arrays: dict[str, tuple[str, tuple[int, ...]]] = {
        "a_log": (f"{module}.A_log", heads), "d": (f"{module}.D", heads), "dt_bias": (f"{module}.dt_bias", heads)}
    if normed:
        arrays["norm_weight"] = (f"{module}.norm.weight", (inner,))
    return Mixer((LinearSpec("in", (f"{module}.in_proj",), (rows,), hidden, bias, order),
                  LinearSpec("out", (f"{module}.out_proj",), (hidden,), inner, out_bias)),
                 (convolution(module, convolved, taps, conv_bias), RecurrentSpec(space, arrays)))


def read_limit(fields: Fields, name: str = "time_step_limit") -> tuple[float, float]:
    """What a step of time lies within; infinity is as transformers writes it. Raises ModelError."""
    given = fields.get(name, (0.0, math.inf))
    pair = [math.inf if each == {"__float__": "Infinity"} else each for each in given] \
        if isinstance(given, Sequence) else []
    if len(pair) != 2 or not all(isinstance(each, int | float) and not isinstance(each, bool) for each in pair) \
            or not 0 <= pair[0] < pair[1]:
        raise ModelError(f"{fields.where}: {name} must be two numbers, the first below the second, not {given!r}")
    return float(pair[0]), float(pair[1])


def mamba_config(fields: Fields, hidden: int, eps: float, heads: int, groups: int, state: int, taps: int,
                 inner: int | None = None) -> tuple[StateSpace, int]:
    """The state space of a config.json whose names begin with `mamba_`, with a family's defaults, and the
    convolution's taps. inner: its width, where `mamba_expand` does not say it. Raises ModelError."""
    inner = inner or fields.integer("mamba_expand", 2, high=64) * hidden
    heads = fields.integer("mamba_n_heads", heads, high=MAX_CHANNELS)
    head_dim = inner // heads if fields.get("mamba_d_head", "auto") == "auto" else fields.integer("mamba_d_head")
    if heads * head_dim != inner:
        raise ModelError(f"{fields.where}: mamba_n_heads {heads} of mamba_d_head {head_dim} are not {inner} channels")
    low, high = read_limit(fields)
    space = StateSpace("space", heads, head_dim, fields.integer("mamba_n_groups", groups),
                       fields.integer("mamba_d_state", state, high=MAX_STATE), low, high, eps)
    return space, fields.integer("mamba_d_conv", taps, high=MAX_TAPS)
