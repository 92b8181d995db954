"""Weights that are stored as small floats with scales, and read as the floats that they stand for: FP8 in blocks, per
channel or per tensor (DeepSeek's and transformers' "fp8", FBGEMM, ModelOpt, compressed-tensors), NVFP4 and MXFP4."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from ml_dtypes import bfloat16

from fptq_runtime.artifact.scheme import LayerScheme, SchemeError
from fptq_runtime.kernels.base import Array
from fptq_runtime.models.formats.compressed_tensors import (
    ARGS_HARMLESS,
    ARGS_READ,
    GROUP_READ,
    refuse_what_is_online,
)
from fptq_runtime.models.formats.facts import refuse_unknown
from fptq_runtime.models.tensors import CheckpointError, Tensors

READ = ("quant_method", "weight_block_size", "quant_algo")
HARMLESS = ("fmt", "activation_scheme", "modules_to_not_convert", "ignored_layers", "modules_to_convert", "dequantize",
            "scale_fmt", "expert_dtype", "activation_scale_ub", "producer", "ignore", "kv_cache_quant_algo",
            "config_groups", "exclude_modules", "group_size", "kv_cache_scheme", "quant_library", "run_compressed")
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)  # by the code
SCALES = ("weight_scale_inv", "weight_scale")


class Floats:
    """A linear's weight in float, whatever scales are stored beside it; a linear without any is in float as it is.
    block: rows and columns that share a scale where there is one for each block."""

    dequantizes = True

    def __init__(self, tensors: Tensors, block: Any = None) -> None:
        self._tensors = tensors
        if block is not None and not (isinstance(block, list) and len(block) == 2
                                      and all(isinstance(size, int) and size > 0 for size in block)):
            raise SchemeError(f"weight_block_size must be two sizes, not {block!r}")
        self._block: tuple[int, int] | None = None if block is None else (block[0], block[1])

    @classmethod
    def of_config(cls, config: Mapping[str, Any], tensors: Tensors) -> Floats:
        """quant_method "fp8", "fbgemm_fp8" and "modelopt". Raises SchemeError."""
        if config.get("quant_algo") not in (None, "FP8", "NVFP4"):
            raise SchemeError(f"quantization_config: quant_algo {config['quant_algo']!r} is not supported; FP8 and "
                              "NVFP4 are")
        refuse_unknown(config, "quantization_config", READ, HARMLESS)
        return cls(tensors, config.get("weight_block_size"))

    def scheme(self, name: str) -> LayerScheme | None:
        return None

    def has(self, name: str) -> bool:
        return any(self._tensors.shape(f"{name}.{scale}") is not None for scale in SCALES)

    def read(self, name: str, n: int, k: int, notes: Counter[str]) -> Array:
        """float32 [n, k]. Raises CheckpointError."""
        packed = next((f"{name}.{each}" for each in ("weight_packed", "weight")
                       if self._tensors.dtype(f"{name}.{each}") == "U8"), None)
        values = self._small(packed, n, k) if packed else \
            self._tensors.get(f"{name}.weight", (n, k), ("F8_E4M3",)).astype(np.float32)
        values *= self._scale(name, n, k)
        if not np.isfinite(values).all():
            raise CheckpointError(f"{name}: its weights or scales hold values that are not finite")
        return values

    def _small(self, packed: str, n: int, k: int) -> npt.NDArray[np.float32]:
        codes = self._tensors.get(packed, (n, k // 2), ("U8",))
        values: npt.NDArray[np.float32] = E2M1[np.stack((codes & 15, codes >> 4), axis=-1).reshape(n, k)]
        return values

    def _scale(self, name: str, n: int, k: int) -> Array:
        """Of every weight: [n, k], or what broadcasts to it."""
        stored = next(f"{name}.{scale}" for scale in SCALES if self._tensors.shape(f"{name}.{scale}") is not None)
        shape, kind = self._tensors.shape(stored) or (), self._tensors.dtype(stored)
        if kind in ("U8", "F8_E8M0"):  # MXFP4's: a power of two
            exponents = self._tensors.get(stored, shape, ("U8", "F8_E8M0")).view(np.uint8).astype(np.float32)
            scale = np.exp2(exponents - 127)
        else:
            scale = self._tensors.get(stored, shape, ("F32", "BF16", "F16", "F8_E4M3")).astype(np.float32)
        for whole, power in (("weight_global_scale", -1), ("weight_scale_2", 1)):  # NVFP4's second level
            if (of := self._tensors.shape(f"{name}.{whole}")) is not None:
                scale = scale * self._tensors.get(f"{name}.{whole}", of).astype(np.float32).reshape(()) ** power
        if scale.size == 1:
            return scale.reshape(1, 1)
        if scale.size == n and shape[0] == n:
            return scale.reshape(n, 1)
        if self._block is not None and shape == (-(-n // self._block[0]), -(-k // self._block[1])):
            return scale.repeat(self._block[0], 0)[:n].repeat(self._block[1], 1)[:, :k]
        if len(shape) == 2 and shape[0] == n and k % shape[1] == 0:
            return scale.repeat(k // shape[1], 1)
        raise CheckpointError(f"{stored} has shape {list(shape)}, which are no scales of [{n}, {k}]")


def block_of_groups(config: Mapping[str, Any], needed: bool) -> tuple[bool, Any]:
    """Of compressed-tensors' `config_groups`: whether all are floats that are read as such, and their block. needed:
    only those that kernels do not take, with blocks, one scale for a tensor, or a second level of scales."""
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        return False, None
    blocks, found = None, False
    for name, group in groups.items():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if not isinstance(weights, Mapping) or weights.get("type") != "float":
            return False, None
        refuse_unknown(group, f"config group {name!r}", GROUP_READ, ())
        refuse_unknown(weights, f"config group {name!r}", (*ARGS_READ, "block_structure"), ARGS_HARMLESS)
        packing = group.get("format") or config.get("format")
        found |= not needed or weights.get("strategy") in ("block", "tensor", "tensor_group") \
            or packing == "mxfp4-pack-quantized"
        blocks = weights.get("block_structure") or blocks
    if found:
        refuse_what_is_online(config)
    return found, blocks


def widen_mxfp4(blocks: Array, scales: Array) -> Array:
    """What OCP's MXFP4 stands for, which bfloat16 holds exactly. blocks: uint8 [experts, N, K / 32, 16], the lower
    nibble first; scales: E8M0, uint8 [experts, N, K / 32]. bfloat16 [experts, N, K]"""
    pairs = np.stack((E2M1[np.arange(256) & 15], E2M1[np.arange(256) >> 4]), axis=-1)
    values = np.empty((*scales.shape, 32), bfloat16)
    for expert, scale in enumerate(scales):
        wide = np.ldexp(pairs[blocks[expert]], scale.astype(np.int32)[..., None, None] - 127)
        values[expert] = wide.reshape(*scale.shape, 32)
    return values.reshape(*scales.shape[:-1], -1)
