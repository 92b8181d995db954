"""BLOOM: ALiBi in place of positions, LayerNorms, biases everywhere, and a norm behind the embedding."""

from __future__ import annotations

from fptq_runtime.kernels.base import Activation
from fptq_runtime.models.block import Attention, BlockSpec, LinearSpec, Model, NormSpec, StemSpec
from fptq_runtime.models.fields import Fields, ModelError, dense_config
from fptq_runtime.models.layers import PRE_NORM_EDGES, head_spec, interleaved, pre_norm


def bloom(fields: Fields) -> Model:
    if fields.flag("apply_residual_connection_post_layernorm", False):
        raise ModelError("config.json: apply_residual_connection_post_layernorm is not supported")
    names = ("hidden_size", "n_embed")
    config = dense_config(
        fields, "BloomForCausalLM", hidden=names, layers=("n_layer", "num_hidden_layers"),
        heads=("n_head", "num_attention_heads"), positions="seq_length", grouped=False, tied=True,
        intermediate=4 * fields.integer(names, high=1 << 16),
    )
    hidden, width = config.hidden_size, config.intermediate_size
    eps = fields.number("layer_norm_epsilon", 1e-5, high=1.0)
    attention = Attention(config.num_heads, config.num_heads, config.head_dim, config.head_dim**-0.5, alibi=True)
    linears = (
        LinearSpec("qkv", ("self_attention.query_key_value",), (3 * hidden,), hidden, True,
                   interleaved(config.num_heads, config.head_dim)),
        LinearSpec("o", ("self_attention.dense",), (hidden,), hidden, True),
        LinearSpec("up", ("mlp.dense_h_to_4h",), (width,), hidden, True),
        LinearSpec("down", ("mlp.dense_4h_to_h",), (hidden,), width, True),
    )
    norms = (NormSpec("input_norm", ("input_layernorm",), (hidden,), "layer", eps, bias=True),
             NormSpec("mlp_norm", ("post_attention_layernorm",), (hidden,), "layer", eps, bias=True))
    return Model(
        config,
        StemSpec("transformer.word_embeddings",
                 norm=NormSpec("norm", ("transformer.word_embeddings_layernorm",), (hidden,), "layer", eps, bias=True)),
        tuple(BlockSpec(f"layers.{i}", f"transformer.h.{i}.", pre_norm, linears, norms, PRE_NORM_EDGES, ("o", "down"),
                        attention, Activation("gelu_tanh")) for i in range(config.num_layers)),
        head_spec(NormSpec("norm", ("transformer.ln_f",), (hidden,), "layer", eps, bias=True), "lm_head",
                  config.vocab_size, hidden),
        bare_prefix="transformer.",
        width_field=None,
    )
