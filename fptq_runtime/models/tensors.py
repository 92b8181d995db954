"""The safetensors of a model directory, memory-mapped and checked."""

from __future__ import annotations

import json
import math
import re
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from ml_dtypes import bfloat16, float8_e4m3fn, float8_e8m0fnu
from safetensors import SafetensorError, safe_open

from fptq_runtime.artifact.files import FileError, is_there, open_file, path_of, read_file
from fptq_runtime.errors import FptqError
from fptq_runtime.kernels.base import Array

MAX_JSON_BYTES = 64 << 20
DTYPES = {"F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16),
          "BF16": np.dtype(bfloat16), "F8_E4M3": np.dtype(float8_e4m3fn), "F8_E8M0": np.dtype(float8_e8m0fnu),
          "I64": np.dtype(np.int64), "I32": np.dtype(np.int32), "I8": np.dtype(np.int8),
          "U8": np.dtype(np.uint8)}  # by their names in a safetensors header
FLOATS = ("F32", "F16", "BF16", "F64")


def weight_files(path: Path) -> list[Path]:
    """The files of a model directory that hold weights, in whichever form."""
    return sorted(file for file in path.iterdir() if file.suffix in (".safetensors", ".bin", ".gguf"))


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
    """Every tensor of a directory by name, with or without `bare_prefix`, which some checkpoints leave out. rename:
    which of the stored names count, by those that they have here; all unless given. files: a model's unless given."""

    def __init__(self, path: Path, bare_prefix: str,
                 rename: Callable[[Iterable[str]], Mapping[str, str]] | None = None,
                 files: Iterable[str] | None = None) -> None:
        self._path = path
        self._bare_prefix = bare_prefix
        self._stored: dict[str, _Stored] = {}
        opened = ExitStack()
        weakref.finalize(self, opened.close)
        for shard in sorted(_shards(path) if files is None else files):
            try:
                self._stored |= _read_header(opened.enter_context(open_file(path / shard)))
            except FileNotFoundError:
                raise CheckpointError(f"{path} has no {shard}") from None
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path / shard} is not a readable safetensors file: {error}") from None
        if rename is not None:
            self._stored = {name: self._stored[stored] for name, stored in rename(self._stored).items()}

    @property
    def names(self) -> Iterable[str]:
        return self._stored.keys()

    @property
    def num_elements(self) -> int:
        return sum(math.prod(stored.shape) for stored in self._stored.values())

    def shape(self, name: str) -> tuple[int, ...] | None:
        """None where there is no such tensor."""
        found = self._find(name)
        return None if found is None else self._stored[found].shape

    def dtype(self, name: str) -> str | None:
        """As a safetensors header names it."""
        found = self._find(name)
        return None if found is None else self._stored[found].dtype

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
            mapped = np.memmap(stored.file, DTYPES[stored.dtype], "c", stored.offset, shape).view(np.ndarray)
            return mapped.astype(np.float32) if stored.dtype == "F64" else mapped
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
    """model.safetensors, what its index names, every model-…-of-… where there is no index, or the one .safetensors file
    there is (AutoGPTQ names its own)."""
    index = path / "model.safetensors.index.json"
    if is_there(index):
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, Mapping) or not weight_map:
            raise CheckpointError(f"{index.name} has no weight_map")
        shards = {str(shard) for shard in weight_map.values()}
        if any(Path(shard).name != shard or not shard.endswith(".safetensors") for shard in shards):
            raise CheckpointError(f"{index.name} names a shard that is not a .safetensors file beside it")
        return shards
    parts = {found[0]: int(found[1]) for file in path.glob("model-*.safetensors")
             if (found := re.fullmatch(r"model-\d+-of-(\d+)\.safetensors", file.name))}
    if parts and not is_there(path / "model.safetensors"):
        count = max(parts.values())
        if len(parts) != count or len(set(parts.values())) > 1:
            raise CheckpointError(f"{path} has {len(parts)} of {count} shards of its weights, and no {index.name}")
        return set(parts)
    single = [file.name for file in sorted(path.glob("*.safetensors"))]
    if "model.safetensors" in single or len(single) == 1:
        return {"model.safetensors" if "model.safetensors" in single else single[0]}
    pickled = [p.name for p in path.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".ckpt")]
    if pickled:
        raise CheckpointError(f"{path} has only pickled weights ({pickled[0]}) and no safetensors; they can run code "
                              "when loaded; `fptq quantize` reads them in a process of its own")
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
