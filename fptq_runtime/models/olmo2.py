"""OLMo 2: attention and MLP read the residual stream as it is, and a norm stands behind each; q and k are normalised
over all their heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fptq_runtime.config import ModelConfig
from fptq_runtime.kernels.base import Activation, Ops
from fptq_runtime.models.block import Attention, Block, BlockSpec, Edge, LinearSpec, Model, NormSpec, StemSpec
from fptq_runtime.models.fields import Fields, dense_config, read_curve
from fptq_runtime.models.layers import GATE, attend, head_spec, mlp, norms_of
from fptq_runtime.models.llama import read_attention

EPS = 1e-5


def olmo2(fields: Fields) -> Model:
    config = dense_config(fields, "Olmo2ForCausalLM")
    attention = normalise_rows(fields, read_attention(fields, config))
    return post_norm(fields, config, [attention] * config.num_layers, fields.flag("attention_bias", False))


def normalise_rows(fields: Fields, attention: Attention) -> Attention:
    """With an RMSNorm over all heads of q, and one over all of k."""
    eps = fields.number("rms_norm_eps", EPS, high=1.0)
    return replace(
        attention,
        q_norm=NormSpec("q_norm", ("self_attn.q_norm",), (attention.q_size,), "rms", eps),
        k_norm=NormSpec("k_norm", ("self_attn.k_norm",), (attention.kv_size,), "rms", eps),
    )


def post_norm(fields: Fields, config: ModelConfig, attentions: Sequence[Attention], bias: bool = False) -> Model:
    """Llama's linears with norms behind attention and MLP alone. bias: of q, k, v and o."""
    hidden, width, attention = config.hidden_size, config.intermediate_size, attentions[0]
    norm = norms_of("rms", hidden, fields.number("rms_norm_eps", EPS, high=1.0))
    linears = (
        LinearSpec("qkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                   (attention.q_size, attention.kv_size, attention.kv_size), hidden, bias),
        LinearSpec("o", ("self_attn.o_proj",), (hidden,), attention.q_size, bias),
        LinearSpec("up", ("mlp.gate_proj", "mlp.up_proj"), (width, width), hidden),
        LinearSpec("down", ("mlp.down_proj",), (hidden,), width),
    )
    norms = (norm("attention_norm", "post_attention_layernorm"), norm("output_norm", "post_feedforward_layernorm"))
    activation = Activation(read_curve(fields, "hidden_act", "silu"), gated=True)
    return Model(
        config,
        StemSpec("model.embed_tokens"),
        tuple(BlockSpec(f"layers.{i}", f"model.layers.{i}.", forward, linears, norms,
                        (Edge("qkv", ("o",), "attention"), GATE), ("attention_norm", "output_norm"), each, activation)
              for i, each in enumerate(attentions)),
        head_spec(norm("norm", "model.norm"), "lm_head", config.vocab_size, hidden),
    )


def forward(ops: Ops[Any], block: Block, x: Any) -> Any:
    qkv, o, up = (block.linears[name] for name in ("qkv", "o", "up"))
    attended, x = attend(ops, block, ops.linear(ops.quantize(x, qkv.act), qkv), x)
    x = ops.add(x, ops.norm(ops.linear(attended, o), block.norms["attention_norm"], None))
    made = mlp(ops, block, ops.linear(ops.quantize(x, up.act), up))
    return ops.add(x, ops.norm(made, block.norms["output_norm"], None))
