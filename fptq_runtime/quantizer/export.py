"""Quantized parameters as compressed-tensors' tensors and config: what `Checkpoint` reads back.

Others' kernels have none for FP4 groups that are not 16, but compressed-tensors itself decompresses them. Beyond its
vocabulary, and ignored by others with a warning: a linear's `low_rank_down` [r, K] and `low_rank_up` [N, r].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fptq_runtime.artifact.io import ArtifactWriter
from fptq_runtime.artifact.scheme import LayerScheme, QuantizationArgs
from fptq_runtime.kernels.base import Array, Embedding, Linear, Norm, QuantizedWeight
from fptq_runtime.kernels.reference import to_numpy

COMPANIONS = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json",
    "LICENSE*", "NOTICE*",
)


def copy_companions(source: Path, writer: ArtifactWriter) -> None:
    """What lies beside a model's weights and belongs to it."""
    for pattern in COMPANIONS:
        for file in sorted(source.glob(pattern)):
            writer.copy_file(file)


def module_tensors(name: str, module: Linear | Norm | Embedding) -> dict[str, Array]:
    """A module's tensors under their names in the file, in numpy."""
    weight = module.weight
    if isinstance(weight, QuantizedWeight):
        whole = (weight.type, weight.num_bits) == ("float", 8)
        tensors = {
            f"{name}.weight" if whole else f"{name}.weight_packed": to_numpy(weight.packed),
            f"{name}.weight_scale": to_numpy(weight.scale),
        }
        if weight.type == "int":
            tensors[f"{name}.weight_shape"] = np.array([weight.packed.shape[0], weight.k], dtype=np.int64)
        if isinstance(module, Linear) and module.act is not None and module.act.scale is not None:
            tensors[f"{name}.input_scale"] = np.array([module.act.scale], dtype=np.float32)
    else:
        tensors = {f"{name}.weight": to_numpy(weight)}
    if not isinstance(module, Embedding) and module.bias is not None:
        tensors[f"{name}.bias"] = to_numpy(module.bias)
    if isinstance(module, Linear) and module.low_rank is not None:
        down, up = module.low_rank
        tensors |= {f"{name}.low_rank_down": to_numpy(down), f"{name}.low_rank_up": to_numpy(up)}
    return tensors


def linear_scheme(linear: Linear) -> LayerScheme | None:
    """None where the weights are in float."""
    weight = linear.weight
    if not isinstance(weight, QuantizedWeight):
        return None
    per_channel = weight.group_size == weight.k
    weights = QuantizationArgs(num_bits=weight.num_bits, strategy="channel" if per_channel else "group",
                               group_size=None if per_channel else weight.group_size, type=weight.type)
    act = linear.act
    if act is None:
        return LayerScheme(weights, None)
    dynamic = act.scale is None
    return LayerScheme(weights, QuantizationArgs(num_bits=8, strategy="token" if dynamic else "tensor", dynamic=dynamic,
                                                 type=act.type))


def quantization_config(schemes: Mapping[str, LayerScheme], head: str, ignore: Sequence[str]) -> dict[str, Any]:
    """config.json's quantization_config for modules by name; `head` is the module that gets a group of its own.

    Every group says its format itself: without it the loader of transformers infers another and leaves the weights
    uninitialised.
    """
    groups: dict[str, dict[str, Any]] = {}
    for module, scheme in schemes.items():
        act = scheme.input_activations
        name = "head" if module == head else "float" if act is None else "dynamic" if act.dynamic else "static"
        if module != head:
            name += "_fp8" * (act is not None and act.type == "float")
            name += "_channel" * (scheme.weights.strategy == "channel")
            name += f"_{scheme.weights.num_bits}bit" * (scheme.weights.num_bits != 4)
            name += "_float" * (scheme.weights.type == "float")
        group = groups.setdefault(name, {
            "format": scheme.format or scheme.weights.format,
            "weights": scheme.weights.to_dict(),
            "input_activations": None if act is None else act.to_dict(),
            "output_activations": None,
            "targets": [],
        })
        group["targets"].append(module)
    formats = {group["format"] for group in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(ignore),
        "kv_cache_scheme": None,
    }
