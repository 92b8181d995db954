"""Granite: Llama with multipliers for the embedding, attention, what is added to the residual, and the logits. Granite
4 has Mamba-2 in the place of most attention, and experts beside an MLP; its dense models are hybrids of attention
alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fptq_runtime.kernels.base import Ops, Routing
from fptq_runtime.models.block import Block, Edge, LinearSpec, Model, Stacked
from fptq_runtime.models.fields import Fields, dense_config
from fptq_runtime.models.layers import attend, head, read
from fptq_runtime.models.llama import llama_like, read_attention
from fptq_runtime.models.mamba import mamba2, mamba_config, mixed, written
from fptq_runtime.models.moe import behind_norm, expert_linears, read_routing, with_experts
from fptq_runtime.models.recurrent import instead_of_attention, leaving


def granite(fields: Fields) -> Model:
    config = dense_config(fields, "GraniteForCausalLM")
    bias = fields.flag("attention_bias", False)
    return with_multipliers(fields, llama_like(
        fields, config, read_attention(fields, config), qkv_bias=bias, o_bias=bias,
        mlp_bias=fields.flag("mlp_bias", False)))


def granite_hybrid(fields: Fields) -> Model:
    shared = fields.integer("shared_intermediate_size", 1024, high=1 << 19)
    config = dense_config(fields, "GraniteMoeHybridForCausalLM", intermediate=shared)
    attention = read_attention(fields, config)
    if fields.get("position_embedding_type") != "rope":
        attention = replace(attention, rope=None)
    bias = fields.flag("attention_bias", False)
    up, down = ("shared_mlp.input_linear",), "shared_mlp.output_linear"
    model = llama_like(fields, config, attention, qkv_bias=bias, o_bias=bias, up=up, down=down)
    model = replace(model, width_field="shared_intermediate_size")
    if fields.integer("num_local_experts", 8, low=0):
        shared_linears = (LinearSpec("shared.up", up, (2 * shared,), config.hidden_size),
                          LinearSpec("shared.down", (down,), (config.hidden_size,), shared))
        model = with_experts(model, *granite_experts(
            fields, config.hidden_size, fields.integer("intermediate_size", 11008, high=1 << 19), shared_linears))
    kinds = _layer_types(fields, config.num_layers)
    if "linear_attention" in kinds:
        eps = fields.number("rms_norm_eps", 1e-6, high=1.0)
        space, taps = mamba_config(fields, config.hidden_size, eps, 128, 1, 256, 4)
        fields.only("hidden_act", ("silu", "swish"), "silu")  # which the convolution shares with the MLP
        bias = fields.flag("mamba_proj_bias", False)
        mixer = mamba2("mamba", config.hidden_size, space, taps, bias=bias, out_bias=bias,
                       conv_bias=fields.flag("mamba_conv_bias", True))
        model = replace(model, blocks=tuple(
            block if kind == "full_attention" else instead_of_attention(
                block, block.forward, mixer.linears, (Edge("input_norm", ("in",)),), mixer.recurrent)
            for block, kind in zip(model.blocks, kinds, strict=True)))
    return with_multipliers(fields, model)


def _layer_types(fields: Fields, num_layers: int) -> list[str]:
    name = "layer_types" if fields.get("layer_types") is not None else "layers_block_type"
    if fields.get(name) is None:
        return ["linear_attention"] * num_layers
    names = {"attention": "full_attention", "mamba": "linear_attention"}  # before transformers 5
    kinds = fields.names(name, (*names, *names.values()), num_layers)
    return [names.get(kind, kind) for kind in kinds]


def granite_experts(fields: Fields, hidden: int, width: int, more: tuple[LinearSpec, ...] = ()
                    ) -> tuple[Routing, tuple[LinearSpec, ...]]:
    """Of a block's experts, all of them in one tensor, the routing and the linears, and `more`."""
    routing = read_routing(fields, "num_local_experts", default_experts=8, default_top_k=2, normalise=True)
    return routing, (*expert_linears(
        "block_sparse_moe", routing, hidden, width, router="router.layer",
        stacked=(Stacked("block_sparse_moe.input_linear.weight"), Stacked("block_sparse_moe.output_linear.weight"))),
        *more)


def with_multipliers(fields: Fields, model: Model) -> Model:
    scale = fields.number("attention_multiplier", 1.0, 1e-9)
    share = fields.number("residual_multiplier", 1.0, 1e-9)
    divisor = fields.number("logits_scaling", 1.0, 1e-9)

    def forward(ops: Ops[Any], block: Block, x: Any) -> Any:
        if block.attention is not None:
            added, x = attend(ops, block, read(ops, block, x, "input_norm", "qkv"), x)
            added = ops.linear(added, block.linears["o"])
        else:
            added = mixed(ops, block, read(ops, block, x, "input_norm", "in"))
            added, x = written(ops, block, added), leaving(ops, block, x)
        x = ops.add(x, ops.scale(added, share))
        return ops.add(x, ops.scale(behind_norm(ops, block, x, added=False), share))

    def logits(ops: Ops[Any], block: Block, x: Any) -> Any:
        return ops.scale(head(ops, block, x), 1 / divisor)

    return replace(
        model,
        stem=replace(model.stem, scale=fields.number("embedding_multiplier", 1.0, 1e-9)),
        blocks=tuple(replace(block, forward=forward, attention=None if block.attention is None else replace(
            block.attention, softmax_scale=scale)) for block in model.blocks),
        head=replace(model.head, forward=logits),
    )
