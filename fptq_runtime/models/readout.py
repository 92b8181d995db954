"""What a recipe made of the rows that a model's linears read, and the way back: for embeddings, which are the float
model's, and for adapters, which were trained beside it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fptq_runtime.artifact.files import read_file
from fptq_runtime.kernels.base import Array, Float64Array
from fptq_runtime.models.tensors import CheckpointError

if TYPE_CHECKING:
    from fptq_runtime.models.block import Model

READOUT = "fptq.readout"  # a file of an artifact; no *.safetensors, which loaders take for weights
MOST = 256 << 20  # bytes of the file that are read at all
MOVING = ("rotation", "cle", "ocs", "fptq", "smoothquant", "os+", "aweq", "awq")  # steps that change what linears read


@dataclass(frozen=True)
class Turn:
    """x · Q of every `size` numbers in a row. Q is diag(signs) times a Hadamard matrix over the largest power of two
    that divides `size`, and `odd` over the rest."""

    signs: Array  # float32 [size]
    odd: Array  # float32 [size / 2ⁿ, size / 2ⁿ], orthogonal

    def __call__(self, x: Float64Array) -> Float64Array:
        """x · Q of each row. [..., a multiple of size]"""
        turned: Float64Array = _hadamard(x.reshape(-1, self.signs.size) * self.signs, len(self.odd)) @ self.odd
        return turned.reshape(x.shape)

    def back(self, y: Float64Array) -> Float64Array:
        """y · Qᵀ of each row."""
        odd = len(self.odd)
        x = _hadamard((y.reshape(-1, odd) @ self.odd.T).reshape(-1, self.signs.size), odd)
        turned: Float64Array = x.reshape(-1, self.signs.size) * self.signs
        return turned.reshape(y.shape)


@dataclass(frozen=True)
class Basis:
    """Where a linear reads y = (x / gains) · Q / scales in an artifact and read x in the model. None: as it was."""

    gains: Array | None = None  # float32 [K]
    turn: Turn | None = None
    scales: Array | None = None  # float32 [K]

    def turned(self, gains: Array, turn: Turn) -> Basis:
        """Of what is divided by `gains` and turned after all this, which must not have turned it yet."""
        assert self.turn is None
        return Basis(gains if self.scales is None else gains * self.scales, turn)

    def divided(self, scales: Array) -> Basis:
        """Of what is divided by `scales` after all this."""
        return replace(self, scales=scales if self.scales is None else scales * self.scales)

    def at(self, index: Array) -> Basis:
        """Of inputs `index` alone, which are whole turns."""
        return Basis(None if self.gains is None else self.gains[index], self.turn,
                     None if self.scales is None else self.scales[index])

    def reader(self, weight: Float64Array) -> Float64Array:
        """What reads y where `weight` [..., K] read x."""
        weight = weight if self.gains is None else weight * self.gains
        weight = weight if self.turn is None else self.turn(weight)
        return weight if self.scales is None else weight * self.scales

    def there(self, x: Float64Array) -> Float64Array:
        """y of rows x [..., K]."""
        x = x if self.gains is None else x / self.gains
        x = x if self.turn is None else self.turn(x)
        return x if self.scales is None else x / self.scales

    def back(self, y: Float64Array) -> Float64Array:
        """x of rows y [..., K]."""
        y = y if self.scales is None else y * self.scales
        y = y if self.turn is None else self.turn.back(y)
        return y if self.gains is None else y * self.gains


Bases = Mapping[tuple[str, str], Basis]  # of linears whose inputs were changed, by the part's name and their own


def read_bases(path: Path, model: Model) -> Bases:
    """What `bases_to_bytes` made of such a model. Raises CheckpointError."""
    data = read_file(path, MOST)
    try:
        arrays = load(data)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:  # KeyError: of a dtype that numpy does not have
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    read = {}
    for part in model.parts:
        for linear in part.linears:
            prefix = _prefix(part.name, linear.name)
            found = {name: arrays.pop(prefix + name) for name in _NAMES if prefix + name in arrays}
            if not found:
                continue
            if not _fits(found, linear.k):
                raise CheckpointError(f"{path} is not of a model whose {linear.name} reads {linear.k} numbers")
            turn = Turn(found["signs"], found["odd"]) if "signs" in found else None
            read[part.name, linear.name] = Basis(found.get("gains"), turn, found.get("scales"))
    if arrays:
        raise CheckpointError(f"{path} is not of this model, which has no {min(arrays)}")
    return read


def knows_layers(bases: Bases) -> bool:
    """Whether they are more than a turned head's, which is all that artifacts had at first."""
    return len(bases) != 1 or ("", "head") not in bases


def bases_to_bytes(bases: Bases) -> bytes:
    return save({_prefix(*key) + name: np.ascontiguousarray(array, np.float32)
                 for key, basis in bases.items() for name, array in _arrays(basis)})


_NAMES = ("gains", "signs", "odd", "scales")


def _prefix(part: str, linear: str) -> str:
    """The head, whose part has no name, has the names to itself."""
    return f"{part}.{linear}." if part else ""


def _arrays(basis: Basis) -> Iterator[tuple[str, Array]]:
    for name, array in {**vars(basis), **({} if basis.turn is None else vars(basis.turn))}.items():
        if name in _NAMES and array is not None:
            yield name, array


def _fits(found: Mapping[str, Array], k: int) -> bool:
    if ("signs" in found) != ("odd" in found) or any(array.dtype != np.float32 for array in found.values()):
        return False
    expected: dict[str, tuple[int, ...]] = {"gains": (k,), "scales": (k,)}
    if "signs" in found:
        size = max(found["signs"].size, 1)
        odd = size // (size & -size)
        expected |= {"signs": (size,), "odd": (odd, odd)}
        if k % size:
            return False
    return all(array.shape == expected[name] for name, array in found.items())


def _hadamard(x: Float64Array, odd: int) -> Float64Array:
    """Sylvester's matrix, orthonormal, over each row's first dimension of two, the second of which is `odd`: [rows,
    size] to [rows · size / odd, odd]."""
    size = x.shape[-1] // odd
    y, width = x.reshape(-1, odd), 1
    while width < size:
        pairs = y.reshape(-1, 2, width, odd)
        y = np.stack((pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]), 1).reshape(-1, odd)
        width *= 2
    return y / math.sqrt(size)
