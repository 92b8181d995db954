"""GGUF, llama.cpp's file: its tensors under the names that transformers gives them, its metadata as a config.json.

Q4_0 and Q8_0 run as the integers that they are, a scale for 32; other types are read as the floats that they stand for.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fptq_runtime.artifact.scheme import LayerScheme, QuantizationArgs
from fptq_runtime.kernels.base import Array, QuantizedWeight
from fptq_runtime.models.fields import MAX_LAYERS, Fields, ModelError
from fptq_runtime.models.layers import halves
from fptq_runtime.models.tensors import FLOATS, CheckpointError, Tensors
from fptq_runtime.models.weights import Stored, pack, runnable

logger = logging.getLogger(__name__)

GROUP = 32
INTEGERS: Mapping[str, Literal[4, 8]] = {"Q4_0": 4, "Q8_0": 8}
TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL",
         "IQ4_XS", "MXFP4")


@dataclass(frozen=True)
class Form:
    """How llama.cpp keeps a family. turned: rope's pairs stand side by side in the rows of q and k. offset: what its
    norms hold more than the checkpoint's. keys: metadata that this family has, by the name in its config.json. fields:
    what its config.json says and the metadata does not."""

    architecture: str
    model_type: str
    turned: bool = False
    offset: float = 0.0
    keys: Mapping[str, str] = field(default_factory=dict)
    fields: Mapping[str, Any] = field(default_factory=dict)


RMS = {"rms_norm_eps": "attention.layer_norm_rms_epsilon"}
WINDOW = {"sliding_window": "attention.sliding_window"}
CAPS = {"final_logit_softcapping": "final_logit_softcapping", "attn_logit_softcapping": "attn_logit_softcapping"}
MULTIPLIERS = {"embedding_multiplier": "embedding_scale", "residual_multiplier": "residual_scale",
               "attention_multiplier": "attention.scale", "logits_scaling": "logit_scale"}
FORMS: Mapping[str, Form] = {
    "llama": Form("LlamaForCausalLM", "llama", turned=True, keys=RMS),
    "qwen2": Form("Qwen2ForCausalLM", "qwen2", keys=RMS),
    "qwen3": Form("Qwen3ForCausalLM", "qwen3", keys=RMS),
    "gemma": Form("GemmaForCausalLM", "gemma", offset=1.0, keys=RMS),
    "gemma2": Form("Gemma2ForCausalLM", "gemma2", offset=1.0, keys=RMS | WINDOW | CAPS),
    "gemma3": Form("Gemma3ForCausalLM", "gemma3_text", offset=1.0, keys=RMS | WINDOW),
    "olmo2": Form("Olmo2ForCausalLM", "olmo2", keys=RMS),
    "granite": Form("GraniteForCausalLM", "granite", turned=True, keys=RMS | MULTIPLIERS),
    "smollm3": Form("SmolLM3ForCausalLM", "smollm3", turned=True, keys=RMS),
    "starcoder2": Form("Starcoder2ForCausalLM", "starcoder2", keys={"norm_epsilon": "attention.layer_norm_epsilon"}),
}  # by general.architecture
SIZES = {"hidden_size": "embedding_length", "num_hidden_layers": "block_count",
         "intermediate_size": "feed_forward_length", "num_attention_heads": "attention.head_count",
         "num_key_value_heads": "attention.head_count_kv", "head_dim": "attention.key_length",
         "max_position_embeddings": "context_length"}
READ = ("vocab_size", "attention.value_length", "rope.dimension_count", "rope.freq_base", "rope.scaling.type",
        "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.finetuned", "tensor_data_layout")
HARMLESS: Mapping[str, Any] = {"attention.causal": True, "expert_count": 0, "expert_used_count": 0,
                               "rope.scaling.attn_factor": 1.0}  # at these values
UNSCALED = {"gemma2": 46, "gemma3": 62}  # the blocks of the 27B ones, whose scores are scaled by hidden size over heads


def gguf_file(path: Path) -> Path | None:
    """The GGUF that a model directory's weights are in, where it has no safetensors."""
    return None if any(path.glob("*.safetensors")) else next(iter(sorted(path.glob("*.gguf"))), None)


class GgufTensors(Tensors):
    """The tensors of one file by transformers' names, dequantized as they are asked for. Raises CheckpointError."""

    def __init__(self, file: Path) -> None:
        from gguf import MODEL_ARCH_NAMES, GGUFReader, get_tensor_name_map

        self._path = file
        try:
            reader = GGUFReader(file)
            self.metadata = dict(reader.fields)
            self._raw = {str(tensor.name): tensor for tensor in reader.tensors}
        except Exception as error:  # whatever bytes that are no GGUF lead to
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise CheckpointError(f"{file} is not a readable GGUF file: {reason}") from None
        self.kind = str(self.meta("general.architecture"))
        if self.kind not in FORMS:
            raise ModelError(f"{file.name}: architecture {self.kind!r} is not supported in GGUF; only "
                             f"{', '.join(FORMS)} are")
        self.form = FORMS[self.kind]
        others = {kind for tensor in self._raw.values() if (kind := tensor.tensor_type.name) not in TYPES}
        if others:
            raise CheckpointError(f"{file.name}: tensors of type {', '.join(sorted(others))} are not supported; "
                                  f"{', '.join(TYPES)} are")
        arch = {name: arch for arch, name in MODEL_ARCH_NAMES.items()}[self.kind]
        self._names = get_tensor_name_map(arch, self.size("block_count", MAX_LAYERS))

    def meta(self, name: str, default: Any = None) -> Any:
        found = self.metadata.get(name)
        try:
            return default if found is None else found.contents()
        except (ValueError, IndexError) as error:  # of bytes that are no text
            raise CheckpointError(f"{self._path.name}: {name} cannot be read: {error}") from None

    def size(self, name: str, most: int = (1 << 31) - 1) -> int:
        value = self.meta(f"{self.kind}.{name}")
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= most:
            raise ModelError(f"{self._path.name}: {self.kind}.{name} must be an integer between 1 and {most}, not "
                             f"{value!r}")
        return value

    @property
    def num_elements(self) -> int:
        return sum(int(tensor.n_elements) for tensor in self._raw.values())

    def shape(self, name: str) -> tuple[int, ...] | None:
        found = self._find(name)
        return None if found is None else tuple(int(size) for size in reversed(self._raw[found].shape))

    def dtype(self, name: str) -> str | None:
        """Of ggml's types, by its name."""
        found = self._find(name)
        return None if found is None else str(self._raw[found].tensor_type.name)

    def get(self, name: str, shape: tuple[int, ...], dtypes: tuple[str, ...] = FLOATS) -> Array:
        from gguf import dequantize

        tensor = self._checked(name, shape)
        values = dequantize(tensor.data, tensor.tensor_type).reshape(shape)
        if self.form.offset and name.endswith("norm.weight"):
            values = values - np.float32(self.form.offset)
        rows = self._rows(name, shape[0])
        return values if rows is None else values[rows]

    def integers(self, name: str, n: int, k: int) -> Stored:
        """A weight [n, k] of Q4_0 or Q8_0: blocks of a float16 scale and 32 codes; of Q4_0 the first 16 are the low
        nibbles."""
        tensor = self._checked(name, (n, k))
        bits = INTEGERS[tensor.tensor_type.name]
        blocks = np.asarray(tensor.data).view(np.uint8).reshape(n, k // GROUP, 2 + GROUP * bits // 8)
        scale = np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0]
        octets = blocks[..., 2:]
        codes = (octets.view(np.int8) if bits == 8 else
                 np.concatenate((octets & 15, octets >> 4), axis=-1).astype(np.int8) - 8)
        codes, rows = codes.reshape(n, k), self._rows(name, n)
        if rows is not None:
            codes, scale = codes[rows], scale[rows]
        return Stored(pack(codes, bits), scale, bits, GROUP)

    def raw(self, name: str) -> Array | None:
        """A vector under the file's own name for it; None where there is none."""
        tensor = self._raw.get(name)
        return None if tensor is None else np.asarray(tensor.data).view(np.float32).ravel()

    def _checked(self, name: str, shape: tuple[int, ...]) -> Any:
        found = self._find(name)
        if found is None:
            raise CheckpointError(f"{self._path} has no tensor for {name!r}")
        if self.shape(name) != shape:
            raise CheckpointError(f"{found} has shape {list(self.shape(name) or ())}, but the metadata asks for "
                                  f"{list(shape)}")
        return self._raw[found]

    def _rows(self, name: str, n: int) -> Array | None:
        """The order that takes rope's pairs apart, for q and k of a family that has them side by side."""
        if not self.form.turned or not re.search(r"\.[qk]_proj\.(weight|bias)$", name):
            return None
        dim = self.head_dim
        return np.arange(n).reshape(-1, dim)[:, halves(dim, dim)].ravel()

    @property
    def head_dim(self) -> int:
        own = self.meta(f"{self.kind}.attention.key_length")
        return self.size("attention.key_length") if own is not None else \
            self.size("embedding_length") // self.size("attention.head_count")

    def _find(self, name: str) -> str | None:
        found = self._names.get_name(name, try_suffixes=(".weight", ".bias"))
        return found if found in self._raw else None


class GgufIntegers:
    """Q4_0 and Q8_0 as integers; a warning says what is kept as floats. Without either the file is a float model."""

    def __init__(self, tensors: GgufTensors, linears: Sequence[str]) -> None:
        self._tensors = tensors
        kinds = Counter(kind for name in linears if (kind := tensors.dtype(f"{name}.weight")) is not None)
        self.dequantizes = not kinds.keys() & INTEGERS.keys()
        floats = [f"{count} {kind}" for kind, count in kinds.items() if kind not in (*INTEGERS, "F32", "F16", "BF16")]
        if floats and not self.dequantizes:
            logger.warning("of this GGUF's linear layers %s are kept as floats, exactly and in more bytes; Q4_0 and "
                           "Q8_0 run as they are, and `fptq quantize` makes W4A8 of any", " and ".join(floats))

    def scheme(self, name: str) -> LayerScheme | None:
        bits = INTEGERS.get(self._tensors.dtype(f"{name}.weight") or "")
        return None if bits is None else LayerScheme(QuantizationArgs(bits, "group", GROUP), None)

    def has(self, name: str) -> bool:
        return self.scheme(name) is not None

    def read(self, name: str, n: int, k: int, notes: Counter[str]) -> QuantizedWeight | Array:
        return runnable(name, self._tensors.integers(f"{name}.weight", n, k), k, notes)


def config_of(tensors: GgufTensors) -> dict[str, Any]:
    """What transformers would write of such a model. Raises ModelError."""
    kind, form = tensors.kind, tensors.form
    keys = {**SIZES, **form.keys}
    for name in tensors.metadata:
        key = name.removeprefix(f"{kind}.")
        if key != name and key not in (*keys.values(), *READ) and tensors.meta(name) != HARMLESS.get(key, object()):
            raise ModelError(f"{name} is {str(tensors.meta(name))[:60]!r}, which is not supported in GGUF")
    config = {name: value for name, key in keys.items() if (value := tensors.meta(f"{kind}.{key}")) is not None}
    for name, value in config.items():
        if not isinstance(value, int | float):
            raise ModelError(f"{kind}.{keys[name]} differs by layer, which is not supported")
    if tensors.meta(f"{kind}.attention.value_length", tensors.head_dim) != tensors.head_dim:
        raise ModelError(f"{kind}.attention.value_length is not the size of a head of q and k")
    embedding = tensors.shape("model.embed_tokens.weight")
    if embedding is None:
        raise CheckpointError("the file has no token_embd.weight")
    config |= {
        "architectures": [form.architecture], "model_type": form.model_type, "vocab_size": embedding[0],
        "tie_word_embeddings": tensors.shape("lm_head.weight") is None, "head_dim": tensors.head_dim,
        **form.fields, **_rope(tensors, tensors.size("context_length")),
    }
    for name in ("bos", "eos"):
        if (token := tensors.meta(f"tokenizer.ggml.{name}_token_id")) is not None:
            config[f"{name}_token_id"] = token
    if kind in ("llama", "granite", "smollm3"):
        config["attention_bias"] = tensors.shape("model.layers.0.self_attn.q_proj.bias") is not None
        config["mlp_bias"] = tensors.shape("model.layers.0.mlp.up_proj.bias") is not None
    if kind in UNSCALED:
        unscaled = config["num_hidden_layers"] == UNSCALED[kind]
        config["query_pre_attn_scalar"] = config["hidden_size"] // config["num_attention_heads"] if unscaled \
            else config["head_dim"]
    return config


def _rope(tensors: GgufTensors, context: int) -> dict[str, Any]:
    """Llama 3's scaling is a factor for each frequency in a GGUF, which longrope is too."""
    kind, dim = tensors.kind, tensors.head_dim
    turned = tensors.meta(f"{kind}.rope.dimension_count", dim)
    if turned != dim:
        raise ModelError(f"{kind}.rope.dimension_count {turned} is not the {dim} of a head")
    numbers = Fields({name: tensors.meta(f"{kind}.rope.{name}") for name in ("freq_base", "scaling.factor")}, kind)
    found: dict[str, Any] = {"rope_theta": numbers.number("freq_base", 10000.0, low=1.0)}
    scaling, factor = tensors.meta(f"{kind}.rope.scaling.type", "none"), numbers.number("scaling.factor", 1.0, low=1e-6)
    original = tensors.meta(f"{kind}.rope.scaling.original_context_length", context)
    if (frequencies := tensors.raw("rope_freqs.weight")) is not None:
        factors = [float(each) for each in frequencies]
        found["rope_scaling"] = {"rope_type": "longrope", "short_factor": factors, "long_factor": factors,
                                 "attention_factor": 1.0, "factor": 1.0, "original_max_position_embeddings": context}
    elif scaling == "linear" and factor != 1.0:
        found["rope_scaling"] = {"rope_type": "linear", "factor": factor}
    elif scaling == "yarn":
        found["rope_scaling"] = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    elif scaling not in ("none", "linear"):
        raise ModelError(f"{kind}.rope.scaling.type {scaling!r} is not supported; linear and yarn are")
    return found
