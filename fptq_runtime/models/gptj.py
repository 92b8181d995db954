"""GPT-J: attention and MLP side by side behind one LayerNorm, rope on a part of each head in pairs side by side, biases
of the MLP and the head; CodeGen keeps q, v and k in one tensor, in four parts."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fptq_runtime.kernels.base import Activation
from fptq_runtime.models.block import Attention, BlockSpec, LinearSpec, Model, StemSpec
from fptq_runtime.models.fields import Fields, ModelError, dense_config, read_curve
from fptq_runtime.models.layers import ONE_NORM_EDGES, halves_of_qkv, head_spec, norms_of, parallel
from fptq_runtime.models.rope import RopeConfig

PARTS = 4  # CodeGen's q | v | k of a quarter of the heads each


def gptj(fields: Fields) -> Model:
    def separate(hidden: int, attention: Attention) -> LinearSpec:
        return LinearSpec("qkv", ("attn.q_proj", "attn.k_proj", "attn.v_proj"), (hidden,) * 3, hidden,
                          order=halves_of_qkv(attention))

    return beside(fields, "GPTJForCausalLM", separate)


def codegen(fields: Fields) -> Model:
    def fused(hidden: int, attention: Attention) -> LinearSpec:
        if attention.num_heads % PARTS:
            raise ModelError(f"config.json: {attention.num_heads} attention heads; CodeGen's are a multiple of {PARTS}")
        q, v, k = np.arange(3 * hidden).reshape(PARTS, 3, -1).swapaxes(0, 1)
        return LinearSpec("qkv", ("attn.qkv_proj",), (3 * hidden,), hidden,
                          order=np.concatenate((q.ravel(), k.ravel(), v.ravel()))[halves_of_qkv(attention)])

    return beside(fields, "CodeGenForCausalLM", fused)


def beside(fields: Fields, architecture: str, qkv: Callable[[int, Attention], LinearSpec]) -> Model:
    names = ("n_embd", "hidden_size")
    width = fields.integer("n_inner", 4 * fields.integer(names, 4096, high=1 << 16), high=1 << 19)
    config = dense_config(
        fields, architecture, hidden=names, layers=("n_layer", "num_hidden_layers"),
        heads=("n_head", "num_attention_heads"), positions=("n_positions", "max_position_embeddings"),
        grouped=False, intermediate=width,
    )
    hidden = config.hidden_size
    rotated = fields.integer("rotary_dim", 64, low=2, high=config.head_dim)
    if rotated % 2:
        raise ModelError(f"config.json: rotary_dim {rotated}; rope turns pairs")
    attention = Attention(config.num_heads, config.num_heads, config.head_dim, config.head_dim**-0.5,
                          rope=RopeConfig(10000.0, rotated))
    norm = norms_of("layer", hidden, fields.number("layer_norm_epsilon", 1e-5, high=1.0), bias=True)
    linears = (
        qkv(hidden, attention),
        LinearSpec("o", ("attn.out_proj",), (hidden,), hidden),
        LinearSpec("up", ("mlp.fc_in",), (width,), hidden, True),
        LinearSpec("down", ("mlp.fc_out",), (hidden,), width, True),
    )
    activation = Activation(read_curve(fields, "activation_function", "gelu_new"))
    return Model(
        config,
        StemSpec("transformer.wte"),
        tuple(BlockSpec(f"layers.{i}", f"transformer.h.{i}.", parallel, linears, (norm("input_norm", "ln_1"),),
                        ONE_NORM_EDGES, ("o", "down"), attention, activation) for i in range(config.num_layers)),
        head_spec(norm("norm", "transformer.ln_f"), "lm_head", config.vocab_size, hidden, True),
        bare_prefix="transformer.",
        width_field=None,
    )
