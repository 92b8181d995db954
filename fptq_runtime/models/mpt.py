"""MPT: ALiBi in place of positions, LayerNorms, no biases."""

from __future__ import annotations

from collections.abc import Mapping

from fptq_runtime.kernels.base import Activation
from fptq_runtime.models.block import Attention, BlockSpec, LinearSpec, Model, StemSpec
from fptq_runtime.models.fields import Fields, ModelError, dense_config
from fptq_runtime.models.layers import PRE_NORM_EDGES, head_spec, norms_of, pre_norm


def mpt(fields: Fields) -> Model:
    fields.only("no_bias", (True, None), True)
    fields.only("logit_scale", (None,), None)
    said = fields.get("attn_config", {})
    if not isinstance(said, Mapping):
        raise ModelError(f"config.json: attn_config must be an object, not {said!r}")
    inner = Fields(said, "config.json: attn_config")
    for name, allowed, default in (("attn_type", ("multihead_attention",), "multihead_attention"),
                                   ("clip_qkv", (None,), None), ("qk_ln", (False, None), False),
                                   ("prefix_lm", (False, None), False), ("alibi", (True,), True),
                                   ("alibi_bias_max", (8,), 8), ("attn_uses_sequence_id", (False, None), False)):
        inner.only(name, allowed, default)
    names = ("d_model", "hidden_size")
    width = fields.integer(names, high=1 << 16) * fields.integer("expansion_ratio", 4, high=8)
    config = dense_config(
        Fields({**fields.data, "head_dim": None}), "MptForCausalLM", hidden=names,
        layers=("n_layers", "num_hidden_layers"), heads=("n_heads", "num_attention_heads"), positions="max_seq_len",
        grouped=False, tied=True, intermediate=width,
    )
    hidden = config.hidden_size
    attention = Attention(config.num_heads, config.num_heads, config.head_dim,
                          inner.number("softmax_scale", config.head_dim**-0.5), alibi=True)
    norm = norms_of("layer", hidden, fields.number("layer_norm_epsilon", 1e-5, high=1.0))
    linears = (
        LinearSpec("qkv", ("attn.Wqkv",), (3 * hidden,), hidden),
        LinearSpec("o", ("attn.out_proj",), (hidden,), hidden),
        LinearSpec("up", ("ffn.up_proj",), (width,), hidden),
        LinearSpec("down", ("ffn.down_proj",), (hidden,), width),
    )
    return Model(
        config,
        StemSpec("transformer.wte"),
        tuple(BlockSpec(f"layers.{i}", f"transformer.blocks.{i}.", pre_norm, linears,
                        (norm("input_norm", "norm_1"), norm("mlp_norm", "norm_2")), PRE_NORM_EDGES, ("o", "down"),
                        attention, Activation("gelu")) for i in range(config.num_layers)),
        head_spec(norm("norm", "transformer.norm_f"), "lm_head", config.vocab_size, hidden),
        bare_prefix="transformer.",
        width_field=None,
    )
