"""Tables that layers need and no checkpoint holds."""

from __future__ import annotations

import math

import numpy as np

from fptq_runtime.config import RopeConfig
from fptq_runtime.kernels.base import Float32Array

_CHUNK = 4096  # positions at a time, since sines are taken in double precision


def rope_tables(rope: RopeConfig, head_dim: int, max_positions: int) -> tuple[Float32Array, Float32Array]:
    """cos and sin of every position, each float32 [max_positions, head_dim / 2]. Angles are rounded to float32 as in
    transformers, which large positions feel."""
    frequencies = _inverse_frequencies(rope, head_dim)
    cos, sin = (np.empty((max_positions, head_dim // 2), np.float32) for _ in range(2))
    for start in range(0, max_positions, _CHUNK):
        positions = np.arange(start, min(start + _CHUNK, max_positions), dtype=np.float32)
        angles = (positions[:, None] * frequencies).astype(np.float64)  # [P, D / 2]
        cos[start : start + _CHUNK] = np.cos(angles)
        sin[start : start + _CHUNK] = np.sin(angles)
    return cos, sin


def _inverse_frequencies(rope: RopeConfig, head_dim: int) -> Float32Array:
    """[head_dim / 2]; "llama3" smooths between kept and divided wavelengths (Llama 3.1's reference)."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    powers = np.power(rope.theta, exponents.astype(np.float64)).astype(np.float32)
    inverse: Float32Array = np.float32(1) / powers
    if rope.rope_type == "default":
        return inverse
    if rope.rope_type == "linear":
        return inverse / np.float32(rope.factor)
    original, factor = rope.original_max_position_embeddings, np.float32(rope.factor)
    wavelength = np.float32(2 * math.pi) / inverse
    smooth = (np.float32(original) / wavelength - np.float32(rope.low_freq_factor)) / np.float32(
        rope.high_freq_factor - rope.low_freq_factor)
    blended = (1 - smooth) * inverse / factor + smooth * inverse
    low, high = original / rope.low_freq_factor, original / rope.high_freq_factor
    return np.where(wavelength > low, inverse / factor, np.where(wavelength < high, inverse, blended))


def alibi_slopes(num_heads: int) -> Float32Array:
    """float32 [num_heads]: a geometric sequence, filled up from the next power of two (ALiBi, arXiv 2108.12409)."""
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    slopes += [2 ** (-4 * (2 * i + 1) / power) for i in range(num_heads - power)]
    return np.array(slopes, dtype=np.float32)
