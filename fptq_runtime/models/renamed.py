"""Families that are another under other names, whose code comes with their checkpoints: InternLM 2 and EXAONE 3 are
Llama, MiniCPM is Granite."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from fptq_runtime.models.block import BlockSpec, LinearSpec, Model
from fptq_runtime.models.falcon import by_groups
from fptq_runtime.models.fields import Fields, dense_config
from fptq_runtime.models.granite import with_multipliers
from fptq_runtime.models.layers import head_spec
from fptq_runtime.models.llama import llama_like, read_attention

INTERNLM2 = {
    "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1", "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2", "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
}
EXAONE = {
    "self_attn.q_proj": "attn.attention.q_proj", "self_attn.k_proj": "attn.attention.k_proj",
    "self_attn.v_proj": "attn.attention.v_proj", "self_attn.o_proj": "attn.attention.out_proj",
    "mlp.gate_proj": "mlp.c_fc_0", "mlp.up_proj": "mlp.c_fc_1", "mlp.down_proj": "mlp.c_proj",
    "input_layernorm": "ln_1", "post_attention_layernorm": "ln_2",
}


def internlm2(fields: Fields) -> Model:
    config = dense_config(Fields({**fields.data, "head_dim": None}), "InternLM2ForCausalLM", default_positions=32768)
    bias, attention = fields.flag("bias", True), read_attention(fields, config)
    model = llama_like(fields, config, attention, qkv_bias=bias, o_bias=bias)
    rows = attention.q_size + 2 * attention.kv_size
    qkv = LinearSpec("qkv", ("attention.wqkv",), (rows,), config.hidden_size, bias,
                     by_groups(config.num_heads, config.num_kv_heads, config.head_dim))
    blocks = tuple(replace(block, linears=(qkv, *block.linears[1:]))
                   for block in renamed(model, INTERNLM2, "model.layers"))
    return replace(model, blocks=blocks, stem=replace(model.stem, embedding="model.tok_embeddings"),
                   head=head_spec(model.head.norms[0], "output", config.vocab_size, config.hidden_size))


def exaone(fields: Fields) -> Model:
    fields = Fields({"hidden_act": fields.get("activation_function", "silu"),
                     "rms_norm_eps": fields.get("layer_norm_epsilon", 1e-5), **fields.data})
    config = dense_config(fields, "ExaoneForCausalLM", layers=("num_layers", "num_hidden_layers"))
    model = llama_like(fields, config, read_attention(fields, config))
    norm = replace(model.head.norms[0], modules=("transformer.ln_f",))
    return replace(model, blocks=renamed(model, EXAONE, "transformer.h"), bare_prefix="transformer.",
                   stem=replace(model.stem, embedding="transformer.wte"),
                   head=head_spec(norm, "lm_head", config.vocab_size, config.hidden_size))


def minicpm(fields: Fields) -> Model:
    config = dense_config(fields, "MiniCPMForCausalLM")
    attention, bias = read_attention(fields, config), fields.flag("attention_bias", False)
    multipliers = {
        "attention_multiplier": attention.softmax_scale, "embedding_multiplier": fields.number("scale_emb", 1.0, 1e-9),
        "residual_multiplier": fields.number("scale_depth", 1.0, 1e-9) / math.sqrt(config.num_layers),
        "logits_scaling": config.hidden_size / fields.integer("dim_model_base", high=1 << 16),
    }
    fields.only("num_experts", (0, None), 0)
    fields.only("sparse_config", (None,), None)
    return with_multipliers(Fields(multipliers), llama_like(fields, config, attention, qkv_bias=bias, o_bias=bias))


def renamed(model: Model, names: Mapping[str, str], prefix: str) -> tuple[BlockSpec, ...]:
    """The blocks with their modules under other names; what `names` does not have keeps its own."""
    def other(modules: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(names.get(module, module) for module in modules)

    return tuple(replace(
        block, prefix=f"{prefix}.{index}.",
        linears=tuple(replace(linear, modules=other(linear.modules)) for linear in block.linears),
        norms=tuple(replace(norm, modules=other(norm.modules)) for norm in block.norms),
    ) for index, block in enumerate(model.blocks))
