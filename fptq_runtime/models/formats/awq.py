"""AutoAWQ's checkpoints in its gemm packing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from fptq_runtime.artifact.scheme import LayerScheme
from fptq_runtime.kernels.base import Array, QuantizedWeight
from fptq_runtime.models.formats.facts import refuse_unknown
from fptq_runtime.models.formats.gptq import READ, group_of, layout_of, uniform_args
from fptq_runtime.models.tensors import CheckpointError, Tensors
from fptq_runtime.models.weights import Stored, pack, runnable, unpack

COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)  # of each eight, in the order of a word's nibbles
HARMLESS = ("modules_to_not_convert", "backend", "do_fuse", "fuse_max_seq_len", "modules_to_fuse", "exllama_config",
            "duo_scaling", "model_name_or_path")


class Awq:
    """One scheme for every linear that the checkpoint stores quantized. Raises SchemeError."""

    dequantizes = False

    def __init__(self, config: Mapping[str, Any], tensors: Tensors) -> None:
        refuse_unknown(config, "awq's quantization_config", READ, HARMLESS)
        layout_of(config, "awq", ("gemm",))
        self._tensors = tensors
        self._args = uniform_args(config, "awq", (4,), not config.get("zero_point", True))

    def scheme(self, name: str) -> LayerScheme | None:
        return LayerScheme(self._args, None) if self.has(name) else None

    def has(self, name: str) -> bool:
        return self._tensors.shape(f"{name}.qweight") is not None

    def read(self, name: str, n: int, k: int, notes: Counter[str]) -> QuantizedWeight | Array:
        if n % 8:
            raise CheckpointError(f"{name}: {n} output features are not a multiple of 8, which AWQ packs together")
        groups = (self._tensors.shape(f"{name}.scales") or (0,))[0]
        codes = _columns(self._tensors.get(f"{name}.qweight", (k, n // 8), ("I32",)), n)  # [K, N]
        zero = _columns(self._tensors.get(f"{name}.qzeros", (groups, n // 8), ("I32",)), n)  # [G, N]
        scale = self._tensors.get(f"{name}.scales", (groups, n)).T
        stored = Stored(pack(codes.T, 4), scale, 4, group_of(name, k, groups, self._args), zero.T)
        return runnable(name, stored, k, notes)


def _columns(words: Array, n: int) -> npt.NDArray[np.int16]:
    """int32 [rows, N / 8] to codes [rows, N], less 8."""
    nibbles = unpack(words, 4, n).reshape(words.shape[0], -1, 8)
    columns = np.empty_like(nibbles)
    columns[..., COLUMNS] = nibbles
    return columns.reshape(words.shape[0], n)
