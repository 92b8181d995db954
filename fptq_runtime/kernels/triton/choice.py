"""Which kernel and tiles a linear takes: explicit tables, the split of K, and what to time them with.

None of it was timed yet; the reasons stand beside the rows. gpu-check times `sweep` on `linear_cases`; what it finds
goes into RULES and nowhere else: no rule of an invariant method can change a bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from fptq_runtime.errors import FptqError
from fptq_runtime.kernels.triton.packing import Codes

Method = Literal["split", "fused", "int_mm", "cublas"]
Dot = Literal["int8", "fp8", "bfloat16", "float16", "float32"]

LARGE_SHARED_MEMORY = (90, 100, 103)  # 227 KiB; of the other capabilities from 8.0 on some have 99
PROGRAMS = 384  # about three to each of an H100's 132 multiprocessors
MAX_SEGMENTS = 8
SEGMENT_STEP = 256  # columns: two blocks of the widest kind


@dataclass(frozen=True)
class Kind:
    """What is multiplied, and how the weight is scaled ("float" has no scales)."""

    dot: Dot
    arithmetic: Literal["row", "two-level", "grouped", "float"]


@dataclass(frozen=True)
class Tile:
    """What a program computes and how: rows of W, columns (rows of x), blocks of K a turn of the loop."""

    rows: int
    cols: int
    warps: int = 4
    stages: int = 4
    unroll: int = 1


@dataclass(frozen=True)
class Choice:
    """split: a program a segment of K, then a reduction. fused: a program takes all of K. int_mm: codes times
    multipliers are written as int8 first, then multiplied by cuBLAS. cublas: dequantized to bfloat16 and multiplied by
    cuBLAS, whose order of additions depends on M; all others give the same bits."""

    method: Method
    tile: Tile = Tile(64, 16)


@dataclass(frozen=True)
class Rule:
    """Fits up to max_m rows of x, from min_n rows and min_k columns of W, from a device's capability."""

    choice: Choice
    dots: tuple[Dot, ...]
    arithmetics: tuple[str, ...] = ("row", "two-level", "grouped", "float")
    max_m: float = math.inf
    min_n: int = 0
    min_k: int = 0
    min_capability: int = 90

    def fits(self, kind: Kind, m: int, n: int, k: int, capability: int, invariant: bool) -> bool:
        return (kind.dot in self.dots and kind.arithmetic in self.arithmetics and m <= self.max_m and n >= self.min_n
                and k >= self.min_k and capability >= self.min_capability
                and not (invariant and self.choice.method == "cublas"))


_BYTES: tuple[Dot, ...] = ("int8", "fp8")
_HALVES: tuple[Dot, ...] = ("bfloat16", "float16")

RULES = (  # the first that fits
    # Decode is bound by the weights' bytes. 64 rows a program, K split, keep every multiprocessor at several programs,
    # 24 KiB of loads in flight in each; two blocks a turn wait for their scales once.
    Rule(Choice("split", Tile(64, 16, unroll=2)), _BYTES, ("grouped", "two-level"), max_m=16),
    Rule(Choice("split", Tile(64, 16)), (*_BYTES, *_HALVES), max_m=16),
    Rule(Choice("split", Tile(64, 32, unroll=2)), _BYTES, ("grouped", "two-level"), max_m=32),
    Rule(Choice("split", Tile(64, 32)), (*_BYTES, *_HALVES), max_m=32),
    # A program reads rows · K of W and cols · K of x from L2: 128 rows halve x's part where that is the larger.
    Rule(Choice("split", Tile(128, 64)), _BYTES, max_m=64),
    Rule(Choice("split", Tile(64, 64)), _HALVES, max_m=64),
    # Widened codes, both as registers and as bfloat16, leave room for half a tile.
    Rule(Choice("split", Tile(128, 64, 8, 3)), _HALVES, ("grouped", "two-level"), max_m=256),
    Rule(Choice("fused", Tile(128, 64, 8, 3)), _HALVES, ("grouped", "two-level")),
    # Splitting K still fills the device where M · N has fewer than 132 tiles.
    Rule(Choice("split", Tile(128, 128, 8, 3)), (*_BYTES, *_HALVES), max_m=256),
    # Large M is bound by arithmetic and L2. One integer sum a row needs one accumulator, multipliers or not: 128 · 256
    # halves L2's part.
    Rule(Choice("fused", Tile(128, 256, 8, 3)), ("int8",), ("row", "two-level")),
    # cuBLAS where a row's bits may depend on M: it is the roof of a float product.
    Rule(Choice("cublas"), _HALVES, ("float",), min_capability=80),
    # Three accumulators (group, segment, total) fill the registers at 128 · 128. Converting and scaling 128 · 128
    # int32 takes about 400 cycles a group beside the dot's 512: half of int8's peak, all of bfloat16's.
    Rule(Choice("fused", Tile(128, 128, 8, 3)), (*_BYTES, *_HALVES)),
    # Ampere and Ada: mma.sync, 99 KiB of shared memory.
    Rule(Choice("split", Tile(64, 16, unroll=2)), _BYTES, ("grouped", "two-level"), max_m=16, min_capability=80),
    Rule(Choice("split", Tile(64, 16)), (*_BYTES, *_HALVES), max_m=16, min_capability=80),
    Rule(Choice("split", Tile(64, 32, stages=3)), _HALVES, ("grouped", "two-level"), max_m=256, min_capability=80),
    Rule(Choice("fused", Tile(64, 32, stages=3)), _HALVES, ("grouped", "two-level"), min_capability=80),
    Rule(Choice("split", Tile(64, 64, stages=3)), (*_BYTES, *_HALVES), max_m=256, min_capability=80),
    Rule(Choice("fused", Tile(64, 64, stages=3)), (*_BYTES, *_HALVES), min_capability=80),
    # IEEE float32 runs on no tensor core.
    Rule(Choice("fused", Tile(64, 16, stages=2)), ("float32",), min_capability=0),
)


def choose(kind: Kind, m: int, n: int, k: int, capability: int, invariant: bool) -> Choice:
    """capability: 10 · major + minor. Raises FptqError where a device is too old."""
    if capability > 89 and capability not in LARGE_SHARED_MEMORY:
        capability = 89
    for rule in RULES:
        if rule.fits(kind, m, n, k, capability, invariant):
            return rule.choice
    raise FptqError(f"no kernel multiplies {kind.dot} on a device of capability {capability / 10}; 8.0 is needed")


def segments(n: int, k: int) -> tuple[int, int]:
    """How many segments of K are summed one by one, and the columns of each (the last may be shorter).

    A function of the weight's shape alone, since the sum's bits depend on it: as many as give PROGRAMS programs of 64
    rows, a power of two, none under 512 columns.
    """
    wanted = PROGRAMS // -(-n // 64)
    count = min(1 << max(wanted.bit_length() - 1, 0), MAX_SEGMENTS, max(k // 512, 1))
    length = -(-k // (count * SEGMENT_STEP)) * SEGMENT_STEP
    return -(-k // length), length


@dataclass(frozen=True)
class Case:
    """One product to time: [m, k] times a weight [n, k], int8 inputs with a scale a token."""

    name: str
    m: int
    n: int
    k: int
    codes: Codes = "int4"
    group_size: int | None = 128  # None: a scale a row
    two_level: bool = False  # groups have integer multipliers of a row's scale

    @property
    def multiply_adds(self) -> int:
        return self.m * self.n * self.k

    @property
    def weight_bytes(self) -> int:
        """Codes, and scales: bfloat16 of a group, int8 multipliers, float32 of a row."""
        bits = 4 if self.codes in ("int4", "fp4") else 8
        groups = 0 if self.group_size is None else self.k // self.group_size
        scales = groups + 4 if self.two_level else 2 * groups or 4
        return self.n * (self.k * bits // 8 + scales)

    @property
    def bytes(self) -> int:
        """Read and written at least: the weight, x and its scales, float32 y."""
        return self.weight_bytes + self.m * (self.k + 4) + 4 * self.m * self.n


LLAMA_3_8B = (  # name, N, K
    ("qkv", 6144, 4096), ("o", 4096, 4096), ("up", 28672, 4096), ("down", 4096, 14336), ("lm_head", 128256, 4096),
)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


def linear_cases(shapes: Sequence[tuple[str, int, int]] = LLAMA_3_8B, rows: Sequence[int] = ROWS,
                 two_level: bool = False) -> list[Case]:
    """int4 in groups of 128; the head int8 with a scale a row, and no more than 256 rows of it."""
    return [Case(name, m, n, k, "int8", None) if name == "lm_head" else Case(name, m, n, k, two_level=two_level)
            for name, n, k in shapes for m in rows if name != "lm_head" or m <= 256]


def sweep(kind: Kind, m: int, n: int, k: int, capability: int) -> Iterator[Choice]:
    """Choices worth timing beside that of the table, which comes first."""
    table = choose(kind, m, n, k, capability, invariant=True)
    yield table
    decode = [Tile(rows, cols, 4, stages, unroll) for rows in (64, 128) for cols in _columns(m, (16, 32, 64))
              for stages, unroll in ((3, 2), (4, 1), (4, 2), (6, 1))]
    large = [Tile(128, 64, 4, 3), Tile(128, 128, 8, 3), Tile(128, 128, 8, 4), Tile(256, 64, 8, 3), Tile(64, 128, 4, 3)]
    if kind.dot != "fp8" and (kind.arithmetic in ("row", "float") or kind == Kind("int8", "two-level")):
        large += [Tile(128, 256, 8, 3), Tile(256, 128, 8, 3)]
    methods: list[Method] = ["split", "fused"] if segments(n, k)[0] > 1 else ["fused"]
    tiles = [*(decode if m <= 64 else ()), *(large if m > 32 else ())]
    found = [Choice(method, tile) for method in methods for tile in tiles]
    if kind.dot == "int8" and m > 256 and kind.arithmetic != "grouped":
        found.append(Choice("int_mm"))
    if m > 64:
        found.append(Choice("cublas"))
    yield from (choice for choice in found if choice != table)


def _columns(m: int, widths: Sequence[int]) -> list[int]:
    """The least that holds m, and the one below."""
    held = next((i for i, width in enumerate(widths) if width >= m), len(widths) - 1)
    return list(widths[max(held - 1, 0) : held + 1])
