"""DeciLM, as Llama-3.3-Nemotron Super and Ultra are: Llama without the attention or the MLP of some layers, whose MLPs
have widths of their own. Its code comes with its checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fptq_runtime.models.block import BlockSpec, LinearSpec, Model
from fptq_runtime.models.fields import Fields, ModelError, dense_config
from fptq_runtime.models.llama import biased_llama
from fptq_runtime.models.nemotron_h import attention_block, mlp_block

NORM_OF = {"qkv": "input_norm", "up": "mlp_norm"}
OFF = ("replace_with_linear", "sparsify", "window_length", "num_sink_tokens", "use_prefill_window_in_sink_attention",
       "unshifted_sink")  # of a layer, and all that is supported of them is that they are off
KNOWN = {"attention": ("no_op", "n_heads_in_group", *OFF), "ffn": ("no_op", "ffn_mult", *OFF[:2])}


def decilm(fields: Fields) -> Model:
    layers = _layers(fields)
    heads, hidden = (fields.integer(name, high=1 << 16) for name in ("num_attention_heads", "hidden_size"))
    groups = {attention.integer("n_heads_in_group", high=heads) for attention, _ in layers if not _is_off(attention)}
    if len(groups) != 1 or heads % max(groups):
        raise ModelError(f"{fields.where}: block_configs: n_heads_in_group must be one divisor of {heads} for all "
                         f"layers, not {sorted(groups)}: the KV cache has as many heads in each")
    widths = [None if _is_off(ffn) else _width(ffn.number("ffn_mult", low=1e-3, high=1e3), hidden) for _, ffn in layers]
    config = dense_config(
        Fields({**fields.data, "num_hidden_layers": len(layers), "num_key_value_heads": heads // groups.pop()},
               fields.where),
        "DeciLMForCausalLM", intermediate=max((width for width in widths if width is not None), default=1))
    model = biased_llama(fields, config)
    blocks = tuple(_with(block, not _is_off(attention), width)
                   for block, (attention, _), width in zip(model.blocks, layers, widths, strict=True)
                   if not (_is_off(attention) and width is None))
    return replace(model, config=replace(config, num_layers=len(blocks)), blocks=blocks, width_field=None)


def _with(block: BlockSpec, attends: bool, width: int | None) -> BlockSpec:
    """The block with an MLP so wide, or none, and with its attention or without."""
    def own(linear: LinearSpec) -> LinearSpec | None:
        if linear.name in ("qkv", "o"):
            return linear if attends else None
        if width is None:
            return None
        return replace(linear, sizes=(width, width)) if linear.name == "up" else replace(linear, k=width)

    linears = tuple(made for linear in block.linears if (made := own(linear)) is not None)
    names = {linear.name for linear in linears}
    norms = {NORM_OF[name] for name in names & set(NORM_OF)}
    if len(norms) < len(block.norms):
        block = replace(block, forward=attention_block if attends else mlp_block)
    return replace(
        block, linears=linears, norms=tuple(norm for norm in block.norms if norm.name in norms),
        edges=tuple(edge for edge in block.edges if names.issuperset(edge.readers)),
        residual=tuple(name for name in block.residual if name in names),
        attention=block.attention if attends else None)


def _layers(fields: Fields) -> list[tuple[Fields, Fields]]:
    """Of each layer what is said of its attention and of its MLP. Raises ModelError."""
    given = fields.get("block_configs")
    if not isinstance(given, list) or not given:
        raise ModelError(f"{fields.where}: block_configs must say what each layer has, not {given!r}")

    def part(layer: int, name: str) -> Fields:
        said = given[layer].get(name) if isinstance(given[layer], Mapping) else None
        where = f"{fields.where}: block_configs[{layer}].{name}"
        if not isinstance(said, Mapping):
            raise ModelError(f"{where} must be an object, not {said!r}")
        for fact in said:
            if fact not in KNOWN[name]:
                raise ModelError(f"{where}.{fact} is not known")
        known = Fields(said, where)
        for fact in OFF:
            known.only(fact, _OFF, None)
        return known

    return [(part(layer, "attention"), part(layer, "ffn")) for layer in range(len(given))]


_OFF: tuple[Any, ...] = (None, False, 0)


def _is_off(part: Fields) -> bool:
    return part.flag("no_op", False)


def _width(factor: float, hidden: int) -> int:
    """Of an MLP: two thirds of so many times the hidden size, up to the next multiple of 256."""
    return -(-int(2 * factor * hidden / 3) // 256) * 256
