"""What is exported for vLLM. Oracle: transformers and compressed-tensors, which load the same files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fptq_runtime.artifact.io import ArtifactError
from fptq_runtime.kernels.reference import ReferenceBackend
from fptq_runtime.models.loader import Checkpoint, CheckpointError
from fptq_runtime.models.tokenizer import Tokenizer
from fptq_runtime.quantizer.calibrate import Text, packaged_text
from fptq_runtime.quantizer.pipeline import quantize
from fptq_runtime.quantizer.recipe import Recipe
from fptq_runtime.quantizer.samples import Calibration
from fptq_runtime.quantizer.steps.activations import Activations
from fptq_runtime.quantizer.steps.weights import Weights
from fptq_runtime.quantizer.vllm import export
from tests.quantizer.models import save_model
from tests.quantizer.test_pipeline import assert_transformers_agrees

WIDE = {"hidden_size": 128, "num_attention_heads": 8}


@pytest.fixture(scope="module")
def heldout() -> Text:
    return packaged_text("heldout")


def artifact(path: Path, scheme: Any = "static", **weights: Any) -> Path:
    save_model("llama", path / "source", **WIDE)
    recipe = Recipe(name="test", steps=(Activations(scheme=scheme), Weights(**weights)))
    quantize(path / "source", path / "artifact", recipe, calibration=Calibration(None, 4, 32), text_tokens=400)
    return path / "artifact"


@pytest.mark.parametrize("weights", [{}, {"num_bits": 8, "group_size": None}], ids=["w4", "w8"])
def test_others_load_it_and_agree(tmp_path: Path, heldout: Text, weights: dict[str, Any]) -> None:
    source = artifact(tmp_path, **weights)
    result = export(source, tmp_path / "out", heldout, ReferenceBackend(), 100)
    out = tmp_path / "out"
    assert_transformers_agrees(out, Tokenizer(out).encode("the wood was bright and the clock was cold"))
    assert result.static_inputs > 0
    assert result.perplexity_after == pytest.approx(result.perplexity_before, rel=0.2)
    assert result.bytes == sum(file.stat().st_size for file in out.iterdir())


@pytest.mark.parametrize("family", ["glm4-moe", "gpt-oss"])
def test_what_is_no_linear_goes_with_it(family: str, tmp_path: Path, heldout: Text) -> None:
    """The bias of a routing, attention's sinks."""
    save_model(family, tmp_path / "source")
    quantize(tmp_path / "source", tmp_path / "artifact", "rtn-dynamic", calibration=Calibration("random", 4, 32),
             text_tokens=400)
    export(tmp_path / "artifact", tmp_path / "out", heldout, ReferenceBackend(), 100)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("artifact", "out"))
    names = {name for name in before if name.endswith(("e_score_correction_bias", "sinks"))}
    assert names
    for name in names:
        assert torch.equal(after[name], before[name])


def test_what_vllm_matches(tmp_path: Path, heldout: Text) -> None:
    """Pack-quantized, symmetric, dynamic per token, the head in float: nothing else is in the directory."""
    source = artifact(tmp_path)
    export(source, tmp_path / "out", heldout, ReferenceBackend(), 100)
    quantization = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert quantization["ignore"] == ["lm_head"]
    for group in quantization["config_groups"].values():
        assert group["format"] == "pack-quantized"
        assert (group["weights"]["num_bits"], group["weights"]["symmetric"]) == (4, True)
        act = group["input_activations"]
        assert (act["num_bits"], act["strategy"], act["dynamic"], act["symmetric"]) == (8, "token", True, True)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert str(tensors["lm_head.weight"].dtype) == "torch.bfloat16"
    assert not any("input_scale" in name for name in tensors)
    quantized = {name.rpartition(".")[0] for name in tensors if name.endswith("weight_packed")}
    assert len(quantized) == 3 * 7
    assert not any(f"{name}.weight" in tensors for name in quantized)
    assert tensors["model.layers.0.mlp.up_proj.weight_packed"].dtype == torch.int32
    assert not (tmp_path / "out" / "fptq.json").exists()
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def test_weight_only_stays_packed(tmp_path: Path, heldout: Text) -> None:
    source = artifact(tmp_path, scheme="float")
    result = export(source, tmp_path / "out", heldout, ReferenceBackend(), 100)
    groups = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["config_groups"]
    assert {(group["format"], group["input_activations"]) for group in groups.values()} == {("pack-quantized", None)}
    assert result.static_inputs == 0


def test_refusals_leave_nothing(tmp_path: Path, heldout: Text) -> None:
    source = artifact(tmp_path, scheme="dynamic", num_bits=8, group_size=64)
    with pytest.raises(CheckpointError, match="q_proj has 8-bit weights in groups"):
        export(source, tmp_path / "out", heldout, ReferenceBackend(), 100)
    with pytest.raises(CheckpointError, match="not quantized"):
        export(tmp_path / "source", tmp_path / "out", heldout, ReferenceBackend(), 100)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["artifact", "source"]


def test_what_an_export_may_replace(tmp_path: Path, heldout: Text) -> None:
    """An artifact or an earlier export, when told to; never the artifact that it is made from, nor what is not ours."""
    source = artifact(tmp_path)
    for out in (shutil.copytree(source, tmp_path / "old"), tmp_path / "old"):
        with pytest.raises(ArtifactError, match="--overwrite"):
            export(source, out, heldout, ReferenceBackend(), 100)
        result = export(source, out, heldout, ReferenceBackend(), 100, overwrite=True)
        about = json.loads((out / "fptq-export.json").read_text())
        assert (about["target"], about["perplexity_after"]) == ("vllm", result.perplexity_after)
        assert not (out / "fptq.json").exists() and len(Checkpoint(out).linear_schemes)
    with pytest.raises(ArtifactError, match="is the model itself"):
        export(source, tmp_path / "old" / ".." / "artifact", heldout, ReferenceBackend(), 100, overwrite=True)
    with pytest.raises(ArtifactError, match="not an fptq artifact"):
        export(source, tmp_path / "source", heldout, ReferenceBackend(), 100, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["artifact", "old", "source"]


def test_an_imported_checkpoint_can_be_exported(tmp_path: Path, heldout: Text) -> None:
    """What is loaded need not be ours: here the export itself, without its static scales."""
    source = artifact(tmp_path)
    export(source, tmp_path / "out", heldout, ReferenceBackend(), 100)
    again = export(tmp_path / "out", tmp_path / "again", heldout, ReferenceBackend(), 100)
    assert again.perplexity_after == again.perplexity_before
    assert Checkpoint(tmp_path / "again").linear_schemes == Checkpoint(tmp_path / "out").linear_schemes
