"""SmolLM3: Llama without rope in every fourth layer, where windows stand if they are asked for."""

from __future__ import annotations

from dataclasses import replace

from fptq_runtime.models.block import Model
from fptq_runtime.models.fields import Fields, ModelError, dense_config
from fptq_runtime.models.llama import llama_like, read_attention
from fptq_runtime.models.mistral import read_window
from fptq_runtime.models.rope import read_rope


def smollm3(fields: Fields) -> Model:
    fields = Fields({**fields.data, "num_key_value_heads": fields.data.get("num_key_value_heads", 4)})
    config = dense_config(fields, "SmolLM3ForCausalLM", default_positions=32768, tied=True)
    bias = fields.flag("attention_bias", False)
    turning = read_rope_layers(fields, config.num_layers)
    asked = fields.flag("use_sliding_window", False) and fields.get("sliding_window") is not None
    window = read_window(fields) if asked else None
    if fields.get("layer_types") is None:
        windows = [None if turns else window for turns in turning]
    else:
        kinds = fields.names("layer_types", ("full_attention", "sliding_attention"), config.num_layers)
        if window is None and fields.get("sliding_window") is not None and "sliding_attention" in kinds:
            raise ModelError("config.json: layer_types names layers with a sliding window, but use_sliding_window is "
                             "false; say the same in both")
        windows = [window if kind == "sliding_attention" else None for kind in kinds]
    attention = replace(read_attention(fields, config),
                        rope=read_rope(fields, config.head_dim, config.max_position_embeddings, theta=2e6))
    model = llama_like(fields, config, attention, windows=windows, qkv_bias=bias, o_bias=bias,
                       mlp_bias=fields.flag("mlp_bias", False))
    return replace(model, blocks=tuple(
        block if turns else replace(block, attention=replace(block.attention, rope=None))
        for block, turns in zip(model.blocks, turning, strict=True) if block.attention is not None))


def read_rope_layers(fields: Fields, num_layers: int) -> list[bool]:
    """Which layers have rope: `no_rope_layers` holds a 1 for each that has, else every fourth has none."""
    given = fields.get("no_rope_layers")
    if given is None:
        interval = fields.integer("no_rope_layer_interval", 4)
        return [(i + 1) % interval != 0 for i in range(num_layers)]
    if not isinstance(given, list) or len(given) < num_layers or any(each not in (0, 1) for each in given):
        raise ModelError(f"config.json: no_rope_layers must list 0 or 1 for each of {num_layers} layers, not {given!r}")
    return [bool(each) for each in given[:num_layers]]
