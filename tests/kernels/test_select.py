from __future__ import annotations

import logging
import sys

import pytest

from fptq_runtime.artifact.scheme import LayerScheme, QuantizationArgs
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


def schemes(*types: str) -> dict[str, LayerScheme]:
    """By layer, weights of each type, per channel, and float activations."""
    made = {f"layers.{i}.o_proj": LayerScheme(QuantizationArgs(num_bits=8, strategy="channel"), None)
            for i in range(len(types))}
    for scheme, type_ in zip(made.values(), types, strict=True):
        object.__setattr__(scheme.weights, "type", type_)
    return made


def test_reference_stands_in_where_native_has_no_kernel(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("fptq_runtime._native", reason="the native extension is not built")
    with caplog.at_level(logging.WARNING):
        assert select_backend("auto", 1, schemes("int", "int")).name == "native"
        assert not caplog.records
        assert select_backend("auto", 1, schemes("int", "float", *["float"] * 4)).name == "reference"
    assert "slow" in caplog.text
    assert "layers.1.o_proj, layers.2.o_proj, layers.3.o_proj and 2 more" in caplog.text
    with pytest.raises(ValueError, match=r"no kernel for layers\.1\.o_proj; use") as caught:
        select_backend("native", 1, schemes("int", "float"))
    assert "\n" not in str(caught.value)
    assert select_backend("reference", 1, schemes("float")).name == "reference"
