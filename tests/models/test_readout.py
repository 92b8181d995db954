"""The file that says how a rotated artifact's hidden states are turned back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fptq_runtime.errors import FptqError
from fptq_runtime.models.readout import Readout


def test_it_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = Readout(np.ones(12, np.float32), np.full(12, -1, np.float32), np.eye(3, dtype=np.float32))
    (tmp_path / "fptq.readout").write_bytes(written.to_bytes())
    for name, array in vars(Readout.read(tmp_path / "fptq.readout", 12)).items():
        np.testing.assert_array_equal(array, vars(written)[name])


@pytest.mark.parametrize("content", [b"", b"\xff" * 100, "short", "other", "wide"])
def test_another_file_is_refused_by_name(tmp_path: Path, content: bytes | str) -> None:
    ones = np.ones(12, np.float32)
    made = {
        "short": Readout(ones, ones[:8], np.eye(3, dtype=np.float32)),
        "other": Readout(ones, ones, np.eye(4, dtype=np.float32)),
        "wide": Readout(ones.astype(np.float64), ones, np.eye(3, dtype=np.float32)),
    }
    path = tmp_path / "fptq.readout"
    path.write_bytes(content if isinstance(content, bytes) else made[content].to_bytes())
    with pytest.raises(FptqError, match=r"fptq\.readout"):
        Readout.read(path, 12)
