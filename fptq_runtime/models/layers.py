"""Tables that layers need and no checkpoint holds."""

from __future__ import annotations

import math

import torch

from fptq_runtime.config import RopeConfig


def rope_tables(rope: RopeConfig, head_dim: int, max_positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of every position, each float32 [max_positions, head_dim / 2]."""
    frequencies = _inverse_frequencies(rope, head_dim)
    angles = torch.arange(max_positions, dtype=torch.float32)[:, None] * frequencies  # [P, D / 2]
    return angles.cos(), angles.sin()


def _inverse_frequencies(rope: RopeConfig, head_dim: int) -> torch.Tensor:
    """[head_dim / 2]; "llama3" smooths between kept and divided wavelengths (Llama 3.1's reference)."""
    inverse = 1.0 / (rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim))
    if rope.rope_type == "default":
        return inverse
    if rope.rope_type == "linear":
        return inverse / rope.factor
    original = rope.original_max_position_embeddings
    wavelength = 2 * math.pi / inverse
    smooth = (original / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended = (1 - smooth) * inverse / rope.factor + smooth * inverse
    low, high = original / rope.low_freq_factor, original / rope.high_freq_factor
    return torch.where(wavelength > low, inverse / rope.factor, torch.where(wavelength < high, inverse, blended))


def alibi_slopes(num_heads: int) -> torch.Tensor:
    """float32 [num_heads]: a geometric sequence, filled up from the next power of two (ALiBi, arXiv 2108.12409)."""
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    slopes += [2 ** (-4 * (2 * i + 1) / power) for i in range(num_heads - power)]
    return torch.tensor(slopes, dtype=torch.float32)
