"""A checkpoint's tensors, memory-mapped and checked, as the decoder's parameters, one block at a time."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fptq_runtime.artifact.scheme import (
    LayerScheme,
    ModuleSchemes,
    QuantizationArgs,
    SchemeError,
    UniformScheme,
    parse_quantization,
)
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
from fptq_runtime.models.formats import read_weight
from fptq_runtime.models.layers import alibi_slopes, rope_tables
from fptq_runtime.models.tensors import FLOATS, CheckpointError, Tensors, read_json

__all__ = ["Checkpoint", "CheckpointError", "load_block", "load_head", "load_model", "load_stem", "read_json"]

logger = logging.getLogger(__name__)


class Checkpoint:
    """A model directory: config.json and safetensors, in float or quantized: GPTQ, AWQ (gemm), and compressed-tensors:
    integers pack-quantized or int-quantized, FP4 as nvfp4-pack-quantized without a global scale, FP8 as
    float-quantized; `low_rank_down` and `low_rank_up` are ours.

    notes: how many linears `formats` could not keep as they were stored, by reason.
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
        self.schemes = _quantization(self.config, self.path)
        self.max_positions = self.model_config.max_position_embeddings
        self.notes: Counter[str] = Counter()
        self._tensors = Tensors(self.path, self.spec.bare_prefix)
        self.activations: Activations = "checkpoint"
        if activations == "int8":
            stored = self.linear_schemes
            self.activations = activations
            if self.linear_schemes == stored:
                raise CheckpointError(f"{self.path} has no layer with integer weights and float activations: "
                                      "activations int8 would change nothing; leave it out")

    @property
    def quantized(self) -> bool:
        return self.schemes is not None

    @property
    def num_parameters(self) -> int:
        """As stored: tied ones once, packed ones by their words."""
        return self._tensors.num_elements

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
        stored = any(self.has(f"{head}.{part}") for part in ("weight", "weight_packed", "qweight"))
        return self.model_config.tie_word_embeddings or not stored

    def _scheme(self, name: str) -> LayerScheme | None:
        scheme = None if self.schemes is None else self.schemes.scheme(name)
        if isinstance(self.schemes, UniformScheme) and not self.has(f"{name}.qweight"):
            return None
        if self.activations == "int8" and scheme is not None and scheme.input_activations is None \
                and scheme.weights.type == "int":
            return replace(scheme, input_activations=QuantizationArgs(num_bits=8, strategy="token", dynamic=True))
        return scheme

    def has(self, name: str) -> bool:
        return self._tensors.shape(name) is not None

    def tensor(self, name: str, shape: tuple[int, ...], dtypes: tuple[str, ...] = FLOATS) -> Array:
        """Memory-mapped. Raises CheckpointError unless shape and dtype are right."""
        return self._tensors.get(name, shape, dtypes)

    def linear(self, name: str, n: int, k: int) -> Linear:
        """The linear layer `name`, [n, k], in float or quantized as the config says."""
        bias = self.tensor(f"{name}.bias", (n,)) if self.has(f"{name}.bias") else None
        scheme = self._scheme(name)
        low_rank = self._low_rank(name, n, k)
        if scheme is None:
            return Linear(name, self.tensor(f"{name}.weight", (n, k)), bias, None, low_rank)
        weight = read_weight(self._tensors, name, n, k, scheme, self.notes)
        if not isinstance(weight, QuantizedWeight) and self.schemes is not None:
            scheme = self.schemes.scheme(name) or scheme  # in float after all, so `activations` does not apply
        return Linear(name, weight, bias, self._activation(name, scheme), low_rank)

    def _low_rank(self, name: str, n: int, k: int) -> tuple[Array, Array] | None:
        down, up = f"{name}.low_rank_down", f"{name}.low_rank_up"
        shape = self._tensors.shape(down)
        if shape is None and not self.has(up):
            return None
        rank = shape[0] if shape else 0
        return self.tensor(down, (rank, k)), self.tensor(up, (n, rank))

    def _activation(self, name: str, scheme: LayerScheme) -> ActivationQuant | None:
        if scheme.input_activations is None:
            return None
        number = scheme.input_activations.type
        if scheme.input_activations.dynamic:
            return ActivationQuant(None, number)
        if self.has(point := f"{name}.input_zero_point") and \
                np.any(self.tensor(point, self._tensors.shape(point) or (), ("I8", "I32", "I64"))):
            raise CheckpointError(f"{point} is not zero: asymmetric activations are not supported")
        scalar = f"{name}.input_scale"
        scale = float(self.tensor(scalar, () if self._tensors.shape(scalar) == () else (1,)).item())
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
    for note, count in checkpoint.notes.items():
        logger.warning("%s: %d linear layers have %s", checkpoint.path.name, count, note)
    return Decoder(
        checkpoint.model_config,
        prepare_stem(stem, backend),
        blocks,
        prepare_head(head, backend),
    )


def _quantization(config: Mapping[str, Any], path: Path) -> ModuleSchemes | UniformScheme | None:
    """Of config.json, or of the file beside it in which AutoGPTQ and AutoAWQ kept it."""
    quantization = config.get("quantization_config")
    if quantization is None:
        beside = next((file for name in ("quantize_config.json", "quant_config.json")
                       if (file := path / name).is_file()), None)
        return None if beside is None else parse_quantization(read_json(beside))
    if not isinstance(quantization, Mapping):
        raise SchemeError("config.json: quantization_config must be an object")
    return parse_quantization(quantization)


def _renamed(linear: Linear, name: str) -> Linear:
    return replace(linear, name=name)
