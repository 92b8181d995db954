"""Nemotron-H and Nemotron 3 Nano: each layer is one thing behind a norm, Mamba-2, attention without rope, an MLP
without a gate, or experts that are such MLPs."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from fptq_runtime.kernels.base import Activation, Ops, StateSpace
from fptq_runtime.models.block import Attention, Block, BlockSpec, Edge, LinearSpec, Model, StemSpec
from fptq_runtime.models.fields import Fields, ModelError, dense_config, read_curve
from fptq_runtime.models.layers import attend, head_spec, norms_of, read
from fptq_runtime.models.mamba import MAX_CHANNELS, MAX_STATE, Mixer, mamba2, mixed, written
from fptq_runtime.models.moe import behind_norm, expert_linears, read_grouped_routing
from fptq_runtime.models.recurrent import MAX_TAPS, leaving

KINDS = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}  # of `hybrid_override_pattern`
NAMES = {"mamba": "linear_attention", "attention": "full_attention"}  # before transformers 5


def nemotron_h(fields: Fields) -> Model:
    kinds = _layer_types(fields)
    config = dense_config(Fields({**fields.data, "num_hidden_layers": len(kinds)}, fields.where),
                          "NemotronHForCausalLM", default_positions=4096, default_head_dim=128)
    fields.only("num_nextn_predict_layers", (0,), 0)
    hidden, eps = config.hidden_size, fields.number("layer_norm_epsilon", 1e-5, high=1.0)
    norm, prefix = norms_of("rms", hidden, eps), "backbone"
    attention = Attention(config.num_heads, config.num_kv_heads, config.head_dim, config.head_dim**-0.5)
    q, kv, mlp_bias = attention.q_size, attention.kv_size, fields.flag("mlp_bias", False)
    activation = Activation(read_curve(fields, "mlp_hidden_act", "relu2"))
    before, behind = norm("input_norm", "norm"), norm("mlp_norm", "norm")

    def block(index: int, kind: str) -> BlockSpec:
        part = BlockSpec(f"layers.{index}", f"{prefix}.layers.{index}.", mlp_block, (), (behind,), (), ("down",),
                         activation=activation)
        match kind:
            case "linear_attention":
                mixer = _mixer(fields, hidden, eps)
                return replace(part, forward=mamba_block, linears=mixer.linears, recurrent=mixer.recurrent,
                               norms=(before,), edges=(Edge("input_norm", ("in",)),), residual=("out",))
            case "full_attention":
                linears = (LinearSpec("qkv", ("mixer.q_proj", "mixer.k_proj", "mixer.v_proj"), (q, kv, kv), hidden),
                           LinearSpec("o", ("mixer.o_proj",), (hidden,), q))
                return replace(part, forward=attention_block, linears=linears, norms=(before,), residual=("o",),
                               edges=(Edge("input_norm", ("qkv",)), Edge("qkv", ("o",), "attention")),
                               attention=attention)
            case "mlp":
                width = config.intermediate_size
                relu = (Edge("up", ("down",), "relu"),) if activation.curve == "relu" else ()
                return replace(part, edges=(Edge("mlp_norm", ("up",)), *relu), linears=(
                    LinearSpec("up", ("mixer.up_proj",), (width,), hidden, mlp_bias),
                    LinearSpec("down", ("mixer.down_proj",), (hidden,), width, mlp_bias)))
        return _experts(fields, part, hidden, mlp_bias)

    return Model(
        config,
        StemSpec(f"{prefix}.embeddings"),
        tuple(block(index, kind) for index, kind in enumerate(kinds)),
        head_spec(norm("norm", f"{prefix}.norm_f"), "lm_head", config.vocab_size, hidden),
        bare_prefix=f"{prefix}.", loaded_prefix="model.", width_field=None,
    )


def _mixer(fields: Fields, hidden: int, eps: float) -> Mixer:
    """Raises ModelError."""
    fields.only("mamba_hidden_act", ("silu", "swish"), "silu")
    space = StateSpace(
        "space", fields.integer("mamba_num_heads", 128, high=MAX_CHANNELS), fields.integer("mamba_head_dim", 64),
        fields.integer(("mamba_n_groups", "n_groups"), 8), fields.integer("ssm_state_size", 128, high=MAX_STATE),
        fields.number(("mamba_dt_min", "time_step_min"), 0.001), math.inf, eps)
    bias = fields.flag("use_bias", False)
    return mamba2("mixer", hidden, space, fields.integer(("mamba_d_conv", "conv_kernel"), 4, high=MAX_TAPS), bias=bias,
                  out_bias=bias, conv_bias=fields.flag(("mamba_conv_bias", "use_conv_bias"), True))


def _experts(fields: Fields, part: BlockSpec, hidden: int, bias: bool) -> BlockSpec:
    """Raises ModelError."""
    fields.only("moe_latent_size", (None,), None)
    routing = read_grouped_routing(fields, default_experts=8, default_top_k=2)
    width = fields.integer("moe_shared_expert_intermediate_size", 7688, high=1 << 19)
    linears = (
        *expert_linears("mixer", routing, hidden, fields.integer("moe_intermediate_size", 7688, high=1 << 19),
                        up=("up_proj",)),
        LinearSpec("shared.up", ("mixer.shared_experts.up_proj",), (width,), hidden, bias),
        LinearSpec("shared.down", ("mixer.shared_experts.down_proj",), (hidden,), width, bias))
    return replace(part, linears=linears, residual=("experts.down", "shared.down"), routing=routing,
                   edges=(Edge("mlp_norm", ("router", "experts.up", "shared.up")),),
                   routing_bias="mixer.gate.e_score_correction_bias")


def mamba_block(ops: Ops[Any], block: Block, x: Any) -> Any:
    made = mixed(ops, block, read(ops, block, x, "input_norm", "in"))
    return written(ops, block, made, leaving(ops, block, x))


def attention_block(ops: Ops[Any], block: Block, x: Any) -> Any:
    attended, x = attend(ops, block, read(ops, block, x, "input_norm", "qkv"), x)
    return ops.linear(attended, block.linears["o"], x)


def mlp_block(ops: Ops[Any], block: Block, x: Any) -> Any:
    return behind_norm(ops, block, leaving(ops, block, x))


def _layer_types(fields: Fields) -> list[str]:
    """Raises ModelError."""
    given = fields.get(("layers_block_type", "layer_types"))
    if given is None:
        pattern = fields.get("hybrid_override_pattern", "ME*-")
        given = [KINDS.get(each, each) for each in pattern] if isinstance(pattern, str) else None
    if not isinstance(given, list) or not given:
        raise ModelError(f"{fields.where}: layers_block_type must list the layers' kinds, not {given!r}")
    kinds = [NAMES.get(kind, kind) if isinstance(kind, str) else kind for kind in given]
    if any(kind not in KINDS.values() for kind in kinds):
        raise ModelError(f"{fields.where}: layers must be of {', '.join(KINDS.values())}, not {given!r}")
    return kinds
