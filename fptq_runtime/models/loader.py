"""A checkpoint's tensors, memory-mapped and checked, as the decoder's parameters, one block at a time."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np

from fptq_runtime.artifact.files import is_there
from fptq_runtime.artifact.scheme import LayerScheme, QuantizationArgs
from fptq_runtime.config import Activations, ModelConfig
from fptq_runtime.kernels.base import (
    ActivationQuant,
    Array,
    AttentionSpec,
    Backend,
    Embedding,
    Linear,
    Norm,
    QuantizedWeight,
    Recurrent,
    Routing,
)
from fptq_runtime.models.block import (
    Block,
    BlockSpec,
    LinearSpec,
    NormSpec,
    RecurrentSpec,
    Stacked,
    Stem,
    prepare_block,
    prepare_stem,
)
from fptq_runtime.models.decoder import Decoder
from fptq_runtime.models.families import parse_config
from fptq_runtime.models.formats import WeightFormat, open_format
from fptq_runtime.models.formats.floats import widen_mxfp4
from fptq_runtime.models.gguf import GgufIntegers, GgufTensors, gguf_file
from fptq_runtime.models.layers import alibi_slopes
from fptq_runtime.models.readout import READOUT, Bases, read_bases
from fptq_runtime.models.rope import RopeConfig, rope_tables
from fptq_runtime.models.tensors import FLOATS, CheckpointError, Tensors, read_json, weight_files
from fptq_runtime.models.towers import decoder_config, text_names
from fptq_runtime.models.weights import fuse, multiplied

__all__ = [
    "Checkpoint", "CheckpointError", "load_block", "load_head", "load_model", "load_stem", "read_json",
]

logger = logging.getLogger(__name__)

LOG_SECONDS = 5.0


class Checkpoint:
    """A model directory: config.json and safetensors, in float or in one of the quantized formats of `formats`.

    notes: how many linears could not be kept as they were stored, by reason.
    activations: "int8" quantizes, per token, what linears with integer weights read where the checkpoint leaves it in
    float; refused where there are none.
    max_positions: how many the rope tables hold, which is also what "dynamic" and "longrope" choose their frequencies
    by; may be lowered before the first block is loaded.
    dequantize: FP8 and FP4 weights are read as floats, also where kernels would take their codes.
    config: of the decoder alone, where the checkpoint carries more.
    """

    def __init__(self, path: Path | str, activations: Activations = "checkpoint", dequantize: bool = False) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise CheckpointError(f"{self.path} is not a directory")
        self.config, tower = decoder_config(read_json(self.path / "config.json"))
        self.model = parse_config(self.config)
        self.max_positions = self.model.config.max_position_embeddings
        self.notes: Counter[str] = Counter()
        self._tensors, self._format = self._open(tower, dequantize)
        if self._format is not None and self._format.dequantizes:
            self.config = {name: value for name, value in self.config.items() if name != "quantization_config"}
        self._ropes: dict[tuple[RopeConfig, int], tuple[Array, Array]] = {}
        self.activations: Activations = "checkpoint"
        if activations == "int8":
            stored = self.linear_schemes
            self.activations = activations
            if self.linear_schemes == stored:
                raise CheckpointError(f"{self.path} has no layer with integer weights and float activations: "
                                      "activations int8 would change nothing; leave it out")

    def _open(self, tower: bool, dequantize: bool) -> tuple[Tensors, WeightFormat | None]:
        file = gguf_file(self.path)
        if file is None:
            tensors = Tensors(self.path, self.model.bare_prefix, text_names if tower else None)
            return tensors, open_format(self.config, self.path, tensors, dequantize)
        inside = GgufTensors(file)
        return inside, None if dequantize else GgufIntegers(inside, self.model.linear_names())

    @property
    def model_config(self) -> ModelConfig:
        """With what the ropes choose by `max_positions`."""
        ropes = dict.fromkeys(rope.describe(self.max_positions) for rope in self.model.ropes)
        return replace(self.model.config, rope="; ".join(ropes) or "none")

    @property
    def quantized(self) -> bool:
        return self._format is not None and not self._format.dequantizes

    @property
    def num_parameters(self) -> int:
        """As stored: tied ones once, packed ones by their words."""
        return self._tensors.num_elements

    @property
    def linear_schemes(self) -> dict[str, LayerScheme]:
        """How each linear that is not in float will run, by its name in the file."""
        names = self.model.linear_names()[: -1 if self.tied else None]
        schemes = {name: self._scheme(name) for name in names}
        return {name: scheme for name, scheme in schemes.items() if scheme is not None}

    @cached_property
    def tied(self) -> bool:
        """The head is the embedding. As transformers decides: where config.json ties them but the checkpoint has both
        and they differ, the head is its own."""
        head = self.model.head_module
        if self._format is not None and self._format.has(head):
            return False
        if not self.has(f"{head}.weight"):
            if not self.model_config.tie_word_embeddings:
                logger.warning("%s: config.json says that the head is not the embedding, but there is no %s.weight; "
                               "the embedding is taken for it", self.path.name, head)
            return True
        if not self.model_config.tie_word_embeddings:
            return False
        if not self.has(f"{self.model.stem.embedding}.weight"):
            return True
        shape = self._embedding_shape
        if np.array_equal(self.tensor(f"{head}.weight", shape).view(np.uint8),
                          self.tensor(f"{self.model.stem.embedding}.weight", shape).view(np.uint8)):
            return True
        logger.warning("%s: config.json ties the head to the embedding, but %s.weight is another matrix; both are used "
                       "as they are stored", self.path.name, head)
        return False

    @cached_property
    def bases(self) -> Bases:
        """What a recipe made of the rows that linears read. Raises CheckpointError."""
        file = self.path / READOUT
        return read_bases(file, self.model) if is_there(file) else {}

    @property
    def _embedding_shape(self) -> tuple[int, int]:
        return self.model_config.vocab_size, self.model_config.hidden_size

    def _scheme(self, name: str) -> LayerScheme | None:
        scheme = None if self._format is None else self._format.scheme(name)
        if self.activations == "int8" and scheme is not None and scheme.input_activations is None \
                and scheme.weights.type == "int":
            return replace(scheme, input_activations=QuantizationArgs(num_bits=8, strategy="token", dynamic=True))
        return scheme

    def has(self, name: str) -> bool:
        return self._tensors.shape(name) is not None

    def tensor(self, name: str, shape: tuple[int, ...], dtypes: tuple[str, ...] = FLOATS) -> Array:
        """Memory-mapped. Raises CheckpointError unless shape and dtype are right."""
        return self._tensors.get(name, shape, dtypes)

    def embedding(self) -> Embedding:
        """The head's matrix where a tied checkpoint holds that alone."""
        name = f"{self.model.stem.embedding}.weight"
        if not self.has(name) and self.tied and self.has(f"{self.model.head_module}.weight"):
            name = f"{self.model.head_module}.weight"
        return Embedding(self.tensor(name, self._embedding_shape))

    def linear(self, name: str, n: int, k: int, bias: bool, transposed: bool = False) -> Linear:
        """The linear layer `name`, [n, k], in float or quantized as the config says. transposed: a float weight is
        stored as [k, n]."""
        biases = self.tensor(f"{name}.bias", (n,)) if bias else None
        scheme = self._scheme(name)
        low_rank = self._low_rank(name, n, k)
        if scheme is None and self._format is not None and self._format.dequantizes and self._format.has(name):
            return Linear(name, self._format.read(name, n, k, self.notes), biases, None, low_rank)
        if scheme is None:
            weight = self.tensor(f"{name}.weight", (k, n)).T if transposed else self.tensor(f"{name}.weight", (n, k))
            return Linear(name, weight, biases, None, low_rank)
        assert self._format is not None
        weight = self._format.read(name, n, k, self.notes)
        if not isinstance(weight, QuantizedWeight):
            scheme = self._format.scheme(name) or scheme  # in float after all, so `activations` does not apply
        return Linear(name, weight, biases, self._activation(name, scheme), low_rank)

    def has_stacked(self, tensor: str) -> bool:
        return self.has(tensor) or self.has(f"{tensor}_blocks")

    def stacked(self, name: str, tensor: str, linear: LinearSpec, stacked: Stacked) -> Linear:
        """All experts of a linear, from one float tensor, or the MXFP4 blocks of one."""
        experts, rows, k = linear.experts, linear.n // linear.experts, linear.k
        if self.has(tensor):
            shape = (experts, k, rows) if stacked.transposed else (experts, rows, k)
            weight = self.tensor(tensor, shape)
            weight = weight.swapaxes(1, 2) if stacked.transposed else weight
        else:
            weight = widen_mxfp4(self.tensor(f"{tensor}_blocks", (experts, rows, k // 32, 16), ("U8",)),
                                 self.tensor(f"{tensor}_scales", (experts, rows, k // 32), ("U8",)))
        bias = self.tensor(f"{tensor}_bias", (experts, rows)) if linear.bias else None
        if stacked.interleaved:
            modules = len(linear.modules) // experts
            weight = weight.reshape(experts, -1, modules, k).swapaxes(1, 2)
            bias = None if bias is None else bias.reshape(experts, -1, modules).swapaxes(1, 2).reshape(-1)
        return Linear(name, np.ascontiguousarray(weight.reshape(-1, k)), None if bias is None else bias.reshape(-1),
                      experts=experts)

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

    def norm(self, spec: NormSpec, prefix: str = "") -> Norm:
        def parameter(suffix: str) -> Array:
            shape = spec.shape if len(spec.modules) == 1 else spec.shape[1:]
            parts = [self.tensor(f"{prefix}{module}.{suffix}", shape) for module in spec.modules]
            whole = parts[0] if len(parts) == 1 else np.stack(parts)
            return whole if spec.order is None else whole[..., spec.order]

        weight = parameter("weight") if spec.scaled else np.ones(spec.shape, np.float32)
        if spec.offset:
            weight = weight.astype(np.float32) + np.float32(spec.offset)
        return Norm(spec.kind, weight, parameter("bias") if spec.bias else None, spec.eps)

    def rope(self, config: RopeConfig | None) -> tuple[Array, Array] | None:
        """Tables that layers with the same rope share."""
        if config is None:
            return None
        key = config, self.max_positions
        if key not in self._ropes:
            self._ropes[key] = rope_tables(*key)
        return self._ropes[key]


def load_stem(checkpoint: Checkpoint) -> Stem:
    spec, config = checkpoint.model.stem, checkpoint.model_config
    positions = None
    if spec.positions is not None:
        rows = config.max_position_embeddings + spec.position_offset
        table = checkpoint.tensor(f"{spec.positions}.weight", (rows, config.hidden_size))
        positions = Embedding(table[spec.position_offset :])
    return Stem(spec, checkpoint.embedding(), positions, None if spec.norm is None else checkpoint.norm(spec.norm))


def load_block(checkpoint: Checkpoint, index: int) -> Block:
    spec = checkpoint.model.blocks[index]
    return Block(
        spec,
        {linear.name: _load_linear(checkpoint, spec, linear) for linear in spec.linears},
        {norm.name: checkpoint.norm(norm, spec.prefix) for norm in spec.norms},
        _load_attention(checkpoint, spec, sum(each.attention is not None for each in checkpoint.model.blocks[:index])),
        last=index == len(checkpoint.model.blocks) - 1,
        routing=_load_routing(checkpoint, spec),
        recurrent=tuple(_load_recurrent(checkpoint, spec, op) for op in spec.recurrent),
    )


def load_head(checkpoint: Checkpoint) -> Block:
    spec = checkpoint.model.head
    linear = spec.linears[0]
    if checkpoint.tied:
        head = Linear(spec.full_name(linear.name), checkpoint.embedding().weight)
        if linear.bias:
            head.bias = checkpoint.tensor(f"{checkpoint.model.head_module}.bias", (linear.n,))
    else:
        head = _load_linear(checkpoint, spec, linear)
    if linear.normalised:
        if isinstance(head.weight, QuantizedWeight):
            raise CheckpointError(f"{head.name}: normalize_head divides each row by its length, and these rows are "
                                  "quantized already; quantize the float model")
        weight = head.weight.astype(np.float32)
        head.weight = weight / np.maximum(np.linalg.norm(weight, axis=1, keepdims=True), np.float32(1e-12))
    return Block(spec, {linear.name: head}, {norm.name: checkpoint.norm(norm, spec.prefix) for norm in spec.norms},
                 bases={name: basis for (part, name), basis in checkpoint.bases.items() if part == spec.name})


def has_hidden_states(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint that may have been rotated says what it was before: gains that are all 1 went elsewhere."""
    head = checkpoint.model.head
    return (head.name, "head") in checkpoint.bases or not np.all(checkpoint.norm(head.norms[0]).weight == 1)


def _load_linear(checkpoint: Checkpoint, spec: BlockSpec, linear: LinearSpec) -> Linear:
    if linear.stacked is not None and checkpoint.has_stacked(tensor := spec.prefix + linear.stacked.tensor):
        return checkpoint.stacked(spec.full_name(linear.name), tensor, linear, linear.stacked)
    parts = [checkpoint.linear(module, n, linear.k, linear.bias, linear.transposed)
             for module, n in zip(spec.modules(linear.name), linear.sizes, strict=True)]
    fused = fuse(spec.full_name(linear.name), parts, linear.order, linear.experts)
    return fused if linear.multiplier is None else multiplied(fused, linear.multiplier)


def _load_attention(checkpoint: Checkpoint, spec: BlockSpec, layer: int) -> AttentionSpec | None:
    """layer: of the cache."""
    attention = spec.attention
    if attention is None:
        return None

    def norm(own: NormSpec | None) -> Norm | None:
        return None if own is None else checkpoint.norm(own, spec.prefix)

    return AttentionSpec(
        layer=layer,
        num_heads=attention.num_heads,
        num_kv_heads=attention.num_kv_heads,
        head_dim=attention.head_dim,
        softmax_scale=attention.softmax_scale,
        sliding_window=attention.sliding_window,
        rope=checkpoint.rope(attention.rope),
        alibi_slopes=alibi_slopes(attention.num_heads) if attention.alibi else None,
        q_norm=norm(attention.q_norm),
        k_norm=norm(attention.k_norm),
        norm_after_rope=attention.norm_after_rope,
        softcap=attention.softcap,
        sinks=None if attention.sinks is None else checkpoint.tensor(spec.prefix + attention.sinks,
                                                                     (attention.num_heads,)),
    )


def _load_routing(checkpoint: Checkpoint, spec: BlockSpec) -> Routing | None:
    if spec.routing is None or spec.routing_bias is None:
        return spec.routing
    bias = checkpoint.tensor(spec.prefix + spec.routing_bias, (spec.routing.num_experts,))
    return replace(spec.routing, bias=bias.astype(np.float32))


def _load_recurrent(checkpoint: Checkpoint, spec: BlockSpec, op: RecurrentSpec) -> Recurrent:
    arrays = {field: checkpoint.tensor(spec.prefix + tensor, shape).astype(np.float32)
              for field, (tensor, shape) in op.arrays.items()}
    return replace(op.kernel, name=f"{spec.name}.{op.kernel.name}",
                   **{field: array.reshape(len(array), -1) if array.ndim > 1 else array
                      for field, array in arrays.items()})


def load_model(checkpoint: Checkpoint, backend: Backend) -> Decoder:
    """Give every parameter to the backend, block by block, so that little more than its packed form is ever held. How
    far it is goes into the log every few seconds."""
    stem, head = load_stem(checkpoint), load_head(checkpoint)
    blocks, said = [], time.monotonic()
    for index in range(count := len(checkpoint.model.blocks)):
        blocks.append(prepare_block(load_block(checkpoint, index), backend))
        if (now := time.monotonic()) - said >= LOG_SECONDS:
            files = [checkpoint.path] if checkpoint.path.is_file() else weight_files(checkpoint.path)
            size = sum(file.stat().st_size for file in files) / 1e9
            logger.info("loading %s: %.1f of %.1f GB", checkpoint.path.name, size * (index + 1) / count, size)
            said = now
    for note, count in checkpoint.notes.items():
        logger.warning("%s: %d linear layers have %s", checkpoint.path.name, count, note)
    return Decoder(checkpoint.model_config, prepare_stem(stem, backend), blocks, prepare_block(head, backend))
