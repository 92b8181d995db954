"""Bits bought where they gain most, until the loss is met or the bytes are spent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fptq_runtime import cli
from fptq_runtime.analysis.budget import Budget, quantize_within
from fptq_runtime.artifact.io import read_manifest
from fptq_runtime.quantizer.pipeline import quantize
from fptq_runtime.quantizer.recipe import Recipe, load_recipe
from fptq_runtime.quantizer.samples import Calibration
from fptq_runtime.quantizer.steps.activations import Activations
from fptq_runtime.quantizer.steps.base import QuantizationError
from fptq_runtime.quantizer.steps.weights import Weights
from tests.quantizer.models import save_model

SMALL: dict[str, Any] = {"calibration": Calibration(num_samples=4), "text_tokens": 1500}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    save_model("llama", path, num_hidden_layers=2)
    return path


def test_a_loss_is_met_with_the_bytes_it_needs(model: Path, tmp_path: Path) -> None:
    plain = quantize(model, tmp_path / "plain", "rtn-dynamic", **SMALL)
    before = plain.quality.perplexity_after / plain.quality.perplexity_before - 1
    target = before / 2
    manifest, spent = quantize_within(model, tmp_path / "half", load_recipe("rtn-dynamic"), Budget(target), **SMALL)
    assert spent.met and spent.loss <= target
    assert spent.loss == manifest.quality.perplexity_after / manifest.quality.perplexity_before - 1
    assert spent.loss_before == pytest.approx(before, rel=1e-2)
    assert manifest.size > plain.size and spent.extra_bytes == manifest.size / plain.size - 1
    assert manifest.recipe["steps"][-1]["keep"] == spent.keep
    bits = {record.modules[0]: record.num_bits for record in manifest.layers if record.kind != "head"}
    assert {name: count for name, count in bits.items() if count != 4} == spent.keep
    assert read_manifest(tmp_path / "half") == manifest


def test_bytes_bound_what_is_bought(model: Path, tmp_path: Path) -> None:
    plain = quantize(model, tmp_path / "plain", "rtn", **SMALL)
    manifest, spent = quantize_within(model, tmp_path / "out", load_recipe("rtn"), Budget(extra_bytes=0.2), **SMALL)
    assert spent.met and spent.keep
    assert plain.size < manifest.size <= 1.2 * plain.size


def test_what_cannot_be_met_is_said(model: Path, tmp_path: Path) -> None:
    budget = Budget(1e-7, 0.05)
    manifest, spent = quantize_within(model, tmp_path / "out", load_recipe("rtn"), budget, **SMALL)
    assert not spent.met and spent.extra_bytes <= 0.05
    assert "cannot be met within 5.0% more bytes" in spent.summary(budget)
    assert (tmp_path / "out").is_dir() and manifest.quality.perplexity_after > manifest.quality.perplexity_before


def test_a_loss_that_is_met_already_buys_nothing(model: Path, tmp_path: Path) -> None:
    _, spent = quantize_within(model, tmp_path / "out", load_recipe("rtn"), Budget(1000.0), **SMALL)
    assert spent.met and spent.keep == {} and spent.extra_bytes == 0


def test_all_of_it_in_float(model: Path, tmp_path: Path) -> None:
    """More bytes than there are to spend end with 16 bits everywhere; what was kept by hand stays."""
    recipe = Recipe(name="by hand", steps=(Activations(scheme="dynamic"), Weights(keep={"*.0.self_attn.*": 8})))
    manifest, spent = quantize_within(model, tmp_path / "out", recipe, Budget(extra_bytes=50.0), **SMALL)
    assert set(spent.keep.values()) == {16} and len(spent.keep) == 6
    assert manifest.recipe["steps"][-1]["keep"] == {"*.0.self_attn.*": 8, **spent.keep}
    assert abs(spent.loss) < abs(spent.loss_before)


def test_refusals(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="bounds the loss"):
        Budget()
    with pytest.raises(QuantizationError, match="16 bits"):
        quantize_within(model, tmp_path / "out", load_recipe("bf16"), Budget(0.1))
    quantize(model, tmp_path / "artifact", "rtn", **SMALL)
    with pytest.raises(QuantizationError, match="quantized already"):
        quantize_within(tmp_path / "artifact", tmp_path / "out", load_recipe("rtn"), Budget(0.1))
    assert not (tmp_path / "out").exists()


def test_the_command(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["quantize", str(model), str(tmp_path / "out"), "--recipe", "rtn", "--num-samples", "2",
                 "--text-tokens", "400"]
    with pytest.raises(SystemExit) as exit_code:
        cli.main([*arguments, "--extra-bytes", "15%", "--json"])
    assert exit_code.value.code == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["budget"]["met"] and answer["recipe"]["steps"][-1]["keep"] == answer["budget"]["keep"]
    with pytest.raises(SystemExit):
        cli.main([*arguments, "--max-loss", "900%", "--overwrite"])
    assert "0 linears in 8 bits" in capsys.readouterr().out
    for wrong in ("0.5", "-1%", "many"):
        with pytest.raises(SystemExit) as exit_code:
            cli.main([*arguments, "--max-loss", wrong])
        assert exit_code.value.code == 2
