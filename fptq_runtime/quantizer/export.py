"""Quantized parameters as compressed-tensors' tensors and config: what `Checkpoint` reads back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fptq_runtime.artifact.scheme import INT8_DYNAMIC, INT8_STATIC, LayerScheme, QuantizationArgs
from fptq_runtime.kernels.base import Array, Embedding, Linear, Norm, QuantizedWeight
from fptq_runtime.kernels.reference import to_numpy


def module_tensors(name: str, module: Linear | Norm | Embedding) -> dict[str, Array]:
    """A module's tensors under their names in the file, in numpy."""
    weight = module.weight
    if isinstance(weight, QuantizedWeight):
        tensors = {
            f"{name}.weight_packed": to_numpy(weight.packed),
            f"{name}.weight_scale": to_numpy(weight.scale),
            f"{name}.weight_shape": np.array([weight.packed.shape[0], weight.k], dtype=np.int64),
        }
        if isinstance(module, Linear) and module.act is not None and module.act.scale is not None:
            tensors[f"{name}.input_scale"] = np.array([module.act.scale], dtype=np.float32)
    else:
        tensors = {f"{name}.weight": to_numpy(weight)}
    if not isinstance(module, Embedding) and module.bias is not None:
        tensors[f"{name}.bias"] = to_numpy(module.bias)
    return tensors


def linear_scheme(linear: Linear) -> LayerScheme | None:
    """None where the weights are in float."""
    weight = linear.weight
    if not isinstance(weight, QuantizedWeight):
        return None
    per_channel = weight.group_size == weight.k
    weights = (
        QuantizationArgs(num_bits=weight.num_bits, strategy="channel")
        if per_channel
        else QuantizationArgs(num_bits=weight.num_bits, strategy="group", group_size=weight.group_size)
    )
    if linear.act is None:
        return LayerScheme(weights, None)
    return LayerScheme(weights, INT8_DYNAMIC if linear.act.scale is None else INT8_STATIC)


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
            name += "_channel" * (scheme.weights.strategy == "channel")
            name += f"_{scheme.weights.num_bits}bit" * (scheme.weights.num_bits != 4)
        group = groups.setdefault(name, {
            "format": "pack-quantized",
            "weights": scheme.weights.to_dict(),
            "input_activations": None if act is None else act.to_dict(),
            "output_activations": None,
            "targets": [],
        })
        group["targets"].append(module)
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(ignore),
        "kv_cache_scheme": None,
    }
