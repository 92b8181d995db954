"""GPT-BigCode (SantaCoder, StarCoder): GPT-2 whose query heads share one head of keys and values."""

from __future__ import annotations

from fptq_runtime.kernels.base import Activation
from fptq_runtime.models.block import Attention, BlockSpec, LinearSpec, Model, StemSpec
from fptq_runtime.models.fields import Fields, ModelError, dense_config, read_curve
from fptq_runtime.models.layers import PRE_NORM_EDGES, head_spec, interleaved, norms_of, pre_norm


def gpt_bigcode(fields: Fields) -> Model:
    if fields.flag("add_cross_attention", False):
        raise ModelError("config.json: add_cross_attention is not supported; a decoder alone is")
    names, heads = ("n_embd", "hidden_size"), ("n_head", "num_attention_heads")
    width = fields.integer("n_inner", 4 * fields.integer(names, 768, high=1 << 16), high=1 << 19)
    shared = fields.flag("multi_query", True)
    kv_heads = 1 if shared else fields.integer(heads, high=1 << 10)
    config = dense_config(
        Fields({**fields.data, "num_key_value_heads": kv_heads}), "GPTBigCodeForCausalLM", hidden=names,
        layers=("n_layer", "num_hidden_layers"), heads=heads, positions=("n_positions", "max_position_embeddings"),
        default_positions=1024, tied=True, intermediate=width,
    )
    hidden = config.hidden_size
    scale = config.head_dim**-0.5 if fields.flag("scale_attn_weights", True) else 1.0
    attention = Attention(config.num_heads, kv_heads, config.head_dim, scale)
    norm = norms_of("layer", hidden, fields.number("layer_norm_epsilon", 1e-5, high=1.0), bias=True)
    linears = (
        LinearSpec("qkv", ("attn.c_attn",), (hidden + 2 * attention.kv_size,), hidden, True,
                   None if shared else interleaved(config.num_heads, config.head_dim)),
        LinearSpec("o", ("attn.c_proj",), (hidden,), hidden, True),
        LinearSpec("up", ("mlp.c_fc",), (width,), hidden, True),
        LinearSpec("down", ("mlp.c_proj",), (hidden,), width, True),
    )
    activation = Activation(read_curve(fields, "activation_function", "gelu_pytorch_tanh"))
    return Model(
        config,
        StemSpec("transformer.wte", positions="transformer.wpe"),
        tuple(BlockSpec(f"layers.{i}", f"transformer.h.{i}.", pre_norm, linears,
                        (norm("input_norm", "ln_1"), norm("mlp_norm", "ln_2")), PRE_NORM_EDGES, ("o", "down"),
                        attention, activation) for i in range(config.num_layers)),
        head_spec(norm("norm", "transformer.ln_f"), "lm_head", config.vocab_size, hidden),
        bare_prefix="transformer.",
        width_field=None,
    )
