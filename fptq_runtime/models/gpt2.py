"""GPT-2: learned positions, LayerNorms, biases, and weights that are stored transposed."""

from __future__ import annotations

from fptq_runtime.kernels.base import Activation
from fptq_runtime.models.block import Attention, BlockSpec, LinearSpec, Model, NormSpec, StemSpec
from fptq_runtime.models.fields import Fields, ModelError, dense_config, read_curve
from fptq_runtime.models.layers import PRE_NORM_EDGES, head_spec, pre_norm


def gpt2(fields: Fields) -> Model:
    if fields.flag("add_cross_attention", False):
        raise ModelError("config.json: add_cross_attention is not supported; a decoder alone is")
    hidden_names = ("n_embd", "hidden_size")
    width = fields.integer("n_inner", 4 * fields.integer(hidden_names, 768, high=1 << 16), high=1 << 19)
    config = dense_config(
        fields, "GPT2LMHeadModel", hidden=hidden_names, layers=("n_layer", "num_hidden_layers"),
        heads=("n_head", "num_attention_heads"), positions=("n_positions", "max_position_embeddings", "n_ctx"),
        default_positions=1024, grouped=False, tied=True, intermediate=width,
    )
    hidden, eps = config.hidden_size, fields.number("layer_norm_epsilon", 1e-5, high=1.0)
    scale = config.head_dim**-0.5 if fields.flag("scale_attn_weights", True) else 1.0
    by_layer = fields.flag("scale_attn_by_inverse_layer_idx", False)

    def linear(name: str, module: str, n: int, k: int) -> LinearSpec:
        return LinearSpec(name, (module,), (n,), k, bias=True, transposed=True)

    def norm(name: str, module: str) -> NormSpec:
        return NormSpec(name, (module,), (hidden,), "layer", eps, bias=True)

    return Model(
        config,
        StemSpec("transformer.wte", positions="transformer.wpe"),
        tuple(BlockSpec(
            f"layers.{i}", f"transformer.h.{i}.", pre_norm,
            (linear("qkv", "attn.c_attn", 3 * hidden, hidden), linear("o", "attn.c_proj", hidden, hidden),
             linear("up", "mlp.c_fc", width, hidden), linear("down", "mlp.c_proj", hidden, width)),
            (norm("input_norm", "ln_1"), norm("mlp_norm", "ln_2")), PRE_NORM_EDGES, ("o", "down"),
            Attention(config.num_heads, config.num_heads, config.head_dim, scale / (i + 1) if by_layer else scale),
            Activation(read_curve(fields, "activation_function", "gelu_new")),
        ) for i in range(config.num_layers)),
        head_spec(norm("norm", "transformer.ln_f"), "lm_head", config.vocab_size, hidden),
        bare_prefix="transformer.",
        width_field=None,
    )
