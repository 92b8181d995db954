"""GPT-NeoX (Pythia): rope on a part of each head, LayerNorms, biases, and attention and MLP side by side."""

from __future__ import annotations

from fptq_runtime.kernels.base import Activation
from fptq_runtime.models.block import Attention, BlockSpec, LinearSpec, Model, NormSpec, StemSpec
from fptq_runtime.models.fields import Fields, dense_config, read_curve
from fptq_runtime.models.layers import PRE_NORM_EDGES, head_spec, interleaved, parallel, pre_norm
from fptq_runtime.models.rope import read_rope


def gpt_neox(fields: Fields) -> Model:
    config = dense_config(fields, "GPTNeoXForCausalLM", grouped=False)
    hidden, width, eps = config.hidden_size, config.intermediate_size, fields.number("layer_norm_eps", 1e-5, high=1.0)
    bias = fields.flag("attention_bias", True)
    attention = Attention(
        config.num_heads, config.num_heads, config.head_dim, config.head_dim**-0.5,
        rope=read_rope(fields, config.head_dim, config.max_position_embeddings, partial=0.25,
                       theta_name="rotary_emb_base", partial_name="rotary_pct"),
    )
    linears = (
        LinearSpec("qkv", ("attention.query_key_value",), (3 * hidden,), hidden, bias,
                   interleaved(config.num_heads, config.head_dim)),
        LinearSpec("o", ("attention.dense",), (hidden,), hidden, bias),
        LinearSpec("up", ("mlp.dense_h_to_4h",), (width,), hidden, True),
        LinearSpec("down", ("mlp.dense_4h_to_h",), (hidden,), width, True),
    )
    norms = (NormSpec("input_norm", ("input_layernorm",), (hidden,), "layer", eps, bias=True),
             NormSpec("mlp_norm", ("post_attention_layernorm",), (hidden,), "layer", eps, bias=True))
    side_by_side = fields.flag("use_parallel_residual", True)
    return Model(
        config,
        StemSpec("gpt_neox.embed_in"),
        tuple(BlockSpec(f"layers.{i}", f"gpt_neox.layers.{i}.", parallel if side_by_side else pre_norm, linears, norms,
                        PRE_NORM_EDGES, ("o", "down"), attention, Activation(read_curve(fields, "hidden_act", "gelu")))
              for i in range(config.num_layers)),
        head_spec(NormSpec("norm", ("gpt_neox.final_layer_norm",), (hidden,), "layer", eps, bias=True), "embed_out",
                  config.vocab_size, hidden),
        bare_prefix="gpt_neox.",
    )
