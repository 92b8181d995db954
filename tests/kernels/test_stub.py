"""The committed stub of the native extension is what the extension says of itself."""

from __future__ import annotations

from pathlib import Path

import pytest

import fptq_runtime

native = pytest.importorskip("fptq_runtime._native", reason="the native extension is not built")
stubgen = pytest.importorskip("nanobind.stubgen", reason="nanobind is not installed")


def test_the_stub_is_current() -> None:
    generator = stubgen.StubGen(native)
    generator.put(native)
    committed = Path(fptq_runtime.__file__).with_name("_native.pyi")
    assert generator.get() == committed.read_text(), "run `make stubs`"
