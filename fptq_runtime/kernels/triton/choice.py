"""Which kernel and tiles a linear takes: explicit tables, and the split of K.

None of it was timed yet; the reasons stand beside the rows. gpu-check prints the fastest of `sweep` for each case:
what it finds goes into RULES, and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Method = Literal["split", "fused", "expand", "int_mm", "cublas"]
Dot = Literal["int8", "fp8", "bfloat16", "float16", "float32"]
Kind = tuple[Dot, str]  # and the weight's arithmetic, or "float"

PROGRAMS = 384  # about three to each of an H100's 132 multiprocessors
MAX_SEGMENTS = 8
SEGMENT_STEP = 256  # columns: two blocks of the widest kind


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
    """split: a program a segment, then a reduction. fused: a program takes all of K. expand: int8 codes are written
    row by row first, then fused. int_mm: the same, multiplied by cuBLAS. cublas: in bfloat16, by cuBLAS."""

    method: Method
    tile: Tile = Tile(64, 16)


@dataclass(frozen=True)
class Rule:
    """Of the rows of x, of W and its columns, up to and from; the first rule that fits is taken."""

    choice: Choice
    max_m: float = math.inf
    dots: tuple[Dot, ...] = ("int8", "fp8", "bfloat16", "float16")
    arithmetics: tuple[str, ...] = ("row", "two-level", "grouped", "float")
    min_n: int = 0
    min_k: int = 0
    min_capability: int = 90
    invariant: bool = True  # whether all its kind gives a row the same bits


RULES = (
    # IEEE float32 runs on no tensor core: small tiles keep its operands in registers.
    Rule(Choice("split", Tile(64, 16, stages=2)), dots=("float32",), min_capability=0),
)


def choose(kind: Kind, m: int, n: int, k: int, capability: int, invariant: bool) -> Choice:
    dot, arithmetic = kind
    return next(rule.choice for rule in RULES if m <= rule.max_m and dot in rule.dots
                and arithmetic in rule.arithmetics and n >= rule.min_n and k >= rule.min_k
                and capability >= rule.min_capability and (rule.invariant or not invariant))


def segments(n: int, k: int, block: int) -> tuple[int, int]:
    """How many segments of K are summed one by one, and the blocks of each (the last may be shorter).

    A function of the weight's shape alone, since the sum's bits depend on it: as many as give PROGRAMS programs of 64
    rows, a power of two, none under 512 columns.
    """
    wanted = PROGRAMS // -(-n // 64)
    count = min(1 << max(wanted.bit_length() - 1, 0), MAX_SEGMENTS, max(k // 512, 1))
    length = -(-k // (count * SEGMENT_STEP)) * SEGMENT_STEP
    return -(-k // length), length // block
