"""The kernels and the thread pool under address, undefined-behaviour and thread sanitizers, built without Python."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPILER = os.environ.get("CXX", "c++")


def run(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_clean(sanitizers: str, tmp_path: Path) -> None:
    if shutil.which("cmake") is None or shutil.which(COMPILER) is None:
        pytest.skip("cmake or a C++ compiler is not installed")
    source, trivial = tmp_path / "trivial.cpp", tmp_path / "trivial"
    source.write_text("int main() {}\n")
    built = run(COMPILER, f"-fsanitize={sanitizers}", source, "-o", trivial)
    if built.returncode or run(trivial).returncode:
        pytest.skip(f"{COMPILER} has no working runtime for -fsanitize={sanitizers}")
    build = tmp_path / "build"
    for command in (
        ("cmake", "-S", ROOT, "-B", build, f"-DFPTQ_SANITIZE={sanitizers}", f"-DPython_EXECUTABLE={sys.executable}"),
        ("cmake", "--build", build, "--parallel", "--target", "sanitize"),
        (build / "sanitize",),
    ):
        result = run(*command)
        assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout == "clean\n"
