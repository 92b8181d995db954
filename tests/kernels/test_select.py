from __future__ import annotations

import logging
import os
import sys
from types import SimpleNamespace

import pytest
import torch

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


def test_more_threads_than_cpus_are_refused() -> None:
    cpus = os.cpu_count() or 1
    for name in ("auto", "native", "reference"):
        with pytest.raises(ValueError, match=f"threads must be at most {cpus}, this machine's CPUs, not {cpus + 1}"):
            select_backend(name, threads=cpus + 1)


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


def test_a_gpu_is_taken_where_there_is_one_and_nothing_else_was_asked_for(
        monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    from fptq_runtime.kernels import select
    from fptq_runtime.kernels.triton import device

    monkeypatch.setattr(select, "_has_cuda_driver", lambda: True)
    monkeypatch.setattr(device, "problem", lambda: None)
    monkeypatch.setattr("fptq_runtime.kernels.triton.backend.TritonBackend", lambda: SimpleNamespace(name="triton"))
    assert [select_backend(device=name).name for name in ("auto", "cuda")] == ["triton"] * 2
    assert select_backend("reference", device="auto").name == "reference"
    assert select_backend(device="cpu").name == select_backend().name != "triton"
    monkeypatch.setattr(device, "problem", lambda: "it is too old")
    with caplog.at_level(logging.WARNING):
        assert select_backend(device="auto").name != "triton"
    assert "running on the CPU: it is too old" in caplog.text
    with pytest.raises(ValueError, match="cannot run on the GPU: it is too old"):
        select_backend(device="cuda")
    with pytest.raises(ValueError, match="leave out --backend"):
        select_backend("native", device="cuda")
    monkeypatch.setattr(select, "find_spec", lambda name: None)
    assert select_backend(device="auto").name != "triton"
    with pytest.raises(ValueError, match=r"torch is not installed; pip install 'fptq-serve\[gpu\]'"):
        select_backend(device="cuda")
    with pytest.raises(ValueError, match="'tpu'"):
        select_backend(device="tpu")


def test_what_keeps_a_gpu_from_being_used(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from fptq_runtime.kernels.triton import device

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(device, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert device.problem() is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert "T4 has compute capability 7.5" in str(device.problem())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "nvidia-smi" in str(device.problem())
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built without CUDA" in str(device.problem())
    monkeypatch.setattr(device, "find_spec", lambda name: None)
    assert "triton is not installed" in str(device.problem())


def test_the_reference_backend_takes_threads_too() -> None:
    before = torch.get_num_threads()
    try:
        select_backend("reference", threads=1)
        assert torch.get_num_threads() == 1
        select_backend("reference")
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
