"""GPT-Neo: learned positions, scores that are not scaled, and windows in the layers that are "local"."""

from __future__ import annotations

from fptq_runtime.kernels.base import Activation
from fptq_runtime.models.block import Attention, BlockSpec, LinearSpec, Model, StemSpec
from fptq_runtime.models.fields import Fields, ModelError, dense_config, read_curve
from fptq_runtime.models.layers import PRE_NORM_EDGES, head_spec, norms_of, pre_norm


def gpt_neo(fields: Fields) -> Model:
    width = fields.integer("intermediate_size", 4 * fields.integer("hidden_size", high=1 << 16), high=1 << 19)
    config = dense_config(
        fields, "GPTNeoForCausalLM", layers=("num_layers", "num_hidden_layers"),
        heads=("num_heads", "num_attention_heads"), grouped=False, tied=True, intermediate=width,
    )
    hidden, window = config.hidden_size, fields.integer("window_size", 256, high=1 << 24)
    norm = norms_of("layer", hidden, fields.number("layer_norm_epsilon", 1e-5, high=1.0), bias=True)
    linears = (
        LinearSpec("qkv", tuple(f"attn.attention.{each}_proj" for each in "qkv"), (hidden,) * 3, hidden),
        LinearSpec("o", ("attn.attention.out_proj",), (hidden,), hidden, True),
        LinearSpec("up", ("mlp.c_fc",), (width,), hidden, True),
        LinearSpec("down", ("mlp.c_proj",), (hidden,), width, True),
    )
    activation = Activation(read_curve(fields, "activation_function", "gelu_new"))
    return Model(
        config,
        StemSpec("transformer.wte", positions="transformer.wpe"),
        tuple(BlockSpec(f"layers.{i}", f"transformer.h.{i}.", pre_norm, linears,
                        (norm("input_norm", "ln_1"), norm("mlp_norm", "ln_2")), PRE_NORM_EDGES, ("o", "down"),
                        Attention(config.num_heads, config.num_heads, config.head_dim, 1.0,
                                  window if kind == "local" else None), activation)
              for i, kind in enumerate(read_kinds(fields, config.num_layers))),
        head_spec(norm("norm", "transformer.ln_f"), "lm_head", config.vocab_size, hidden),
        bare_prefix="transformer.",
        width_field=None,
    )


def read_kinds(fields: Fields, num_layers: int) -> list[str]:
    """Each layer's "global" or "local": `attention_types` lists patterns and how often each is repeated."""
    given = fields.get("attention_types", [[["global", "local"], 12]])
    kinds: list[str] = []
    try:
        for pattern, times in given:
            if isinstance(times, int) and 0 <= times <= num_layers:
                kinds += list(pattern) * times
    except (TypeError, ValueError):
        kinds = []
    if len(kinds) != num_layers or any(kind not in ("global", "local") for kind in kinds):
        raise ModelError(f"config.json: attention_types must name {num_layers} layers global or local, not {given!r}")
    if fields.get("attention_layers", kinds) != kinds:
        raise ModelError("config.json: attention_layers and attention_types name different layers local")
    return kinds
