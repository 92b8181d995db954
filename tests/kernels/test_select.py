from __future__ import annotations

import logging
import sys

import pytest

from fptq_runtime.kernels.select import select_backend


def test_native_is_the_default_where_it_is_built() -> None:
    pytest.importorskip("fptq_runtime._native", reason="the native extension is not built")
    assert select_backend(threads=1).name == "native"
    assert select_backend("native", threads=1).name == "native"


def test_reference_stands_in_where_it_is_not(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "fptq_runtime.kernels.cpu", None)
    with caplog.at_level(logging.WARNING):
        assert select_backend().name == "reference"
    assert "pip install ." in caplog.text
    with pytest.raises(ValueError, match="pip install") as caught:
        select_backend("native")
    assert "\n" not in str(caught.value)


def test_reference_and_unknown_names() -> None:
    assert select_backend("reference").name == "reference"
    with pytest.raises(ValueError, match="'gpu'"):
        select_backend("gpu")
