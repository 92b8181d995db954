"""Checkpoints that hold pytorch_model.bin alone."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from fptq_runtime.artifact.io import hash_file, read_manifest
from fptq_runtime.models.loader import CheckpointError
from fptq_runtime.quantizer.pipeline import open_float, quantize
from tests.quantizer.models import save_model
from tests.quantizer.test_pipeline import SMALL, assert_transformers_agrees


def save_pickled(family: str, path: Path, shards: int = 1) -> PreTrainedModel:
    model = save_model(family, path)
    (path / "model.safetensors").unlink()
    state = list(model.state_dict().items())  # with what is tied under both names
    for i in range(shards):
        name = "pytorch_model.bin" if shards == 1 else f"pytorch_model-{i + 1:05}-of-{shards:05}.bin"
        torch.save(dict(state[i::shards]), path / name)
    return model


@pytest.mark.parametrize(("family", "shards"), [("opt", 1), ("mpt", 1), ("falcon", 3)])
def test_weights_are_those_that_were_pickled(family: str, shards: int, tmp_path: Path) -> None:
    model = save_pickled(family, tmp_path / "float", shards)
    (tmp_path / "text.txt").write_text("It was a bright cold day in the wood, and the clock was striking. " * 20)
    quantize(tmp_path / "float", tmp_path / "out", "bf16", text=tmp_path / "text.txt", **SMALL)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in tensors.items():
        first = 2 if "embed_positions" in name else 0  # rows that no position of OPT's uses
        assert torch.equal(tensor[first:], model.state_dict()[name].to(tensor.dtype)[first:]), name
    assert_transformers_agrees(tmp_path / "out", list(range(3, 60)))
    files = read_manifest(tmp_path / "out").provenance.source_files
    assert {name: hash_file(tmp_path / "float" / name) for name in files} == files
    assert any(name.endswith(".bin") for name in files)


class Harmful:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("harmed",)


def test_code_in_a_pickle_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_pickled("llama", tmp_path / "float")
    torch.save({"model.norm.weight": Harmful()}, tmp_path / "float" / "pytorch_model.bin")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="weights-only") as error:
        open_float(tmp_path / "float", "")
    assert "\n" not in str(error.value)
    assert not Path("harmed").exists()
