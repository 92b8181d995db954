"""What the integer GEMMs reach on one core, for the layer shapes of well-known models.

    python -m benchmarks.kernels [--bits 4] [--group-size 128] [--float-input] [--isa avx512vnni] [--shape llama-3.2-1b]

prints a Markdown table: percent of the multiply peak measured in the same run, by M, N and K; for M = 1 also the rate
at which weights are read. Weights come from memory: each call takes another copy, out of more than the caches hold.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from fptq_runtime import _native
from fptq_runtime.measure.shapes import SHAPES

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512)
COLD_BYTES = 96 << 20
SECONDS = 0.4


def layers(shape: str) -> Iterator[tuple[str, int, int]]:
    """(name, N, K) of a shape's linears, of one expert where there are many."""
    model = SHAPES[shape]
    for part in (model.blocks[0], model.head):
        for linear in part.linears:
            if not linear.kept:
                yield {"up": "gate, up"}.get(linear.name, linear.name), linear.n // linear.experts, linear.k


def seconds(call: Callable[[int], None], copies: int) -> float:
    """Median seconds of call(copy), each copy in turn."""
    call(0)
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < 3 or time.perf_counter() - start < SECONDS:
        begin = time.perf_counter()
        call(len(times) % copies)
        times.append(time.perf_counter() - begin)
    return float(np.median(times))


def row(n: int, k: int, bits: int, group_size: int, float_input: bool, isa: str, peak: float
        ) -> tuple[float, list[float]]:
    """GB/s of weights at M = 1, and percent of peak for each of ROWS."""
    generator = np.random.default_rng(0)
    limit = 2 ** (bits - 1)
    codes = generator.integers(-limit, limit, (n, k), dtype=np.int8)
    group = group_size if group_size and k % group_size == 0 else k
    scale = np.full((n, k // group), 2.0**-7, np.float32)
    size = n * k * bits / 8 + 2 * scale.size
    copies = max(2, -(-COLD_BYTES // int(size)))
    weights = [_native.pack_weight(codes, scale, group, bits) for _ in range(copies)]
    gemm: Any = _native.gemm_float if float_input else _native.gemm
    percents = []
    for m in ROWS:
        rows, out = generator.standard_normal((m, k), dtype=np.float32), np.empty((m, n), np.float32)
        x = rows if float_input else _native.QuantizedRows(rows, isa=isa)
        took = seconds(lambda copy, x=x, out=out: gemm(weights[copy], x, out, isa=isa), copies)  # type: ignore[misc]
        percents.append(2e-7 * m * n * k / took / peak)
        if m == 1:
            rate = 1e-9 * size / took
    return rate, percents


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, choices=(4, 8), default=4)
    parser.add_argument("--group-size", type=int, default=128, help="0: one scale per channel")
    parser.add_argument("--float-input", action="store_true", help="float activations, instead of int8 ones")
    parser.add_argument("--isa", choices=_native.available_isas(), default=_native.available_isas()[0])
    parser.add_argument("--shape", choices=tuple(SHAPES), action="append", help="default: all; may be repeated")
    options = parser.parse_args()
    pool = _native.ThreadPool(1)
    peak, bandwidth = _native.peak_gops(pool, options.isa), _native.read_bandwidth(pool)
    print(f"One core, {options.isa}: {peak:.0f} GOPS, {bandwidth:.1f} GB/s read. int{options.bits} weights, "
          f"{f'groups of {options.group_size}' if options.group_size else 'one scale per channel'}, "
          f"{'float32' if options.float_input else 'int8'} activations.\n")
    print("| shape | layer | N | K | GB/s at M=1 | " + " | ".join(f"M={m}" for m in ROWS) + " |")
    print("|---|---|" + "--:|" * (3 + len(ROWS)))
    for shape in options.shape or SHAPES:
        for name, n, k in layers(shape):
            rate, percents = row(n, k, options.bits, options.group_size, options.float_input, options.isa, peak)
            print(f"| {shape} | {name} | {n} | {k} | {rate:.1f} | "
                  + " | ".join(f"{percent:.0f} %" for percent in percents) + " |", flush=True)


if __name__ == "__main__":
    main()
