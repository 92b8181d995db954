"""The kernels on CPUs that this machine is not: emulated ones without AVX-512, and without AVX at all."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("fptq_runtime._native", reason="the native extension is not built")

EMULATOR = shutil.which("qemu-x86_64-static") or shutil.which("qemu-x86_64")
ROOT = Path(__file__).parents[2]
PROGRAM = """
import json
import numpy as np
import fptq_runtime._native as native

def exact(bits, group):
    n, k, m = 70, 300 if group is None else 256, 7
    generator = np.random.default_rng(0)
    limit = 2 ** (bits - 1)
    codes = generator.integers(-limit, limit, (n, k)).astype(np.int8)
    scale = np.ones((n, 1 if group is None else k // group), np.float32)
    x = generator.integers(-127, 128, (m, k)).astype(np.float32)
    out = np.zeros((m, n), np.float32)
    weight = native.pack_weight(codes, scale, group or k, bits)
    native.gemm(weight, native.QuantizedRows(x, 1.0), out)
    return bool((out.astype(np.int64) == x.astype(np.int64) @ codes.T.astype(np.int64)).all())

print(json.dumps({"isas": native.available_isas(), "exact": [exact(4, 128), exact(4, 32), exact(8, None)]}))
"""


pytestmark = pytest.mark.skipif(EMULATOR is None, reason="qemu-x86_64 (Debian: qemu-user) is not installed")

OPS = ["tests/kernels/test_ops.py", "-k", "not any_options and not random"]
BITS = ["tests/kernels/triton/test_linear.py", "-k", "same_bits and (int4-128-none or bfloat16-None-none)"]


def on(cpu: str, *arguments: str) -> str:
    """What Python prints there. Its BLAS is the one for that CPU, whatever this machine's is told to be."""
    assert EMULATOR is not None
    run = subprocess.run([EMULATOR, "-cpu", cpu, sys.executable, *arguments], capture_output=True, text=True,
                         timeout=560, cwd=ROOT,
                         env={name: value for name, value in os.environ.items() if not name.startswith("OPENBLAS_")})
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


@pytest.mark.parametrize(("cpu", "isas"), [
    ("Haswell", ["avx2", "generic"]), ("EPYC-Milan", ["avx2", "generic"]), ("Nehalem", ["generic"])])
def test_dispatches_to_what_the_cpu_has(cpu: str, isas: list[str]) -> None:
    assert json.loads(on(cpu, "-c", PROGRAM)) == {"isas": isas, "exact": [True, True, True]}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("cpu", "tests"), [
    ("Haswell", OPS), ("Nehalem", OPS), ("Nehalem", BITS), ("EPYC-Milan", BITS),
], ids=["Haswell-ops", "Nehalem-ops", "Nehalem-bits", "EPYC-Milan-bits"])
def test_tests_of_kernels_pass(cpu: str, tests: list[str]) -> None:
    """The ops, and what depends on the order in which numpy's BLAS adds on that CPU."""
    assert " passed" in on(cpu, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests)
