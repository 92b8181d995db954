"""Gemma 2: norms before and behind attention and MLP, windows in every other layer, capped scores and logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fptq_runtime.config import ModelConfig
from fptq_runtime.kernels.base import Activation, Ops
from fptq_runtime.models.block import Attention, Block, BlockSpec, Edge, LinearSpec, Model, NormSpec, StemSpec
from fptq_runtime.models.fields import Fields, ModelError, dense_config, read_curve
from fptq_runtime.models.layers import GATE, attend, head, head_spec, mlp, read
from fptq_runtime.models.mistral import read_window
from fptq_runtime.models.rope import read_rope


def gemma2(fields: Fields) -> Model:
    config = dense_config(fields, "Gemma2ForCausalLM", default_head_dim=256, default_positions=8192, tied=True)
    window = read_window(fields)
    windows = [window if sliding else None for sliding in read_sliding(fields, config, 2)]
    attention = Attention(
        config.num_heads, config.num_kv_heads, config.head_dim, fields.number("query_pre_attn_scalar", 256, 1e-6)**-0.5,
        rope=read_rope(fields, config.head_dim, config.max_position_embeddings),
        softcap=fields.optional("attn_logit_softcapping", 50.0),
    )
    return gemma(fields, config, [replace(attention, sliding_window=each) for each in windows], logits_cap=30.0)


def read_sliding(fields: Fields, config: ModelConfig, pattern: int) -> list[bool]:
    """Which layers have a window: what `layer_types` says, else all but every `pattern`-th."""
    if fields.flag("use_bidirectional_attention", False):
        raise ModelError("config.json: use_bidirectional_attention is not supported; a decoder looks back alone")
    if fields.get("layer_types") is None:
        return [bool((i + 1) % pattern) for i in range(config.num_layers)]
    kinds = fields.names("layer_types", ("full_attention", "sliding_attention"), config.num_layers)
    return [kind == "sliding_attention" for kind in kinds]


def gemma(fields: Fields, config: ModelConfig, attentions: Sequence[Attention], logits_cap: float | None) -> Model:
    """Gemma's tensors and order of things around each layer's attention. logits_cap: the family's default."""
    hidden, width, eps = config.hidden_size, config.intermediate_size, fields.number("rms_norm_eps", 1e-6, high=1.0)
    attention, bias = attentions[0], fields.flag("attention_bias", False)
    linears = (
        LinearSpec("qkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                   (attention.q_size, attention.kv_size, attention.kv_size), hidden, bias),
        LinearSpec("o", ("self_attn.o_proj",), (hidden,), attention.q_size, bias),
        LinearSpec("up", ("mlp.gate_proj", "mlp.up_proj"), (width, width), hidden),
        LinearSpec("down", ("mlp.down_proj",), (hidden,), width),
    )

    def norm(name: str, module: str) -> NormSpec:
        return NormSpec(name, (module,), (hidden,), "rms", eps, offset=1.0)

    norms = (norm("input_norm", "input_layernorm"), norm("attention_norm", "post_attention_layernorm"),
             norm("mlp_norm", "pre_feedforward_layernorm"), norm("output_norm", "post_feedforward_layernorm"))
    edges = (Edge("input_norm", ("qkv",)), Edge("qkv", ("o",), "attention"), Edge("mlp_norm", ("up",)), GATE)
    activation = Activation(read_curve(fields, ("hidden_activation", "hidden_act"), "gelu_pytorch_tanh"), gated=True)
    cap = fields.optional("final_logit_softcapping", logits_cap)

    def logits(ops: Ops[Any], block: Block, x: Any) -> Any:
        return head(ops, block, x) if cap is None else ops.softcap(head(ops, block, x), cap)

    return Model(
        config,
        StemSpec("model.embed_tokens", scale=hidden**0.5),
        tuple(BlockSpec(f"layers.{i}", f"model.layers.{i}.", forward, linears, norms, edges,
                        ("attention_norm", "output_norm"), each, activation) for i, each in enumerate(attentions)),
        head_spec(norm("norm", "model.norm"), "lm_head", config.vocab_size, hidden, forward=logits),
    )


def forward(ops: Ops[Any], block: Block, x: Any) -> Any:
    attended, x = attend(ops, block, read(ops, block, x, "input_norm", "qkv"), x)
    attended = ops.linear(attended, block.linears["o"])
    x = ops.add(x, ops.norm(attended, block.norms["attention_norm"], None))
    made = mlp(ops, block, read(ops, block, x, "mlp_norm", "up"))
    return ops.add(x, ops.norm(made, block.norms["output_norm"], None))
