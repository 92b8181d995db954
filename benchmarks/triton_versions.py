"""Runs the tests of the Triton backend, what kernels compile to included, with several versions of Triton: the oldest
that is taken, the one that torch pins, and the newest. python -m benchmarks.triton_versions [VERSION...] [-- PYTEST...]

Each is installed into a directory of its own, and nothing else is.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
VERSIONS = ("==3.6.0", "==3.7.1", "")
TESTS = ("tests/kernels/triton", "-q")


def run(version: str, tests: Sequence[str], directory: Path) -> bool:
    """Whether the tests pass. version: as pip has it behind the name."""
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", directory,
                    f"triton{version}"], check=True)
    search = os.pathsep.join([str(directory), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run([sys.executable, "-m", "pytest", *tests], cwd=ROOT, check=False,
                          env={**os.environ, "PYTHONPATH": search, "TRITON_CACHE_DIR": str(directory / "cache")})
    return done.returncode == 0


def main(arguments: Sequence[str]) -> int:
    split = arguments.index("--") if "--" in arguments else len(arguments)
    failed = []
    for version in arguments[:split] or VERSIONS:
        with tempfile.TemporaryDirectory() as directory:
            print(f"== triton{version or ', the newest'}", flush=True)
            if not run(version, arguments[split + 1 :] or TESTS, Path(directory)):
                failed.append(version or "the newest")
    print(f"failed with {', '.join(failed)}" if failed else "all pass")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
