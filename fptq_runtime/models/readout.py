"""From the rows behind an artifact's last norm back to those of the model that it was made from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fptq_runtime.artifact.files import read_file
from fptq_runtime.kernels.base import Array, Float64Array
from fptq_runtime.models.tensors import CheckpointError

READOUT = "fptq.readout"  # a file of an artifact; no *.safetensors, which loaders take for weights
MOST = 64 << 20  # bytes of the file that are read at all


@dataclass(frozen=True)
class Readout:
    """Undoes what a rotation did: it turned the residual stream, y = x · Q, and the last norm's gains went into the
    head.

    Q is diag(signs) times a Hadamard matrix over the largest power of two that divides H, and `odd` over the rest.
    """

    gains: Array  # float32 [H]
    signs: Array  # float32 [H]
    odd: Array  # float32 [H / 2ⁿ, H / 2ⁿ], orthogonal

    @classmethod
    def read(cls, path: Path, size: int) -> Readout:
        """What `to_bytes` made, for a hidden size. Raises CheckpointError."""
        odd = size // (size & -size)
        shapes = {"gains": (size,), "signs": (size,), "odd": (odd, odd)}
        try:
            arrays = load(read_file(path, MOST))
        except SafetensorError as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from None
        if {name: (array.dtype, array.shape) for name, array in arrays.items()} != {
                name: (np.dtype(np.float32), shape) for name, shape in shapes.items()}:
            raise CheckpointError(f"{path} is not of a model of hidden size {size}")
        return cls(**arrays)

    def to_bytes(self) -> bytes:
        return save({name: np.ascontiguousarray(array) for name, array in vars(self).items()})

    def __call__(self, y: Float64Array) -> Float64Array:
        """x · diag(gains) of one row y, or of a mean of rows. [H]"""
        x = y.reshape(-1, self.odd.shape[0]) @ self.odd.T.astype(np.float64)
        size, width = len(x), 1
        while width < size:
            pairs = x.reshape(-1, 2, width, x.shape[1])
            x = np.stack((pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]), 1).reshape(size, -1)
            width *= 2
        turned: Float64Array = x.reshape(-1) / math.sqrt(size) * self.signs * self.gains
        return turned
