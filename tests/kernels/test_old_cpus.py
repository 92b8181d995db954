"""The extension on CPUs that this machine is not: emulated ones without AVX-512, and without AVX at all."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

pytest.importorskip("fptq_runtime._native", reason="the native extension is not built")

EMULATOR = shutil.which("qemu-x86_64") or shutil.which("qemu-x86_64-static")
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


@pytest.mark.skipif(EMULATOR is None, reason="qemu-x86_64 (Debian: qemu-user) is not installed")
@pytest.mark.parametrize(("cpu", "isas"), [("Haswell", ["avx2", "generic"]), ("Nehalem", ["generic"])])
def test_dispatches_to_what_the_cpu_has(cpu: str, isas: list[str]) -> None:
    assert EMULATOR is not None
    # numpy's OpenBLAS, left to choose, dies of an illegal instruction on an emulated Nehalem
    run = subprocess.run([EMULATOR, "-cpu", cpu, sys.executable, "-c", PROGRAM], capture_output=True, text=True,
                         timeout=200, env={**os.environ, "OPENBLAS_CORETYPE": "Nehalem"})
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == {"isas": isas, "exact": [True, True, True]}
