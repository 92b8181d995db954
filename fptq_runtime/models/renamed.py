"""Families that are another under other names, whose code comes with their checkpoints: InternLM 2, EXAONE 3, Qwen 1
and Baichuan are Llama, ChatGLM is GLM-4, MiniCPM is Granite."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from fptq_runtime.kernels.base import Array
from fptq_runtime.models.block import BlockSpec, Model
from fptq_runtime.models.falcon import by_groups
from fptq_runtime.models.fields import Fields, dense_config
from fptq_runtime.models.glm import fused
from fptq_runtime.models.granite import with_multipliers
from fptq_runtime.models.layers import halves_of_qkv, head_spec
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
QWEN = {
    "self_attn.o_proj": "attn.c_proj", "mlp.gate_proj": "mlp.w2", "mlp.up_proj": "mlp.w1",
    "mlp.down_proj": "mlp.c_proj", "input_layernorm": "ln_1", "post_attention_layernorm": "ln_2",
}
CHATGLM = {
    "self_attn.o_proj": "self_attention.dense", "mlp.gate_up_proj": "mlp.dense_h_to_4h",
    "mlp.down_proj": "mlp.dense_4h_to_h",
}
BAICHUAN2_VOCABULARY = 125696  # by which alone its config.json differs from Baichuan 1's


def internlm2(fields: Fields) -> Model:
    config = dense_config(Fields({**fields.data, "head_dim": None}), "InternLM2ForCausalLM", default_positions=32768)
    bias, attention = fields.flag("bias", True), read_attention(fields, config)
    model = llama_like(fields, config, attention, qkv_bias=bias, o_bias=bias)
    blocks = one_qkv(renamed(model, INTERNLM2, "model.layers"), "attention.wqkv",
                     by_groups(config.num_heads, config.num_kv_heads, config.head_dim))
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


def qwen(fields: Fields) -> Model:
    """Qwen 1, up to `seq_length`: beyond, `use_dynamic_ntk` and `use_logn_attn` have other frequencies and scales for
    each length."""
    fields.only("rotary_pct", (1, 1.0), 1.0)
    fields.only("scale_attn_weights", (True,), True)
    bias = not fields.flag("no_bias", True)
    inner = {"rms_norm_eps": fields.get("layer_norm_epsilon", 1e-6), "head_dim": fields.get("kv_channels", 128),
             "rope_theta": fields.get("rotary_emb_base", 10000), "hidden_act": "silu", "num_key_value_heads": None,
             "intermediate_size": fields.integer("intermediate_size", 22016, high=1 << 20) // 2}
    fields = Fields({**fields.data, **inner}, fields.where)
    config = dense_config(fields, "QWenLMHeadModel", positions=("seq_length", "max_position_embeddings"),
                          default_positions=8192)
    model = llama_like(fields, config, read_attention(fields, config), qkv_bias=True, o_bias=bias, mlp_bias=bias)
    norm = replace(model.head.norms[0], modules=("transformer.ln_f",))
    return replace(model, blocks=one_qkv(renamed(model, QWEN, "transformer.h"), "attn.c_attn"), width_field=None,
                   bare_prefix="transformer.", stem=replace(model.stem, embedding="transformer.wte"),
                   head=head_spec(norm, "lm_head", config.vocab_size, config.hidden_size))


def baichuan(fields: Fields) -> Model:
    """Those of 7B have rope, those of 13B ALiBi and `model_max_length` alone; the rows of Baichuan 2's head are divided
    by their lengths, once: an artifact's `normalize_head` is false."""
    architecture = fields.data["architectures"][0]
    turned = fields.get("max_position_embeddings") is not None
    config = dense_config(Fields({**fields.data, "num_key_value_heads": None, "head_dim": None}, fields.where),
                          architecture, positions=("max_position_embeddings", "model_max_length"),
                          default_positions=4096)
    attention = read_attention(Fields({}, fields.where), config)
    model = llama_like(fields, config, attention if turned else replace(attention, rope=None, alibi=True))
    [linear] = model.head.linears
    second = architecture == "BaichuanForCausalLM" and config.vocab_size == BAICHUAN2_VOCABULARY
    normalised = fields.flag("normalize_head", second)
    return replace(model, blocks=one_qkv(model.blocks, "self_attn.W_pack"),
                   head=replace(model.head, linears=(replace(linear, normalised=normalised),)),
                   rewritten={"normalize_head": False})


def chatglm(fields: Fields) -> Model:
    """ChatGLM 2 and 3, and GLM-4-9B under the names of its first release."""
    for name, value in (("rmsnorm", True), ("post_layer_norm", True), ("multi_query_attention", True),
                        ("apply_residual_connection_post_layernorm", False), ("add_bias_linear", False),
                        ("pre_seq_len", None)):
        fields.only(name, (value,), value)
    inner = {"vocab_size": fields.get("padded_vocab_size"), "intermediate_size": fields.get("ffn_hidden_size"),
             "num_key_value_heads": fields.get("multi_query_group_num", 1), "hidden_act": "silu",
             "head_dim": fields.get("kv_channels", 128), "attention_bias": fields.flag("add_qkv_bias", False),
             "max_position_embeddings": fields.get("seq_length", 2048),
             "rms_norm_eps": fields.get("layernorm_epsilon", 1e-5), "rope_parameters": None, "rope_scaling": None,
             "rope_theta": 10000.0 * fields.number("rope_ratio", 1.0, 1e-3), "partial_rotary_factor": 0.5}
    others = {name: value for name, value in fields.data.items() if name not in inner}
    model = fused(Fields({**others, **inner}, fields.where), "ChatGLMModel", layers=("num_layers", "num_hidden_layers"))
    [attention] = {block.attention for block in model.blocks}
    assert attention is not None
    config, prefix = model.config, "transformer.encoder"
    norm = replace(model.head.norms[0], modules=(f"{prefix}.final_layernorm",))
    return replace(
        model, width_field="ffn_hidden_size", bare_prefix="transformer.",
        blocks=one_qkv(renamed(model, CHATGLM, f"{prefix}.layers"), "self_attention.query_key_value",
                       halves_of_qkv(attention)),
        stem=replace(model.stem, embedding="transformer.embedding.word_embeddings"),
        head=head_spec(norm, "transformer.output_layer", config.vocab_size, config.hidden_size))


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


def one_qkv(blocks: Sequence[BlockSpec], module: str, order: Array | None = None) -> tuple[BlockSpec, ...]:
    """The blocks with q, k and v in one module, its rows in this order."""
    return tuple(replace(block, linears=tuple(
        replace(linear, modules=(module,), sizes=(linear.n,), order=order) if linear.name == "qkv" else linear
        for linear in block.linears)) for block in blocks)
