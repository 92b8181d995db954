"""The safetensors of a model directory, memory-mapped and checked."""

from __future__ import annotations

import json
import math
import weakref
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from ml_dtypes import bfloat16, float8_e4m3fn
from safetensors import SafetensorError, safe_open

from fptq_runtime.artifact.files import FileError, is_there, open_file, path_of, read_file
from fptq_runtime.errors import FptqError
from fptq_runtime.kernels.base import Array

MAX_JSON_BYTES = 64 << 20
DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(bfloat16),
          "F8_E4M3": np.dtype(float8_e4m3fn), "I64": np.dtype(np.int64), "I32": np.dtype(np.int32),
          "I8": np.dtype(np.int8), "U8": np.dtype(np.uint8)}  # by their names in a safetensors header
FLOATS = ("F32", "F16", "BF16")


class CheckpointError(FptqError):
    """A checkpoint that is missing, damaged or inconsistent. One line, for the user."""


@dataclass(frozen=True)
class _Stored:
    """Where a tensor lies: dtype as the header names it, offset in bytes from the file's start."""

    file: BinaryIO
    dtype: str
    shape: tuple[int, ...]
    offset: int


class Tensors:
    """Every tensor of a directory by name, with or without `bare_prefix`, which some checkpoints leave out."""

    def __init__(self, path: Path, bare_prefix: str) -> None:
        self._path = path
        self._bare_prefix = bare_prefix
        self._stored: dict[str, _Stored] = {}
        files = ExitStack()
        weakref.finalize(self, files.close)
        for shard in sorted(_shards(path)):
            try:
                self._stored |= _read_header(files.enter_context(open_file(path / shard)))
            except FileNotFoundError:
                raise CheckpointError(f"{path} has no {shard}") from None
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path / shard} is not a readable safetensors file: {error}") from None

    @property
    def num_elements(self) -> int:
        return sum(math.prod(stored.shape) for stored in self._stored.values())

    def shape(self, name: str) -> tuple[int, ...] | None:
        """None where there is no such tensor."""
        found = self._find(name)
        return None if found is None else self._stored[found].shape

    def get(self, name: str, shape: tuple[int, ...], dtypes: tuple[str, ...] = FLOATS) -> Array:
        """A tensor with a memory mapping of its own, so that a process holds what it touches of those it keeps and
        nothing of those it dropped. Raises CheckpointError unless shape and dtype are right."""
        found = self._find(name)
        if found is None:
            raise CheckpointError(f"{self._path} has no tensor {name!r}")
        stored = self._stored[found]
        if stored.shape != shape:
            raise CheckpointError(f"{name} has shape {list(stored.shape)}, but config.json asks for {list(shape)}")
        if stored.dtype not in dtypes:
            raise CheckpointError(f"{name} is {_dtype(stored.dtype)}, not {' or '.join(map(_dtype, dtypes))}")
        try:  # mode "c": private, since torch wants arrays that could be written
            return np.memmap(stored.file, DTYPES[stored.dtype], "c", stored.offset, shape).view(np.ndarray)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{name} cannot be read: {error}") from None

    def _find(self, name: str) -> str | None:
        bare = name.removeprefix(self._bare_prefix)
        return next((candidate for candidate in (name, bare) if candidate in self._stored), None)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a model directory. Raises CheckpointError, or FileError where the file is none."""
    try:
        data = json.loads(read_file(path, MAX_JSON_BYTES).decode())
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} has no {path.name}") from None
    except FileError:
        raise
    except (ValueError, RecursionError) as error:  # ValueError: also a number of too many digits
        raise CheckpointError(f"{path} is not readable JSON: {error}") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return data


def _shards(path: Path) -> set[str]:
    """model.safetensors, what its index names, or the one .safetensors file there is (AutoGPTQ names its own)."""
    index = path / "model.safetensors.index.json"
    if is_there(index):
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, Mapping) or not weight_map:
            raise CheckpointError(f"{index.name} has no weight_map")
        shards = {str(shard) for shard in weight_map.values()}
        if any(Path(shard).name != shard or not shard.endswith(".safetensors") for shard in shards):
            raise CheckpointError(f"{index.name} names a shard that is not a .safetensors file beside it")
        return shards
    single = [file.name for file in sorted(path.glob("*.safetensors"))]
    if "model.safetensors" in single or len(single) == 1:
        return {"model.safetensors" if "model.safetensors" in single else single[0]}
    pickled = [p.name for p in path.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".ckpt")]
    if pickled:
        raise CheckpointError(f"{path} has only pickled weights ({pickled[0]}), which can run code when "
                              "loaded; convert the model to safetensors first")
    raise CheckpointError(f"{path} has no model.safetensors")


def _read_header(file: BinaryIO) -> dict[str, _Stored]:
    """Every tensor of a safetensors file, once the library found its header sound: sizes and offsets within the file
    that agree. Raises SafetensorError or OSError."""
    with safe_open(path_of(file), framework="numpy"):
        pass
    size = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    return {name: _Stored(file, entry["dtype"], tuple(entry["shape"]), 8 + size + entry["data_offsets"][0])
            for name, entry in header.items()}


def _dtype(name: str) -> str:
    return DTYPES[name].name if name in DTYPES else name
