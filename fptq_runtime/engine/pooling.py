"""One vector from a sequence's hidden states, whatever steps they come in. No torch."""

from __future__ import annotations

import numpy as np

from fptq_runtime.config import Pooling
from fptq_runtime.kernels.base import Float32Array, Float64Array


class Pooler:
    """Takes rows in order, those that come again but once, and adds them up one after the other in float64: the bits of
    the sum depend on no step's size."""

    def __init__(self, pooling: Pooling) -> None:
        self._pooling = pooling
        self._next = 0  # position
        self._sum: Float64Array | None = None
        self._weights = 0

    def add(self, position: int, rows: Float32Array) -> None:
        """rows: of the positions from `position` on. [R, H]"""
        for row in rows[max(0, self._next - position) :].astype(np.float64):
            at = max(self._next, position)
            self._next = at + 1
            weight = at + 1 if self._pooling == "weightedmean" else 1
            if self._sum is None or self._pooling == "last":
                self._sum, self._weights = row * weight, weight
            else:
                self._sum += row * weight
                self._weights += weight

    def result(self) -> Float64Array:
        """[H]. Raises ValueError where it is not finite."""
        assert self._sum is not None
        mean = self._sum / self._weights
        if not np.isfinite(mean).all():
            raise ValueError("the model returned hidden states that are not finite")
        return mean
