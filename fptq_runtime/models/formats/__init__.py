"""How checkpoints store quantized weights: one file a format, which answers three questions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from fptq_runtime.artifact.files import MANIFEST, is_there
from fptq_runtime.artifact.scheme import LayerScheme, SchemeError
from fptq_runtime.kernels.base import Array, QuantizedWeight
from fptq_runtime.models.formats.auto_round import METHODS, open_auto_round
from fptq_runtime.models.formats.awq import Awq
from fptq_runtime.models.formats.compressed_tensors import CompressedTensors
from fptq_runtime.models.formats.floats import Floats, block_of_groups
from fptq_runtime.models.formats.gptq import Gptq
from fptq_runtime.models.tensors import Tensors, read_json


class WeightFormat(Protocol):
    """dequantizes: `read` gives floats for every linear that it `has`, and the checkpoint counts as one in float."""

    @property
    def dequantizes(self) -> bool: ...

    def scheme(self, name: str) -> LayerScheme | None:
        """How the linear `name` is quantized; None: it is in float."""
        ...

    def has(self, name: str) -> bool:
        """The checkpoint stores quantized weights for the linear `name`."""
        ...

    def read(self, name: str, n: int, k: int, notes: Counter[str]) -> QuantizedWeight | Array:
        """The weight [n, k] of a linear that has a scheme. `notes` counts linears that had to be stored differently, by
        reason. Raises CheckpointError."""
        ...


def open_format(config: Mapping[str, Any], path: Path, tensors: Tensors, dequantize: bool = False,
                ) -> WeightFormat | None:
    """The format that config.json names, or that the file beside it does in which AutoGPTQ and AutoAWQ kept it; None
    where the checkpoint is in float, or has experts in MXFP4, which are widened. dequantize: FP8 and FP4 weights are
    read as floats also where kernels would take their codes. Raises SchemeError."""
    quantization = config.get("quantization_config")
    if quantization is None:
        beside = next((file for name in ("quantize_config.json", "quant_config.json")
                       if is_there(file := path / name)), None)
        if beside is None:
            return None
        quantization = read_json(beside)
    if not isinstance(quantization, Mapping):
        raise SchemeError("config.json: quantization_config must be an object")
    method = quantization.get("quant_method")
    if method is None:
        method = "awq" if "w_bit" in quantization else "gptq" if "bits" in quantization else None
    match method:
        case "compressed-tensors":
            of_floats, block = block_of_groups(quantization, needed=not dequantize)
            if of_floats and not is_there(path / MANIFEST):
                return Floats(tensors, block)
            return CompressedTensors(quantization, tensors)
        case "gptq":
            return Gptq(quantization, tensors)
        case "awq":
            return Awq(quantization, tensors)
        case _ if method in METHODS:
            return open_auto_round(quantization, tensors)
        case "fp8" | "fbgemm_fp8" | "modelopt":
            return Floats.of_config(quantization, tensors)
        case "mxfp4":  # of gpt-oss's experts alone, which are read as floats
            return None
    raise SchemeError(f"quantization method {method!r} is not supported; compressed-tensors, gptq, awq, "
                      "auto-round, fp8, fbgemm_fp8, modelopt and mxfp4 are")
