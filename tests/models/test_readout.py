"""The file that says what a recipe made of what an artifact's linears read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fptq_runtime.errors import FptqError
from fptq_runtime.models.loader import Checkpoint
from fptq_runtime.models.readout import Bases, Basis, Turn, bases_to_bytes, knows_layers, read_bases
from tests.models.hf import save_random

ONES, EYE = np.ones(96, np.float32), np.eye(3, dtype=np.float32)  # a hidden size of 96 is 32 · 3
HEAD = Basis(ONES * 2, Turn(-ONES, EYE))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("model")
    save_random("llama", path)
    return Checkpoint(path).model


def test_it_is_read_as_it_was_written(model: Any, tmp_path: Path) -> None:
    written: Bases = {("layers.1", "qkv"): Basis(ONES, HEAD.turn, ONES * 3), ("layers.0", "up"): Basis(scales=ONES),
                      ("", "head"): HEAD}
    (tmp_path / "x").write_bytes(bases_to_bytes(written))
    read = read_bases(tmp_path / "x", model)
    assert bases_to_bytes(read) == bases_to_bytes(written) and read.keys() == written.keys()
    assert knows_layers(written) and knows_layers({}) and not knows_layers({("", "head"): HEAD})


@pytest.mark.parametrize("content", [
    b"", b"\xff" * 100, {("layers.9", "qkv"): HEAD}, {("layers.0", "qkv"): Basis(ONES[:8])},
    {("", "head"): Basis(ONES, Turn(ONES, np.eye(4, dtype=np.float32)))},
    {("", "head"): Basis(ONES, Turn(ONES[:64], np.eye(1, dtype=np.float32)))},
    {("", "head"): Basis(ONES, Turn(ONES[:0], EYE))},
])
def test_another_file_is_refused_by_name(content: bytes | Bases, model: Any, tmp_path: Path) -> None:
    path = tmp_path / "fptq.readout"
    path.write_bytes(content if isinstance(content, bytes) else bases_to_bytes(content))
    with pytest.raises(FptqError, match=r"fptq\.readout"):
        read_bases(path, model)
