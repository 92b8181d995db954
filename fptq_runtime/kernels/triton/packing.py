"""How a linear layer's weights lie in device memory.

Quantized weights are cut into tiles of 64 rows and blocks along K, zero-padded to whole ones, and lie in the order
[tile][block][row of the tile][WIDTH bytes]: what one program of the kernel reads is one contiguous stream, and a row's
bytes of a block are 32, 64 or 128 of them, aligned. 8 bits: a byte is a weight, a block is `width` columns. 4 bits: a
block is 2 · `width` columns, byte j holds column j in its low nibble and column width + j in its high one, so that
either half is unpacked by masks alone and multiplies a contiguous slice of x. Integers are two's complement, floats
E2M1 and E4M3 as in artifact/numerics.py. Scales lie [tile][group][row of the tile] in the checkpoint's own dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from fptq_runtime.errors import FptqError
from fptq_runtime.kernels.base import QuantizedWeight
from fptq_runtime.kernels.reference import to_torch

Codes = Literal["int4", "int8", "fp4", "fp8"]
Arithmetic = Literal["row", "two-level", "grouped"]

TILE = 64
MAX_K = 2**17 - 1  # |Σ| <= 2^14 · K in the int32 accumulators: 4-bit codes are multiplied by 16
MAX_MULTIPLIER = 15  # times a code, -8 to 7, fits int8
_CHUNK = 1 << 26  # weights unpacked at a time


@dataclass(frozen=True)
class PackedWeight:
    """W[n, k] = codes[n, k] · scale.

    arithmetic: "row", one scale a row; "grouped", one for each group; "two-level", one a row times an integer a
    group. Products with int8 inputs are exact integers over all of K for "row" and "two-level", over a group for
    "grouped".
    """

    codes: Codes
    arithmetic: Arithmetic
    n: int
    k: int
    width: int  # bytes of a row in a block: columns of one dot
    group_size: int  # a multiple of width; k where scales are a row's
    values: torch.Tensor  # uint8 [tiles, blocks, 64, width]
    scale: torch.Tensor  # grouped: [tiles, groups, 64]; else float32 [tiles, 1, 64]
    multiplier: torch.Tensor | None = None  # two-level: int8 [tiles, groups, 64]

    @property
    def dots(self) -> int:
        """Slices of x that a block multiplies."""
        return 2 if self.codes in ("int4", "fp4") else 1

    @property
    def block(self) -> int:
        """Columns of a block."""
        return self.width * self.dots

    @property
    def nbytes(self) -> int:
        """Read for one product."""
        tensors = [self.values, self.scale] + ([] if self.multiplier is None else [self.multiplier])
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def pack_weight(name: str, weight: QuantizedWeight, device: torch.device) -> PackedWeight:
    """Packs on the device; beside the result it needs the packed checkpoint tensor and 2^26 weights there. Raises
    FptqError, by the layer's name, for a group or a K that the kernels do not take."""
    scale = to_torch(weight.scale).to(device)
    n, k, group = scale.shape[0], weight.k, weight.group_size
    if k > MAX_K:
        raise FptqError(f"{name}: K must be at most {MAX_K}, not {k}")
    if group != k and group % 32:
        raise FptqError(f"{name}: the Triton backend takes groups of a multiple of 32, not {group}; use the reference "
                        "backend")
    four_bits, integer = weight.num_bits == 4, weight.type == "int"
    codes: Codes = ("int4" if integer else "fp4") if four_bits else ("int8" if integer else "fp8")
    arithmetic: Arithmetic = "row" if group == k else "grouped"
    multiplier = None
    if arithmetic == "grouped" and codes == "int4" and (levels := two_levels(scale)) is not None:
        arithmetic, (scale, multiplier) = "two-level", levels
    whole = group == k
    widths = (64, 32) if four_bits else (128, 64, 32)
    width = widths[0] if whole else next(width for width in widths if group % width == 0)
    block = width * (2 if four_bits else 1)
    blocks = -(-k // block)
    packed = to_torch(weight.packed).to(device)
    values = torch.empty((-(-n // TILE), blocks, TILE, width), dtype=torch.uint8, device=device)
    step = max(TILE, _CHUNK // (blocks * block) // TILE * TILE)
    for first in range(0, n, step):
        tiles = _tiles(_unsigned(packed[first : first + step], weight.num_bits, k, integer), blocks * block)
        octets = tiles.reshape(len(tiles), TILE, blocks, -1)
        if four_bits:
            octets = octets[..., :width] | (octets[..., width:] << 4)
        values[first // TILE : first // TILE + len(tiles)] = octets.transpose(1, 2)
    groups = 1 if arithmetic == "row" else (blocks * block - 1) // group + 1
    return PackedWeight(
        codes, arithmetic, n, k, width, group, values,
        _row_scales(scale) if arithmetic != "grouped" else _group_tiles(scale, groups),
        None if multiplier is None else _group_tiles(multiplier, groups),
    )


def two_levels(scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """[N, G] as [N, 1] · int8 [N, G] of 1 to 15, exactly; None where that is not what the scales are.

    A row's unit is its least scale over an integer from 1 to 15: the first at which all others are whole, too.
    """
    exact = scale.double()
    least = exact.amin(1, keepdim=True)
    if not bool((least > 0).all()) or bool((exact > least * MAX_MULTIPLIER).any()):
        return None
    unit, multiplier = torch.zeros_like(least, dtype=torch.float32), torch.zeros_like(scale, dtype=torch.int8)
    found = torch.zeros_like(least, dtype=torch.bool)
    for divisor in range(1, MAX_MULTIPLIER + 1):
        candidate = (least / divisor).float()
        whole = (exact / candidate.double()).round()
        fits = (whole <= MAX_MULTIPLIER) & (whole * candidate.double() == exact)
        new = fits.all(1, keepdim=True) & ~found
        unit, multiplier = torch.where(new, candidate, unit), torch.where(new, whole.to(torch.int8), multiplier)
        found |= new
    return (unit, multiplier) if bool(found.all()) else None


def _unsigned(packed: torch.Tensor, num_bits: int, k: int, integer: bool) -> torch.Tensor:
    """Checkpoint rows as one code a byte, the bits as the kernels read them. uint8 [rows, k]"""
    octets = packed.contiguous().view(torch.uint8)
    if num_bits == 4:
        octets = torch.stack((octets & 15, octets >> 4), dim=-1).reshape(octets.shape[0], -1)
    octets = octets[:, :k]
    return octets ^ (1 << (num_bits - 1)) if integer else octets  # code + 2^(bits-1) to two's complement


def _tiles(octets: torch.Tensor, k: int) -> torch.Tensor:
    """Zero-padded to whole tiles of `k` columns. [tiles, 64, k]"""
    rows, columns = octets.shape
    padded = octets.new_zeros((-(-rows // TILE), TILE, k))
    padded.view(-1, k)[:rows, :columns] = octets
    return padded


def _group_tiles(values: torch.Tensor, groups: int) -> torch.Tensor:
    """[N, G] to [tiles, groups, 64], padded with zeros."""
    return _tiles(values, groups).transpose(1, 2).contiguous()


def _row_scales(scale: torch.Tensor) -> torch.Tensor:
    """[N, 1] to float32 [tiles, 1, 64]"""
    return _tiles(scale.float(), 1).reshape(-1, 1, TILE)
