"""Granite, the dense ones: Llama with multipliers for the embedding, attention, what is added to the residual, and the
logits. Granite 4's dense models are hybrids of attention alone, whose gate and up are one tensor."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fptq_runtime.kernels.base import Ops
from fptq_runtime.models.block import Block, Model
from fptq_runtime.models.fields import Fields, ModelError, dense_config
from fptq_runtime.models.layers import attend, head, mlp, read
from fptq_runtime.models.llama import llama_like, read_attention


def granite(fields: Fields) -> Model:
    config = dense_config(fields, "GraniteForCausalLM")
    bias = fields.flag("attention_bias", False)
    return with_multipliers(fields, llama_like(
        fields, config, read_attention(fields, config), qkv_bias=bias, o_bias=bias,
        mlp_bias=fields.flag("mlp_bias", False)))


def granite_hybrid(fields: Fields) -> Model:
    config = dense_config(fields, "GraniteMoeHybridForCausalLM",
                          intermediate=fields.integer("shared_intermediate_size", 1024, high=1 << 19))
    kinds = fields.get(("layer_types", "layers_block_type"))
    attention_alone = isinstance(kinds, list) and len(kinds) == config.num_layers and all(
        kind in ("attention", "full_attention") for kind in kinds)
    if not attention_alone or fields.integer("num_local_experts", 8, low=0):
        raise ModelError("config.json: Mamba layers and experts of GraniteMoeHybridForCausalLM are not supported; its "
                         "dense models, with layer_types of attention alone and num_local_experts 0, are")
    attention = read_attention(fields, config)
    if fields.get("position_embedding_type") != "rope":
        attention = replace(attention, rope=None)
    bias = fields.flag("attention_bias", False)
    return with_multipliers(fields, replace(llama_like(
        fields, config, attention, qkv_bias=bias, o_bias=bias, up=("shared_mlp.input_linear",),
        down="shared_mlp.output_linear"), width_field="shared_intermediate_size"))


def with_multipliers(fields: Fields, model: Model) -> Model:
    scale = fields.number("attention_multiplier", 1.0, 1e-9)
    share = fields.number("residual_multiplier", 1.0, 1e-9)
    divisor = fields.number("logits_scaling", 1.0, 1e-9)

    def forward(ops: Ops[Any], block: Block, x: Any) -> Any:
        attended, x = attend(ops, block, read(ops, block, x, "input_norm", "qkv"), x)
        x = ops.add(x, ops.scale(ops.linear(attended, block.linears["o"]), share))
        return ops.add(x, ops.scale(mlp(ops, block, read(ops, block, x, "mlp_norm", "up")), share))

    def logits(ops: Ops[Any], block: Block, x: Any) -> Any:
        return ops.scale(head(ops, block, x), 1 / divisor)

    return replace(
        model,
        stem=replace(model.stem, scale=fields.number("embedding_multiplier", 1.0, 1e-9)),
        blocks=tuple(replace(block, forward=forward, attention=replace(block.attention, softmax_scale=scale))
                     for block in model.blocks if block.attention is not None),
        head=replace(model.head, forward=logits),
    )
