"""The native boundary survives whatever it is called with. `make fuzz` makes more calls."""

from __future__ import annotations

import ast
import os
import subprocess
import sys

import pytest

pytest.importorskip("fptq_runtime._native", reason="the native extension is not built")

CALLS = int(os.environ.get("FPTQ_FUZZ_CALLS", 4000))


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(int(os.environ.get("FPTQ_FUZZ_SEEDS", 2))))
def test_random_calls_return_or_are_refused(seed: int) -> None:
    done = subprocess.run([sys.executable, "-m", "tests.fuzz.native", str(seed), str(CALLS)], capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr[-6000:]
    outcomes = ast.literal_eval(done.stdout)
    assert outcomes["returned"] > CALLS / 10
    assert outcomes["ValueError"] > CALLS / 100
