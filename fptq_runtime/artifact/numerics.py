"""The format's executable specification in plain torch: every rounding, scale and bit position.

Symmetric b-bit codes run from -2^(b-1) to 2^(b-1) - 1 and scale = max|x| / ((2^b - 1) / 2), as in compressed-tensors
(`calculate_qparams`): 7.5 for 4 bits, 127.5 for 8.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

_SMALLEST_SCALE = torch.finfo(torch.float32).eps  # of an all-zero group, so that nothing divides by zero


def absmax_scale(amax: torch.Tensor, num_bits: int) -> torch.Tensor:
    """The scale that a largest magnitude asks for. Any shape; float32."""
    scale = amax.float() / ((2**num_bits - 1) / 2)
    return torch.where(scale == 0, torch.full_like(scale, _SMALLEST_SCALE), scale)


def quantize(x: torch.Tensor, scale: torch.Tensor, num_bits: int) -> torch.Tensor:
    """clamp(round(x / scale)), half to even, as int8. scale broadcasts against x."""
    limit = 2 ** (num_bits - 1)
    return (x.float() / scale).round().clamp_(-limit, limit - 1).to(torch.int8)


def quantize_weight(
    weight: torch.Tensor,  # [N, K]
    num_bits: int,
    group_size: int | None,
    clip: torch.Tensor | None = None,  # [N, G], fractions of max|w|
    scale_dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [N, K] int8 and scale [N, G] in scale_dtype; group_size None is per channel (G = 1).

    Codes are computed against the stored, rounded scale. Raises ValueError where K is not a multiple of the group.
    """
    n, k = weight.shape
    group = k if group_size is None else group_size
    if k % group:
        raise ValueError(f"{k} input features are not a multiple of the group size {group}")
    grouped = weight.float().reshape(n, k // group, group)
    amax = grouped.abs().amax(-1)
    scale = absmax_scale(amax if clip is None else amax * clip, num_bits).to(scale_dtype)
    codes = quantize(grouped, scale.float().unsqueeze(-1), num_bits)
    return codes.reshape(n, k), scale


def dequantize(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """codes [N, K] · scale [N, G], each scale over K / G neighbours. float32 [N, K]."""
    n, k = codes.shape
    groups = scale.shape[1]
    return (codes.reshape(n, groups, k // groups).float() * scale.float().unsqueeze(-1)).reshape(n, k)


def pack_codes(codes: torch.Tensor, num_bits: int) -> torch.Tensor:
    """int8 codes [N, K] to int32 [N, ceil(K · bits / 32)]: code + 2^(bits-1) as unsigned, least significant first."""
    per_word = 32 // num_bits
    unsigned = codes.to(torch.int16) + 2 ** (num_bits - 1)
    octets = F.pad(unsigned, (0, -codes.shape[1] % per_word)).to(torch.uint8)
    if num_bits == 4:
        octets = octets[:, 0::2] | (octets[:, 1::2] << 4)
    words: torch.Tensor = octets.contiguous().view(torch.int32)
    return words


def unpack_codes(packed: torch.Tensor, num_bits: int, k: int) -> torch.Tensor:
    """The inverse of `pack_codes`: int8 [N, k]."""
    octets: torch.Tensor = packed.contiguous().view(torch.uint8)  # [N, words · 4]
    if num_bits == 4:
        octets = torch.stack((octets & 15, octets >> 4), dim=-1).reshape(octets.shape[0], -1)
    codes: torch.Tensor = octets[:, :k].to(torch.int16) - 2 ** (num_bits - 1)
    return codes.to(torch.int8)


def token_scale(x: torch.Tensor) -> torch.Tensor:
    """The dynamic int8 scale of each row. [..., K] to [..., 1]"""
    return absmax_scale(x.detach().abs().amax(-1, keepdim=True), 8)


def fake_quantize(x: torch.Tensor, scale: torch.Tensor | float) -> torch.Tensor:
    """Quantize to int8 and back; the gradient passes straight through inside the range. Shape of x."""
    scaled = x / scale
    rounded: torch.Tensor = scaled + (scaled.round() - scaled).detach()
    return rounded.clamp(-128, 127) * scale
