"""Llama: pre-norms, rotary attention with grouped KV heads, a gated MLP."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from fptq_runtime.config import ModelConfig
from fptq_runtime.kernels.base import Activation, Array
from fptq_runtime.models.block import Attention, BlockSpec, Edge, LinearSpec, Model, NormSpec, StemSpec
from fptq_runtime.models.fields import Fields, dense_config, read_curve
from fptq_runtime.models.layers import GATE, ONE_NORM_EDGES, PRE_NORM_EDGES, head_spec, norms_of, parallel, pre_norm
from fptq_runtime.models.rope import read_rope


def llama(fields: Fields) -> Model:
    return biased_llama(fields, dense_config(fields, "LlamaForCausalLM"))


def biased_llama(fields: Fields, config: ModelConfig, **differences: Any) -> Model:
    """With biases where `attention_bias` and `mlp_bias` say so; `differences` are llama_like's."""
    bias = fields.flag("attention_bias", False)
    return llama_like(fields, config, read_attention(fields, config),
                      **{"qkv_bias": bias, "o_bias": bias, "mlp_bias": fields.flag("mlp_bias", False), **differences})


def read_attention(fields: Fields, config: ModelConfig, theta: float = 10000.0,
                   partial: float | None = None) -> Attention:
    """theta, partial: the family's defaults for its rope."""
    return Attention(
        config.num_heads, config.num_kv_heads, config.head_dim, config.head_dim**-0.5,
        rope=read_rope(fields, config.head_dim, config.max_position_embeddings, theta=theta, partial=partial),
    )


def llama_like(fields: Fields, config: ModelConfig, attention: Attention | Sequence[Attention], *,
               windows: Sequence[int | None] = (), qkv_bias: bool = False, o_bias: bool = False, mlp_bias: bool = False,
               norm: Callable[[str, str], NormSpec] | None = None, eps: float = 1e-6, gated: bool = True,
               curve: str = "silu", up: tuple[str, ...] | None = None, down: str = "mlp.down_proj",
               o: str = "self_attn.o_proj", order: Array | None = None, last_norm: str = "model.norm",
               head_bias: bool = False, forward: Callable[..., Any] = pre_norm) -> Model:
    """Llama's tensors and order of things around another attention, every layer's or each its own.

    windows: each layer's; none unless given. norm: makes the norms by name and module; RMSNorms unless given. eps,
    curve: the family's defaults. up, down, o, last_norm: the family's modules. order: of the stacked rows of q, k and
    v. forward: `parallel` has one norm before attention and MLP.
    """
    hidden, width = config.hidden_size, config.intermediate_size
    attentions = [attention] * config.num_layers if isinstance(attention, Attention) else list(attention)
    if windows:
        attentions = [replace(each, sliding_window=window) for each, window in zip(attentions, windows, strict=True)]
    if norm is None:
        norm = norms_of("rms", hidden, fields.number("rms_norm_eps", eps, high=1.0))
    if up is None:
        up = ("mlp.gate_proj", "mlp.up_proj") if gated else ("mlp.up_proj",)
    q, kv, rows = attentions[0].q_size, attentions[0].kv_size, width * (2 if gated else 1) // len(up)
    linears = (
        LinearSpec("qkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), (q, kv, kv), hidden, qkv_bias,
                   order),
        LinearSpec("o", (o,), (hidden,), q, o_bias),
        LinearSpec("up", up, (rows,) * len(up), hidden, mlp_bias),
        LinearSpec("down", (down,), (hidden,), width, mlp_bias),
    )
    norms: tuple[NormSpec, ...] = (norm("input_norm", "input_layernorm"), norm("mlp_norm", "post_attention_layernorm"))
    edges: tuple[Edge, ...] = PRE_NORM_EDGES
    if forward is parallel:
        norms, edges = norms[:1], ONE_NORM_EDGES
    if not norms[0].scaled:  # a norm without a weight takes no scale
        edges = tuple(edge for edge in edges if edge.through is not None)
    activation = Activation(read_curve(fields, "hidden_act", curve), gated)
    if gated:
        edges = (*edges, GATE)
    elif activation.curve == "relu":
        edges = (*edges, Edge("up", ("down",), "relu"))
    return Model(
        config,
        StemSpec("model.embed_tokens"),
        tuple(BlockSpec(f"layers.{i}", f"model.layers.{i}.", forward, linears, norms, edges, ("o", "down"), each,
                        activation) for i, each in enumerate(attentions)),
        head_spec(norm("norm", last_norm), "lm_head", config.vocab_size, hidden, head_bias),
    )
