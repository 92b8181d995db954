"""Every target takes its corpus, which has the inputs that once broke it, and a few changes of each. `make fuzz` looks
for more, guided by coverage."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from tests.fuzz.mutator import Mutator
from tests.fuzz.targets import TARGETS

pytest.importorskip("fptq_runtime._native", reason="the native extension is not built")

CORPUS = Path(__file__).parent / "corpus"
CHANGES = int(os.environ.get("FPTQ_FUZZ_CHANGES", 1))


@pytest.mark.parametrize("name", TARGETS)
def test_what_comes_in_is_taken_or_refused(name: str, tmp_path: Path) -> None:
    target = TARGETS[name]
    run = target.start(tmp_path)
    files = sorted((CORPUS / name).iterdir())
    assert files
    for file in files:
        data = file.read_bytes()
        run(data)
        for seed in range(CHANGES):
            try:
                changed = target.mutate(Mutator(random.Random(f"{file.name} {seed}")), data)
            except (ValueError, RecursionError):  # nothing that can be written
                continue
            run(changed)
