"""A checkpoint's tensors, memory-mapped and checked, as the decoder's parameters, one block at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from ml_dtypes import bfloat16, float8_e4m3fn
from safetensors import SafetensorError, safe_open

from fptq_runtime.artifact.scheme import LayerScheme, ModuleSchemes, QuantizationArgs, SchemeError
from fptq_runtime.config import Activations
from fptq_runtime.kernels.base import (
    ActivationQuant,
    Array,
    AttentionSpec,
    Backend,
    Embedding,
    Linear,
    Norm,
    QuantizedWeight,
)
from fptq_runtime.models.decoder import Block, Decoder, Head, Stem, prepare_block, prepare_head, prepare_stem
from fptq_runtime.models.families import fuse, parse_config
from fptq_runtime.models.layers import alibi_slopes, rope_tables

MAX_JSON_BYTES = 64 << 20
DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(bfloat16),
          "F8_E4M3": np.dtype(float8_e4m3fn), "I64": np.dtype(np.int64), "I32": np.dtype(np.int32),
          "U8": np.dtype(np.uint8)}  # by their names in a safetensors header
FLOATS = ("F32", "F16", "BF16")


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged or inconsistent. One line, for the user."""


@dataclass(frozen=True)
class _Stored:
    """Where a tensor lies: dtype as the header names it, offset in bytes from the file's start."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int


class Checkpoint:
    """A model directory: config.json and safetensors, float or compressed-tensors: integers pack-quantized, FP4 as
    nvfp4-pack-quantized without a global scale, FP8 as float-quantized; `low_rank_down` and `low_rank_up` are ours.

    activations: "int8" quantizes, per token, what linears with integer weights read where the checkpoint leaves it in
    float; refused where there are none.
    max_positions: how many the rope tables hold; may be lowered before the first block is loaded.
    """

    def __init__(self, path: Path | str, activations: Activations = "checkpoint") -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise CheckpointError(f"{self.path} is not a directory")
        self.config = read_json(self.path / "config.json")
        self.spec, self.model_config = parse_config(self.config)
        quantization = self.config.get("quantization_config")
        self.schemes = None if quantization is None else _schemes(quantization)
        self.max_positions = self.model_config.max_position_embeddings
        self._tensors = self._open()
        self.activations: Activations = "checkpoint"
        stored = self.linear_schemes
        self.activations = activations
        if activations == "int8" and self.linear_schemes == stored:
            raise CheckpointError(f"{self.path} has no layer with integer weights and float activations: activations "
                                  "int8 would change nothing; leave it out")

    @property
    def quantized(self) -> bool:
        return self.schemes is not None

    @property
    def num_parameters(self) -> int:
        """As stored: tied ones once, packed ones by their words."""
        return sum(math.prod(stored.shape) for stored in self._tensors.values())

    @property
    def linear_schemes(self) -> dict[str, LayerScheme]:
        """How each linear that is not in float will run, by its name in the file."""
        names = self.spec.linear_names(self.model_config)[: -1 if self.tied else None]
        schemes = {name: self._scheme(name) for name in names}
        return {name: scheme for name, scheme in schemes.items() if scheme is not None}

    @property
    def tied(self) -> bool:
        """The head is the embedding."""
        head = self.spec.lm_head
        stored = self.has(f"{head}.weight") or self.has(f"{head}.weight_packed")
        return self.model_config.tie_word_embeddings or not stored

    def _scheme(self, name: str) -> LayerScheme | None:
        scheme = None if self.schemes is None else self.schemes.scheme(name)
        if self.activations == "int8" and scheme is not None and scheme.input_activations is None \
                and scheme.weights.type == "int":
            return replace(scheme, input_activations=QuantizationArgs(num_bits=8, strategy="token", dynamic=True))
        return scheme

    def _open(self) -> dict[str, _Stored]:
        index = self.path / "model.safetensors.index.json"
        single = self.path / "model.safetensors"
        if index.is_file():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, Mapping) or not weight_map:
                raise CheckpointError(f"{index.name} has no weight_map")
            shards = {str(shard) for shard in weight_map.values()}
            if any(Path(shard).name != shard or not shard.endswith(".safetensors") for shard in shards):
                raise CheckpointError(f"{index.name} names a shard that is not a .safetensors file beside it")
        elif single.is_file():
            shards = {single.name}
        else:
            pickled = [p.name for p in self.path.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".ckpt")]
            if pickled:
                raise CheckpointError(f"{self.path} has only pickled weights ({pickled[0]}), which can run code when "
                                      "loaded; convert the model to safetensors first")
            raise CheckpointError(f"{self.path} has no model.safetensors")
        tensors: dict[str, _Stored] = {}
        for shard in sorted(shards):
            try:
                tensors |= _read_header(self.path / shard)
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{self.path / shard} is not a readable safetensors file: {error}") from None
        return tensors

    def has(self, name: str) -> bool:
        return self._find(name) is not None

    def _find(self, name: str) -> str | None:
        """The stored name: some checkpoints leave out the family's prefix."""
        bare = name.removeprefix(self.spec.bare_prefix)
        return next((candidate for candidate in (name, bare) if candidate in self._tensors), None)

    def tensor(self, name: str, shape: tuple[int, ...], dtypes: tuple[str, ...] = FLOATS) -> Array:
        """A tensor with a memory mapping of its own, so that a process holds what it touches of those it keeps and
        nothing of those it dropped. Raises CheckpointError unless shape and dtype are right."""
        found = self._find(name)
        if found is None:
            raise CheckpointError(f"{self.path} has no tensor {name!r}")
        stored = self._tensors[found]
        if stored.shape != shape:
            raise CheckpointError(f"{name} has shape {list(stored.shape)}, but config.json asks for {list(shape)}")
        if stored.dtype not in dtypes:
            raise CheckpointError(f"{name} is {_dtype(stored.dtype)}, not {' or '.join(map(_dtype, dtypes))}")
        try:  # mode "c": private, since torch wants arrays that could be written
            return np.memmap(stored.file, DTYPES[stored.dtype], "c", stored.offset, shape).view(np.ndarray)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{name} cannot be read: {error}") from None

    def linear(self, name: str, n: int, k: int) -> Linear:
        """The linear layer `name`, [n, k], in float or quantized as the config says."""
        bias = self.tensor(f"{name}.bias", (n,)) if self.has(f"{name}.bias") else None
        scheme = self._scheme(name)
        low_rank = self._low_rank(name, n, k)
        if scheme is None:
            return Linear(name, self.tensor(f"{name}.weight", (n, k)), bias, None, low_rank)
        return Linear(name, self._quantized_weight(name, n, k, scheme), bias, self._activation(name, scheme), low_rank)

    def _low_rank(self, name: str, n: int, k: int) -> tuple[Array, Array] | None:
        down, up = f"{name}.low_rank_down", f"{name}.low_rank_up"
        if (found := self._find(down)) is None and not self.has(up):
            return None
        rank = 0 if found is None else sum(self._tensors[found].shape[:1])
        return self.tensor(down, (rank, k)), self.tensor(up, (n, rank))

    def _quantized_weight(self, name: str, n: int, k: int, scheme: LayerScheme) -> QuantizedWeight:
        bits = scheme.weights.num_bits
        group = scheme.weights.group_size or k
        if k % group:
            raise CheckpointError(f"{name}: {k} input features are not a multiple of the group size {group}")
        if self.has(f"{name}.weight_g_idx"):
            raise CheckpointError(f"{name} has weight_g_idx: act-order without static groups is not supported")
        if scheme.weights.type == "float":
            packed = (self.tensor(f"{name}.weight_packed", (n, math.ceil(k / 2)), ("U8",)) if bits == 4 else
                      self.tensor(f"{name}.weight", (n, k), ("F8_E4M3",)))
        else:
            shape = self.tensor(f"{name}.weight_shape", (2,), ("I64", "I32"))
            if shape.tolist() != [n, k]:
                raise CheckpointError(f"{name}.weight_shape is {shape.tolist()}, but config.json asks for {[n, k]}")
            packed = self.tensor(f"{name}.weight_packed", (n, math.ceil(k * bits / 32)), ("I32",))
        scale = self.tensor(f"{name}.weight_scale", (n, k // group))
        if not np.isfinite(scale).all():
            raise CheckpointError(f"{name}.weight_scale holds values that are not finite")
        return QuantizedWeight(packed, scale, 4 if bits == 4 else 8, group, scheme.weights.type)

    def _activation(self, name: str, scheme: LayerScheme) -> ActivationQuant | None:
        if scheme.input_activations is None:
            return None
        number = scheme.input_activations.type
        if scheme.input_activations.dynamic:
            return ActivationQuant(None, number)
        scale = float(self.tensor(f"{name}.input_scale", (1,))[0])
        if not (math.isfinite(scale) and scale > 0):
            raise CheckpointError(f"{name}.input_scale must be finite and positive, not {scale}")
        return ActivationQuant(scale, number)

    def norm(self, name: str, size: int) -> Norm:
        config = self.model_config
        bias = self.tensor(f"{name}.bias", (size,)) if config.norm == "layer" else None
        return Norm(config.norm, self.tensor(f"{name}.weight", (size,)), bias, config.norm_eps)

    @cached_property
    def rope(self) -> tuple[Array, Array] | None:
        """Shared by all layers."""
        config = self.model_config
        if config.rope is None:
            return None
        return rope_tables(config.rope, config.head_dim, self.max_positions)


def load_stem(checkpoint: Checkpoint) -> Stem:
    spec, config = checkpoint.spec, checkpoint.model_config
    embedding = Embedding(checkpoint.tensor(f"{spec.embedding}.weight", (config.vocab_size, config.hidden_size)))
    if spec.embedding_norm is None:
        return Stem(embedding)
    return Stem(embedding, checkpoint.norm(spec.embedding_norm, config.hidden_size))


def load_block(checkpoint: Checkpoint, index: int) -> Block:
    spec, config = checkpoint.spec, checkpoint.model_config
    hidden, heads = config.hidden_size, config.num_heads * config.head_dim

    def stacked(name: str, modules: tuple[str, ...], sizes: tuple[int, ...], order: Array | None) -> Linear:
        parts = [checkpoint.linear(spec.layer(index, m), n, hidden) for m, n in zip(modules, sizes, strict=True)]
        return fuse(name, parts, order)

    def head_norm(name: str | None) -> Norm | None:
        return None if name is None else checkpoint.norm(spec.layer(index, name), config.head_dim)

    attention = AttentionSpec(
        layer=index,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        softmax_scale=config.head_dim**-0.5,
        sliding_window=config.sliding_window if index >= config.first_sliding_layer else None,
        rope=checkpoint.rope,
        alibi_slopes=alibi_slopes(config.num_heads) if config.alibi else None,
        q_norm=head_norm(spec.q_norm),
        k_norm=head_norm(spec.k_norm),
    )
    return Block(
        input_norm=checkpoint.norm(spec.layer(index, spec.input_norm), hidden),
        qkv=stacked(f"layers.{index}.qkv", spec.qkv, spec.qkv_sizes(config), spec.qkv_order(config)),
        attention=attention,
        o=_renamed(checkpoint.linear(spec.layer(index, spec.o), hidden, heads), f"layers.{index}.o"),
        mlp_norm=checkpoint.norm(spec.layer(index, spec.mlp_norm), hidden),
        up=stacked(f"layers.{index}.up", spec.up, spec.up_sizes(config), None),
        down=_renamed(checkpoint.linear(spec.layer(index, spec.down), hidden, config.intermediate_size),
                      f"layers.{index}.down"),
    )


def load_head(checkpoint: Checkpoint) -> Head:
    spec, config = checkpoint.spec, checkpoint.model_config
    lm_head = (
        Linear(spec.lm_head, checkpoint.tensor(f"{spec.embedding}.weight", (config.vocab_size, config.hidden_size)))
        if checkpoint.tied
        else checkpoint.linear(spec.lm_head, config.vocab_size, config.hidden_size)
    )
    return Head(checkpoint.norm(spec.final_norm, config.hidden_size), lm_head)


def load_model(checkpoint: Checkpoint, backend: Backend) -> Decoder:
    """Give every parameter to the backend, block by block, so that little more than its packed form is ever held."""
    stem, head = load_stem(checkpoint), load_head(checkpoint)
    blocks = [
        prepare_block(load_block(checkpoint, index), backend)
        for index in range(checkpoint.model_config.num_layers)
    ]
    return Decoder(
        checkpoint.model_config,
        prepare_stem(stem, backend),
        blocks,
        prepare_head(head, backend),
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a model directory. Raises CheckpointError."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path} is larger than {MAX_JSON_BYTES >> 20} MiB")
        data = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} has no {path.name}") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return data


def eos_token_ids(checkpoint: Checkpoint) -> tuple[int, ...]:
    """End-of-sequence ids: generation_config.json's where it names some, else config.json's."""
    with suppress(CheckpointError):
        value = read_json(checkpoint.path / "generation_config.json").get("eos_token_id")
        ids = value if isinstance(value, list) else [value]
        if all(isinstance(i, int) and 0 <= i < checkpoint.model_config.vocab_size for i in ids):
            return tuple(ids)
    return checkpoint.model_config.eos_token_ids


def _schemes(quantization: Any) -> ModuleSchemes:
    if not isinstance(quantization, Mapping):
        raise SchemeError("config.json: quantization_config must be an object")
    return ModuleSchemes(quantization)


def _renamed(linear: Linear, name: str) -> Linear:
    return replace(linear, name=name)


def _read_header(file: Path) -> dict[str, _Stored]:
    """Every tensor of a safetensors file, once the library found its header sound: sizes and offsets within the file
    that agree. Raises SafetensorError or OSError."""
    with safe_open(file, framework="numpy"):
        pass
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
    header.pop("__metadata__", None)
    return {name: _Stored(file, entry["dtype"], tuple(entry["shape"]), 8 + size + entry["data_offsets"][0])
            for name, entry in header.items()}


def _dtype(name: str) -> str:
    return DTYPES[name].name if name in DTYPES else name
