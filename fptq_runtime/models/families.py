"""One `ModelSpec` per Hugging Face architecture: its config, its tensor names, and how it fuses them."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fptq_runtime.config import ModelConfig, RopeConfig
from fptq_runtime.errors import FptqError
from fptq_runtime.kernels.base import Array, Embedding, Linear, Norm, QuantizedWeight
from fptq_runtime.models.decoder import Block, Head, Stem
from fptq_runtime.models.formats import align, dequantize

MAX_POSITIONS = 1 << 21  # a rope table of 1 GiB at head_dim 128
MAX_HEAD_DIM = 256  # what the attention kernels hold in registers and on their stack


class ModelError(FptqError):
    """A config that is malformed, or a model that this runtime does not run. One line, for the user."""


class Fields:
    """A config.json, read with a type and a bound for every value that is believed."""

    def __init__(self, data: Mapping[str, Any], where: str = "config.json") -> None:
        self.data = data
        self.where = where

    def integer(self, name: str, default: int | None = None, low: int = 1, high: int = 1 << 20) -> int:
        value = self.data.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ModelError(f"{self.where}: {name} must be an integer between {low} and {high}, not {value!r}")
        return value

    def number(self, name: str, default: float | None = None, low: float = 0.0, high: float = 1e12) -> float:
        value = self.data.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise ModelError(f"{self.where}: {name} must be a number between {low:g} and {high:g}, not {value!r}")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self.data.get(name)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise ModelError(f"{self.where}: {name} must be true or false, not {value!r}")
        return value

    def only(self, name: str, allowed: Sequence[Any], default: Any) -> Any:
        value = self.data.get(name, default)
        if value not in allowed:
            supported = ", ".join(map(repr, allowed))
            raise ModelError(f"{self.where}: {name} {value!r} is not supported; only {supported} is")
        return value

    def token_ids(self, name: str, vocab_size: int) -> tuple[int, ...]:
        value = self.data.get(name)
        values = [] if value is None else value if isinstance(value, list) else [value]
        for item in values:
            if isinstance(item, bool) or not isinstance(item, int) or not 0 <= item < vocab_size:
                raise ModelError(f"{self.where}: {name} must be token ids below {vocab_size}, not {value!r}")
        return tuple(values)


@dataclass(frozen=True)
class ModelSpec:
    """Module names as the checkpoint has them; those of a layer are relative to `layers`.{index}.

    qkv and up list the modules whose rows are stacked. interleaved_qkv: the one fused module holds its rows as
    [head, (q, k, v), head_dim]. bare_prefix: what some checkpoints of the family leave out of every name.
    """

    architecture: str
    parse: Callable[[Fields], ModelConfig]
    embedding: str = "model.embed_tokens"
    embedding_norm: str | None = None
    layers: str = "model.layers"
    input_norm: str = "input_layernorm"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    interleaved_qkv: bool = False
    q_norm: str | None = None
    k_norm: str | None = None
    o: str = "self_attn.o_proj"
    mlp_norm: str = "post_attention_layernorm"
    up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"
    final_norm: str = "model.norm"
    lm_head: str = "lm_head"
    bare_prefix: str = "model."

    def layer(self, index: int, module: str) -> str:
        return f"{self.layers}.{index}.{module}"

    def linear_names(self, config: ModelConfig) -> tuple[str, ...]:
        """Of every block and the head."""
        modules = (*self.qkv, self.o, *self.up, self.down)
        return (*(self.layer(i, module) for i in range(config.num_layers) for module in modules), self.lm_head)

    def qkv_sizes(self, config: ModelConfig) -> tuple[int, ...]:
        """Rows of each module in `qkv`."""
        q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        return (q + 2 * kv,) if self.interleaved_qkv else (q, kv, kv)

    def up_sizes(self, config: ModelConfig) -> tuple[int, ...]:
        return (config.intermediate_size,) * len(self.up)

    def qkv_order(self, config: ModelConfig) -> Array | None:
        """order[j]: which checkpoint row stands at row j of the stacked q | k | v; None where they are the same."""
        if not self.interleaved_qkv:
            return None
        rows = np.arange(config.num_heads * 3 * config.head_dim)
        return rows.reshape(config.num_heads, 3, config.head_dim).swapaxes(0, 1).ravel()

    def stem_modules(self, stem: Stem) -> list[tuple[str, Embedding | Norm]]:
        modules: list[tuple[str, Embedding | Norm]] = [(self.embedding, stem.embedding)]
        if self.embedding_norm is not None and stem.norm is not None:
            modules.append((self.embedding_norm, stem.norm))
        return modules

    def block_modules(self, config: ModelConfig, index: int, block: Block) -> list[tuple[str, Linear | Norm]]:
        """A block's parameters under the checkpoint's names, unfused: the inverse of loading."""
        modules: list[tuple[str, Linear | Norm]] = []
        modules += [(self.input_norm, block.input_norm), (self.mlp_norm, block.mlp_norm)]
        modules += unfuse(block.qkv, self.qkv, self.qkv_sizes(config), self.qkv_order(config))
        modules += [(self.o, block.o)]
        modules += unfuse(block.up, self.up, self.up_sizes(config), None)
        modules += [(self.down, block.down)]
        for name, norm in ((self.q_norm, block.attention.q_norm), (self.k_norm, block.attention.k_norm)):
            if name is not None:
                modules.append((name, norm))
        return [(self.layer(index, name), module) for name, module in modules]

    def head_modules(self, head: Head) -> list[tuple[str, Linear | Norm]]:
        return [(self.final_norm, head.norm), (self.lm_head, head.lm_head)]


def fuse(name: str, parts: Sequence[Linear], order: Array | None) -> Linear:
    """Stack linears that read the same input, and their low-rank factors: `down` once where all have the same, else
    block by block. Where some have more bits or smaller groups the others follow, and float ones make all float, since
    both are exact. Raises ModelError where activations differ, or weights in another way."""
    first = parts[0]
    if any(part.act != first.act for part in parts):
        raise ModelError(f"{name}: {', '.join(p.name for p in parts)} read one input but quantize it differently")
    biases = [part.bias for part in parts]
    if any(bias is None for bias in biases) != all(bias is None for bias in biases):
        biases = [np.zeros(_rows(p), np.float32) if p.bias is None else p.bias for p in parts]
    bias = None if biases[0] is None else _stack(biases)
    weight = _stack_weights([part.weight for part in parts])
    if weight is None:
        raise ModelError(f"{name}: {', '.join(p.name for p in parts)} are fused but quantized differently")
    fused = Linear(name, weight, bias, first.act, _stack_low_rank(name, parts))
    return fused if order is None else _take_rows(fused, name, order)


def unfuse(linear: Linear, names: Sequence[str], sizes: Sequence[int],
           order: Array | None) -> list[tuple[str, Linear]]:
    """The inverse of `fuse`."""
    restored = linear if order is None else _take_rows(linear, linear.name, order.argsort())
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [
        (name, _take_rows(restored, name, slice(start, start + size)))
        for name, start, size in zip(names, starts, sizes, strict=True)
    ]


def _stack_weights(weights: Sequence[Array | QuantizedWeight]) -> Array | QuantizedWeight | None:
    """None where they cannot be brought to one form."""
    quantized = [w for w in weights if isinstance(w, QuantizedWeight)]
    if not quantized:
        return _stack(weights)
    if len(quantized) < len(weights):
        if any(w.type == "float" for w in quantized):
            return None
        return _stack([dequantize(w) if isinstance(w, QuantizedWeight) else w for w in weights])
    aligned = align(quantized)
    if aligned is None:
        return None
    return replace(aligned[0], packed=_stack([w.packed for w in aligned]), scale=_stack([w.scale for w in aligned]))


def _stack(arrays: Sequence[Array]) -> Array:
    """Along the first dimension; in float32 where their types differ."""
    if len({array.dtype for array in arrays}) > 1:
        return np.concatenate([array.astype(np.float32) for array in arrays])
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _stack_low_rank(name: str, parts: Sequence[Linear]) -> tuple[Array, Array] | None:
    factors = [part.low_rank for part in parts if part.low_rank is not None]
    if not factors:
        return None
    if len(factors) != len(parts):
        raise ModelError(f"{name}: {', '.join(p.name for p in parts)} are fused, but not all have low-rank factors")
    first = factors[0][0]
    if all(np.array_equal(down, first) for down, _ in factors):
        return first, _stack([up for _, up in factors])
    ranks = [down.shape[0] for down, _ in factors]
    padded = [np.pad(up, ((0, 0), (sum(ranks[:i]), sum(ranks[i + 1:])))) for i, (_, up) in enumerate(factors)]
    return _stack([down for down, _ in factors]), _stack(padded)


def _rows(linear: Linear) -> int:
    weight = linear.weight
    return int((weight.packed if isinstance(weight, QuantizedWeight) else weight).shape[0])


def _take_rows(linear: Linear, name: str, rows: Array | slice) -> Linear:
    weight = linear.weight
    taken = (
        replace(weight, packed=weight.packed[rows], scale=weight.scale[rows])
        if isinstance(weight, QuantizedWeight)
        else weight[rows]
    )
    bias = None if linear.bias is None else linear.bias[rows]
    low_rank = None if linear.low_rank is None else (linear.low_rank[0], linear.low_rank[1][rows])
    return replace(linear, name=name, weight=taken, bias=bias, low_rank=low_rank)


def _rope(fields: Fields, max_position_embeddings: int) -> RopeConfig:
    """transformers 5 writes rope_parameters; before it was rope_theta beside rope_scaling."""
    data = fields.data
    parameters = data.get("rope_parameters") or data.get("rope_scaling") or {}
    if not isinstance(parameters, Mapping):
        raise ModelError(f"config.json: rope_parameters must be an object, not {parameters!r}")
    rope = Fields({"rope_theta": data.get("rope_theta"), "rope_type": parameters.get("type", "default"), **parameters},
                  "config.json: rope_parameters")
    rope.only("partial_rotary_factor", (None, 1, 1.0), None)
    rope_type = rope.only("rope_type", ("default", "linear", "llama3"), "default")
    theta = rope.number("rope_theta", 10000.0, low=1.0)
    if rope_type == "default":
        return RopeConfig(theta)
    factor = rope.number("factor", low=1.0, high=1e6)
    if rope_type == "linear":
        return RopeConfig(theta, "linear", factor)
    return RopeConfig(
        theta, "llama3", factor,
        low_freq_factor=rope.number("low_freq_factor", low=1e-6),
        high_freq_factor=rope.number("high_freq_factor", low=1e-6),
        original_max_position_embeddings=rope.integer(
            "original_max_position_embeddings", max_position_embeddings, high=1 << 24),
    )


def _llama(fields: Fields) -> ModelConfig:
    """Llama's fields, which Mistral, Qwen2 and Qwen3 share."""
    fields.only("hidden_act", ("silu",), "silu")
    vocab_size = fields.integer("vocab_size", high=1 << 22)
    hidden_size = fields.integer("hidden_size", high=1 << 16)
    num_heads = fields.integer("num_attention_heads", high=1 << 10)
    num_kv_heads = fields.integer("num_key_value_heads", num_heads, high=1 << 10)
    if num_heads % num_kv_heads:
        raise ModelError(f"config.json: {num_heads} attention heads are not a multiple of {num_kv_heads} KV heads")
    if fields.data.get("head_dim") is None and hidden_size % num_heads:
        raise ModelError(f"config.json: hidden_size {hidden_size} is not a multiple of {num_heads} attention heads")
    head_dim = fields.integer("head_dim", hidden_size // num_heads, low=2, high=MAX_HEAD_DIM)
    if head_dim % 2:
        raise ModelError(f"config.json: head_dim {head_dim} must be even for rotary embedding")
    max_positions = fields.integer("max_position_embeddings", 2048, high=MAX_POSITIONS)
    bos = fields.token_ids("bos_token_id", vocab_size)
    return ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size", high=1 << 19),
        num_layers=fields.integer("num_hidden_layers", high=1 << 10),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=max_positions,
        norm="rms",
        norm_eps=fields.number("rms_norm_eps", 1e-6, high=1.0),
        activation="silu_mul",
        rope=_rope(fields, max_positions),
        tie_word_embeddings=fields.flag("tie_word_embeddings", False),
        bos_token_id=bos[0] if bos else None,
        eos_token_ids=fields.token_ids("eos_token_id", vocab_size),
    )


def _window(fields: Fields) -> int | None:
    """transformers takes 4096 where the field is missing; null is no window."""
    if fields.data.get("sliding_window", 0) is None:
        return None
    return fields.integer("sliding_window", 4096, high=1 << 24)


def _mistral(fields: Fields) -> ModelConfig:
    return replace(_llama(fields), architecture="MistralForCausalLM", sliding_window=_window(fields))


def _qwen2(fields: Fields) -> ModelConfig:
    config = replace(_llama(fields), architecture="Qwen2ForCausalLM")
    if not fields.flag("use_sliding_window", False) or (window := _window(fields)) is None:
        return config
    first = fields.integer("max_window_layers", 28, low=0)
    kinds = ["full_attention" if i < first else "sliding_attention" for i in range(config.num_layers)]
    fields.only("layer_types", (None, kinds), None)
    return replace(config, sliding_window=window, first_sliding_layer=first)


def _qwen3(fields: Fields) -> ModelConfig:
    defaulted = Fields({**fields.data, "head_dim": fields.data.get("head_dim", 128)})
    return replace(_qwen2(defaulted), architecture="Qwen3ForCausalLM")


def _bloom(fields: Fields) -> ModelConfig:
    if fields.flag("apply_residual_connection_post_layernorm", False):
        raise ModelError("config.json: apply_residual_connection_post_layernorm is not supported")
    vocab_size = fields.integer("vocab_size", high=1 << 22)
    hidden_name = next((n for n in ("hidden_size", "n_embed") if fields.data.get(n) is not None), "hidden_size")
    layers_name = "n_layer" if fields.data.get("n_layer") is not None else "num_hidden_layers"
    heads_name = "n_head" if fields.data.get("n_head") is not None else "num_attention_heads"
    hidden_size = fields.integer(hidden_name, high=1 << 16)
    num_heads = fields.integer(heads_name, high=1 << 10)
    if hidden_size % num_heads:
        raise ModelError(f"config.json: {hidden_name} {hidden_size} is not a multiple of {num_heads} attention heads")
    if hidden_size // num_heads > MAX_HEAD_DIM:
        raise ModelError(f"config.json: heads of {hidden_size // num_heads} are larger than {MAX_HEAD_DIM}")
    bos = fields.token_ids("bos_token_id", vocab_size)
    return ModelConfig(
        architecture="BloomForCausalLM",
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_layers=fields.integer(layers_name, high=1 << 10),
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=hidden_size // num_heads,
        max_position_embeddings=fields.integer("seq_length", 2048, high=MAX_POSITIONS),
        norm="layer",
        norm_eps=fields.number("layer_norm_epsilon", 1e-5, high=1.0),
        activation="gelu_tanh",
        alibi=True,
        tie_word_embeddings=fields.flag("tie_word_embeddings", True),
        bos_token_id=bos[0] if bos else None,
        eos_token_ids=fields.token_ids("eos_token_id", vocab_size),
    )


SPECS = (
    ModelSpec("LlamaForCausalLM", _llama),
    ModelSpec("MistralForCausalLM", _mistral),
    ModelSpec("Qwen2ForCausalLM", _qwen2),
    ModelSpec("Qwen3ForCausalLM", _qwen3, q_norm="self_attn.q_norm", k_norm="self_attn.k_norm"),
    ModelSpec(
        "BloomForCausalLM",
        _bloom,
        embedding="transformer.word_embeddings",
        embedding_norm="transformer.word_embeddings_layernorm",
        layers="transformer.h",
        qkv=("self_attention.query_key_value",),
        interleaved_qkv=True,
        o="self_attention.dense",
        up=("mlp.dense_h_to_4h",),
        down="mlp.dense_4h_to_h",
        final_norm="transformer.ln_f",
        bare_prefix="transformer.",
    ),
)


def parse_config(config: Mapping[str, Any]) -> tuple[ModelSpec, ModelConfig]:
    """The spec and the bounded configuration of a config.json. Raises ModelError."""
    names = config.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise ModelError(f"config.json: architectures must name one architecture, not {names!r}")
    for spec in SPECS:
        if spec.architecture == names[0]:
            return spec, spec.parse(Fields(config))
    known = [spec.architecture for spec in SPECS]
    close = difflib.get_close_matches(names[0], known, 1, 0.8)
    meant = f"; did you mean {close[0]}?" if close else ""
    raise ModelError(f"architecture {names[0]!r} is not supported{meant} Supported: {', '.join(known)}")
