"""OPT: learned positions, LayerNorms, biases, and ReLU."""

from __future__ import annotations

from fptq_runtime.kernels.base import Activation
from fptq_runtime.models.block import Attention, BlockSpec, Edge, LinearSpec, Model, NormSpec, StemSpec
from fptq_runtime.models.fields import Fields, ModelError, dense_config, read_curve
from fptq_runtime.models.layers import PRE_NORM_EDGES, head_spec, pre_norm

EPS = 1e-5  # torch's; config.json does not say it


def opt(fields: Fields) -> Model:
    config = dense_config(fields, "OPTForCausalLM", grouped=False, tied=True,
                          intermediate=fields.integer("ffn_dim", high=1 << 19))
    hidden, width = config.hidden_size, config.intermediate_size
    if not fields.flag("do_layer_norm_before", True) or fields.flag("_remove_final_layer_norm", False):
        raise ModelError("config.json: do_layer_norm_before false and _remove_final_layer_norm true (OPT-350M) are not "
                         "supported; another size of OPT is")
    if fields.integer("word_embed_proj_dim", hidden, high=1 << 16) != hidden:
        raise ModelError("config.json: word_embed_proj_dim other than hidden_size (OPT-350M) is not supported; another "
                         "size of OPT is")
    bias, scaled = fields.flag("enable_bias", True), fields.flag("layer_norm_elementwise_affine", True)
    attention = Attention(config.num_heads, config.num_heads, config.head_dim, config.head_dim**-0.5)
    linears = (
        LinearSpec("qkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), (hidden,) * 3, hidden, bias),
        LinearSpec("o", ("self_attn.out_proj",), (hidden,), hidden, bias),
        LinearSpec("up", ("fc1",), (width,), hidden, bias),
        LinearSpec("down", ("fc2",), (hidden,), width, bias),
    )

    def norm(name: str, module: str) -> NormSpec:
        return NormSpec(name, (module,), (hidden,), "layer", EPS, bias=scaled, scaled=scaled)

    curve = read_curve(fields, "activation_function", "relu")
    edges = PRE_NORM_EDGES if scaled else PRE_NORM_EDGES[1:2]  # a norm without a weight takes no scale
    return Model(
        config,
        StemSpec("model.decoder.embed_tokens", positions="model.decoder.embed_positions", position_offset=2),
        tuple(BlockSpec(f"layers.{i}", f"model.decoder.layers.{i}.", pre_norm, linears,
                        (norm("input_norm", "self_attn_layer_norm"), norm("mlp_norm", "final_layer_norm")),
                        (*edges, *((Edge("up", ("down",), "relu"),) if curve == "relu" else ())), ("o", "down"),
                        attention, Activation(curve)) for i in range(config.num_layers)),
        head_spec(norm("norm", "model.decoder.final_layer_norm"), "lm_head", config.vocab_size, hidden),
        width_field="ffn_dim",
    )
