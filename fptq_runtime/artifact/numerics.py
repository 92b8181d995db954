"""The format's executable specification in plain torch: every rounding, scale and bit position.

Codes are numbers on a grid. "int": -2^(b-1) to 2^(b-1) - 1, held in int8. "float": FP4 E2M1 (0, ½, 1, 1½, 2, 3, 4, 6
and their negatives; OCP Microscaling Formats 1.0) or FP8 E4M3 (to ±448), both held in float8_e4m3fn, which has every
E2M1 value. scale = max|x| / half the grid's width, as in compressed-tensors (`calculate_qparams`): 7.5 and 127.5 for
integers of 4 and 8 bits, 6 and 448 for floats.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

from fptq_runtime.artifact.scheme import NumberType

ScaleRule = Literal["float", "m1", "m2", "two-level"]
LEVELS = 15  # times an int4 code fits int8

_SMALLEST_SCALE = torch.finfo(torch.float32).eps  # of an all-zero group, so that nothing divides by zero
_SMALLEST_RANGE = 2.0**-120  # under a power of two: keeps bfloat16 scales normal
_E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])  # by the code's lower three bits; the fourth is the sign


def code_range(num_bits: int, type: NumberType) -> tuple[float, float]:
    """The least and the largest code."""
    if type == "int":
        limit = 2 ** (num_bits - 1)
        return -limit, limit - 1
    largest = {4: 6.0, 8: 448.0}[num_bits]
    return -largest, largest


def absmax_scale(amax: torch.Tensor, num_bits: int, type: NumberType = "int") -> torch.Tensor:
    """The scale that a largest magnitude asks for. Any shape; float32."""
    low, high = code_range(num_bits, type)
    scale = amax.float() / ((high - low) / 2)
    return torch.where(scale == 0, torch.full_like(scale, _SMALLEST_SCALE), scale)


def power_of_two_scale(amax: torch.Tensor, num_bits: int, type: NumberType, rule: Literal["m1", "m2"]) -> torch.Tensor:
    """ZeroQuant-FP's scales (arXiv 2307.09782), never below what amax [N, G] asks for; exact in bfloat16.

    m1: each the least power of two. m2: the largest of a row as it is, the others that one times the least 2^-k.
    """
    low, high = code_range(num_bits, type)
    limit = (high - low) / 2
    amax = amax.double().clamp_min(_SMALLEST_RANGE)
    unit = torch.ones_like(amax)
    if rule == "m2":
        row = amax.amax(-1, keepdim=True)
        nearest = (row / limit).bfloat16()
        short = limit * nearest.double() < row
        unit = (nearest.view(torch.int16) + short).view(torch.bfloat16).double()  # the next bfloat16 where it is short
    mantissa, exponent = torch.frexp(amax)
    unit_mantissa, unit_exponent = torch.frexp(limit * unit)
    exponent = exponent - unit_exponent + (mantissa > unit_mantissa)  # the least with amax <= limit · unit · 2^exponent
    power = (exponent.long() + 1023 << 52).view(torch.float64)  # torch.exp2 may be a bit off
    return (unit * power).float()


def two_level_scale(amax: torch.Tensor, num_bits: int) -> torch.Tensor:
    """Integers from 1 to LEVELS times a unit of the row, so that codes times integers fit int8 and a product over all
    of K is one sum of integers (QServe's second level, arXiv 2405.04532). Never below what amax [N, G] asks for; exact
    in bfloat16, for the unit has four significant bits."""
    low, high = code_range(num_bits, "int")
    wanted = amax.double().clamp_min(_SMALLEST_RANGE) / ((high - low) / 2)
    mantissa, exponent = torch.frexp(wanted.amax(-1, keepdim=True) / LEVELS)
    unit = torch.ldexp((mantissa * 16).ceil() / 16, exponent)
    return ((wanted / unit).ceil().clamp_max(LEVELS) * unit).float()


def quantize(x: torch.Tensor, scale: torch.Tensor, num_bits: int, type: NumberType = "int") -> torch.Tensor:
    """The nearest codes to x / scale within the grid, half to even (floats: to the even mantissa). scale broadcasts
    against x."""
    low, high = code_range(num_bits, type)
    scaled = x.float() / scale
    if type == "int":
        return scaled.round().clamp_(low, high).to(torch.int8)
    scaled = scaled.clamp(low, high)
    return (_round_e2m1(scaled) if num_bits == 4 else scaled).to(torch.float8_e4m3fn)


def quantize_weight(
    weight: torch.Tensor,  # [N, K]
    num_bits: int,
    group_size: int | None,
    clip: torch.Tensor | None = None,  # [N, G], fractions of max|w|
    scale_dtype: torch.dtype = torch.float32,
    type: NumberType = "int",
    scales: ScaleRule = "float",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [N, K] and scale [N, G] in scale_dtype; group_size None is per channel (G = 1).

    Codes are computed against the stored, rounded scale. Raises ValueError where K is not a multiple of the group.
    """
    n, k = weight.shape
    group = k if group_size is None else group_size
    if k % group:
        raise ValueError(f"{k} input features are not a multiple of the group size {group}")
    grouped = weight.float().reshape(n, k // group, group)
    amax = grouped.abs().amax(-1)
    amax = amax if clip is None else amax * clip
    match scales:
        case "float":
            scale = absmax_scale(amax, num_bits, type)
        case "two-level":
            scale = two_level_scale(amax, num_bits)
        case _:
            scale = power_of_two_scale(amax, num_bits, type, scales)
    scale = scale.to(scale_dtype)
    scale = torch.where(scale == 0, torch.full_like(scale, _SMALLEST_SCALE), scale)  # too small for its type
    codes = quantize(grouped, scale.float().unsqueeze(-1), num_bits, type)
    return codes.reshape(n, k), scale


def dequantize(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """codes [N, K] · scale [N, G], each scale over K / G neighbours. float32 [N, K]."""
    n, k = codes.shape
    groups = scale.shape[1]
    return (codes.reshape(n, groups, k // groups).float() * scale.float().unsqueeze(-1)).reshape(n, k)


def pack_codes(codes: torch.Tensor, num_bits: int) -> torch.Tensor:
    """Codes [N, K] as they are stored.

    int: int32 [N, ceil(K · bits / 32)], code + 2^(bits-1) as unsigned, least significant first. FP4: uint8
    [N, ceil(K / 2)], sign, two bits of exponent and one of mantissa, the even columns in the low nibbles. FP8: as is.
    """
    if codes.dtype == torch.float8_e4m3fn:
        return codes if num_bits == 8 else _pack_e2m1(codes.float())
    per_word = 32 // num_bits
    unsigned = codes.to(torch.int16) + 2 ** (num_bits - 1)
    octets = F.pad(unsigned, (0, -codes.shape[1] % per_word)).to(torch.uint8)
    if num_bits == 4:
        octets = octets[:, 0::2] | (octets[:, 1::2] << 4)
    words: torch.Tensor = octets.contiguous().view(torch.int32)
    return words


def unpack_codes(packed: torch.Tensor, num_bits: int, k: int) -> torch.Tensor:
    """The inverse of `pack_codes`: codes [N, k]."""
    if packed.dtype == torch.float8_e4m3fn:
        return packed
    octets: torch.Tensor = packed.contiguous().view(torch.uint8)
    if num_bits == 4:
        octets = torch.stack((octets & 15, octets >> 4), dim=-1).reshape(octets.shape[0], -1)
    octets = octets[:, :k]
    codes: torch.Tensor = (
        torch.cat((_E2M1, -_E2M1)).to(torch.float8_e4m3fn)[octets.int()]
        if packed.dtype == torch.uint8
        else (octets - 2 ** (num_bits - 1)).view(torch.int8)  # modulo 256, and two's complement is too
    )
    return codes


def token_scale(x: torch.Tensor, type: NumberType = "int") -> torch.Tensor:
    """The dynamic 8-bit scale of each row. [..., K] to [..., 1]"""
    return absmax_scale(x.detach().abs().amax(-1, keepdim=True), 8, type)


def fake_quantize(x: torch.Tensor, scale: torch.Tensor | float, type: NumberType = "int") -> torch.Tensor:
    """Quantize to 8 bits and back; the gradient passes straight through inside the range. Shape of x."""
    low, high = code_range(8, type)
    scaled: torch.Tensor = x / scale
    if type == "int" and not scaled.requires_grad:
        return scaled.round_().clamp_(low, high).mul_(scale)
    if type == "float":
        scaled = scaled.clamp(low, high)  # first: the cast makes NaN of what is beyond
    nearest = scaled.round() if type == "int" else scaled.to(torch.float8_e4m3fn).to(scaled.dtype)
    rounded: torch.Tensor = scaled + (nearest - scaled).detach()
    return rounded.clamp(low, high) * scale


def _round_e2m1(x: torch.Tensor) -> torch.Tensor:
    """The grid is half a unit wide below 2, one below 4, two above. x within ±6."""
    magnitude = x.abs()
    step = 0.5 + 0.5 * (magnitude >= 2) + (magnitude >= 4)
    return ((magnitude / step).round() * step).copysign(x)


def _pack_e2m1(values: torch.Tensor) -> torch.Tensor:
    codes = torch.bucketize(values.abs(), _E2M1).byte() | (values.signbit().byte() << 3)
    codes = F.pad(codes, (0, codes.shape[1] % 2))
    return codes[:, 0::2] | (codes[:, 1::2] << 4)
