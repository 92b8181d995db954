"""Directories that prompts can be told from."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from fptq_runtime.private import private_directory


def test_an_open_directory_is_said_and_stays(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    private_directory(tmp_path / "new" / "kv")
    private_directory(tmp_path / "new" / "kv")
    assert stat.S_IMODE((tmp_path / "new" / "kv").stat().st_mode) == 0o700
    assert not caplog.records
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o750)
    private_directory(tmp_path / "shared")
    [record] = caplog.records
    assert record.getMessage().startswith(f"{tmp_path / 'shared'} is open to other users (mode 750)")
    assert stat.S_IMODE((tmp_path / "shared").stat().st_mode) == 0o750
