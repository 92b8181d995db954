"""Granite, the dense ones: Llama with multipliers for the embedding, attention, what is added to the residual, and the
logits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fptq_runtime.kernels.base import Ops
from fptq_runtime.models.block import Block, Model
from fptq_runtime.models.fields import Fields, dense_config
from fptq_runtime.models.layers import attend, head, mlp, read
from fptq_runtime.models.llama import llama_like, read_attention


def granite(fields: Fields) -> Model:
    config = dense_config(fields, "GraniteForCausalLM")
    attention = replace(read_attention(fields, config), softmax_scale=fields.number("attention_multiplier", 1.0, 1e-9))
    bias = fields.flag("attention_bias", False)
    model = llama_like(fields, config, attention, qkv_bias=bias, o_bias=bias, mlp_bias=fields.flag("mlp_bias", False))
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
        blocks=tuple(replace(block, forward=forward) for block in model.blocks),
        head=replace(model.head, forward=logits),
    )
