"""Falcon: attention and MLP side by side, query heads in groups around their keys and values; one norm before both, or
one each, or, where they are not side by side, GPT-2's order."""

from __future__ import annotations

import numpy as np

from fptq_runtime.kernels.base import Activation
from fptq_runtime.models.block import BlockSpec, LinearSpec, Model, StemSpec
from fptq_runtime.models.fields import Fields, ModelError, dense_config, read_curve
from fptq_runtime.models.layers import ONE_NORM_EDGES, PRE_NORM_EDGES, head_spec, norms_of, parallel, pre_norm
from fptq_runtime.models.llama import read_attention


def falcon(fields: Fields) -> Model:
    if fields.flag("alibi", False):
        raise ModelError("config.json: alibi true (Falcon-RW) is not supported; a Falcon with rope is")
    names = ("n_embed", "hidden_size")
    heads = fields.integer("num_attention_heads", high=1 << 10)
    grouped, shared = fields.flag("new_decoder_architecture", False), fields.flag("multi_query", True)
    kv_heads = fields.integer("num_kv_heads", heads, high=1 << 10) if grouped else 1 if shared else heads
    width = fields.integer("ffn_hidden_size", 4 * fields.integer(names, high=1 << 16), high=1 << 19)
    config = dense_config(Fields({**fields.data, "num_key_value_heads": kv_heads, "head_dim": None}),
                          "FalconForCausalLM", hidden=names, tied=True, intermediate=width)
    hidden, dim, bias = config.hidden_size, config.head_dim, fields.flag("bias", False)
    attention = read_attention(fields, config)
    linears = (
        LinearSpec("qkv", ("self_attention.query_key_value",), (attention.q_size + 2 * attention.kv_size,), hidden,
                   bias, by_groups(heads, kv_heads, dim)),
        LinearSpec("o", ("self_attention.dense",), (hidden,), hidden, bias),
        LinearSpec("up", ("mlp.dense_h_to_4h",), (width,), hidden, bias),
        LinearSpec("down", ("mlp.dense_4h_to_h",), (hidden,), width, bias),
    )
    norm = norms_of("layer", hidden, fields.number("layer_norm_epsilon", 1e-5, high=1.0), bias=True)
    count = fields.integer("num_ln_in_parallel_attn", 2 if grouped else 1, high=2)
    side_by_side = fields.flag("parallel_attn", True)
    if (grouped and not side_by_side) or (count == 2 and not grouped and side_by_side):
        raise ModelError("config.json: new_decoder_architecture needs parallel_attn, and two norms need both")
    two = ("ln_attn", "ln_mlp") if side_by_side else ("input_layernorm", "post_attention_layernorm")
    one = side_by_side and count == 1
    norms = (norm("input_norm", "input_layernorm"),) if one else (norm("input_norm", two[0]), norm("mlp_norm", two[1]))
    activation = Activation(read_curve(fields, "activation", "gelu"))
    return Model(
        config,
        StemSpec("transformer.word_embeddings"),
        tuple(BlockSpec(f"layers.{i}", f"transformer.h.{i}.", parallel if side_by_side else pre_norm, linears, norms,
                        ONE_NORM_EDGES if one else PRE_NORM_EDGES, ("o", "down"), attention, activation)
              for i in range(config.num_layers)),
        head_spec(norm("norm", "transformer.ln_f"), "lm_head", config.vocab_size, hidden),
        bare_prefix="transformer.",
        width_field=None,
    )


def by_groups(heads: int, kv_heads: int, dim: int) -> np.ndarray:
    """The row order of a fused qkv that is stored as [KV head, (its query heads, k, v), dim]."""
    stored = np.arange((heads + 2 * kv_heads) * dim).reshape(kv_heads, -1, dim)
    return np.concatenate((stored[:, :-2].ravel(), stored[:, -2].ravel(), stored[:, -1].ravel()))
