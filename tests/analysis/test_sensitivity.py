"""Mixtures of float and quantized linears. Oracle: the artifact, run whole by the code that evaluates it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fptq_runtime.analysis.sensitivity import Captured, Probe, capture
from fptq_runtime.kernels.reference import ReferenceBackend
from fptq_runtime.models.loader import Checkpoint, load_model
from fptq_runtime.models.tokenizer import Tokenizer
from fptq_runtime.quantizer.calibrate import Text
from fptq_runtime.quantizer.evaluate import evaluate, sum_kl, text_windows, window_logits
from fptq_runtime.quantizer.pipeline import quantize
from fptq_runtime.quantizer.recipe import Recipe, load_recipe
from fptq_runtime.quantizer.samples import Calibration
from fptq_runtime.quantizer.steps.base import QuantizationError
from fptq_runtime.quantizer.steps.fptq import Fptq
from fptq_runtime.quantizer.steps.weights import Weights
from tests.quantizer.models import save_model

TEXT = Text("fox", "The quick brown fox jumps over the lazy dog, and then some more. " * 9, "0" * 64)
RECIPE = Recipe(name="mixed", steps=(Fptq(overrides={"*.1.*": "lae", "*.2.mlp*": "dynamic", "*": "static"}),
                                     Weights(clip="mse")))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    save_model("llama", path)
    return path


@pytest.fixture(scope="module")
def captured(model: Path) -> Captured:
    return capture(model, RECIPE, text_windows(TEXT, Tokenizer(model), 128, 300), Calibration(num_samples=4))[0]


@pytest.fixture(scope="module")
def probe(model: Path, captured: Captured) -> Probe:
    probe = Probe(captured, text_windows(TEXT, Tokenizer(model), 128, 300))
    probe.all()
    return probe


def test_everything_quantized_is_the_artifact(model: Path, probe: Probe, tmp_path: Path) -> None:
    backend = ReferenceBackend()
    quantize(model, tmp_path / "out", RECIPE, calibration=Calibration(num_samples=4), text_tokens=64)
    whole = probe.all()
    assert probe.original == pytest.approx(
        evaluate(model, TEXT, backend, max_tokens=300, kv_dtype="float32").perplexity, rel=1e-4)
    assert whole.perplexity == pytest.approx(
        evaluate(tmp_path / "out", TEXT, backend, max_tokens=300, kv_dtype="float32").perplexity, rel=1e-2)
    windows = text_windows(TEXT, Tokenizer(model), 128, 300)
    exact, ours = ([logits for logits, _ in window_logits(load_model(Checkpoint(path), backend), backend, windows,
                                                          "float32")] for path in (model, tmp_path / "out"))
    kl = sum(map(sum_kl, exact, ours)) / sum(map(len, exact))
    assert whole.kl == pytest.approx(kl, rel=5e-2)


def test_nothing_quantized_diverges_nowhere(probe: Probe) -> None:
    nothing = probe.run(0, probe.exact[0], lambda i: probe.model.exact[i], probe.model.head(False))
    assert nothing.kl < 1e-6 and nothing.perplexity == pytest.approx(probe.original, rel=1e-5)
    assert probe.only(1, ()).kl < 1e-6


def test_runs_from_a_boundary_are_runs_from_the_start(probe: Probe) -> None:
    """What a variant does not touch before it begins need not be computed again."""
    layers = range(probe.num_layers)

    def from_the_start(chosen: set[int], head: bool) -> float:
        return probe.run(0, probe.exact[0], lambda i: probe.model.block(i, probe.model.names if i in chosen else ()),
                         probe.model.head(head)).kl

    for layer in layers:
        assert probe.only(layer).kl == pytest.approx(from_the_start({layer}, False), rel=1e-4)
        assert probe.all_but(layer).kl == pytest.approx(from_the_start(set(layers) - {layer}, True), rel=1e-4)
        assert probe.up_to(layer).kl == pytest.approx(from_the_start(set(range(layer + 1)), False), rel=1e-4)


def test_parts_are_less_than_the_whole(probe: Probe) -> None:
    whole = probe.all().kl
    assert 0 < probe.part(weights=False, acts=True).kl < whole
    assert 0 < probe.part(weights=True, acts=False).kl < 1.2 * whole
    for kind in (*probe.model.names, "head"):
        assert 0 < probe.only_kind(kind).kl < whole
    assert probe.all_but_kind("head").kl == pytest.approx(probe.up_to(probe.num_layers - 1).kl, rel=1e-4)


def test_float_mixes_are_exact_with_other_recipes(model: Path) -> None:
    """The transforms of a recipe leave the captured float model the function that it was."""
    windows = text_windows(TEXT, Tokenizer(model), 128, 100)
    captures = {name: capture(model, load_recipe(name), windows, Calibration(num_samples=2))[0]
                for name in ("rtn", "cle", "ocs", "smoothquant", "awq", "gptq", "fptq-best")}
    originals = {name: Probe(captured, windows).original for name, captured in captures.items()}
    assert max(originals.values()) == pytest.approx(min(originals.values()), rel=1e-4)


def test_the_text_may_have_longer_windows_than_calibration(model: Path) -> None:
    windows = text_windows(TEXT, Tokenizer(model), 128, 100)
    captured, _ = capture(model, load_recipe("rtn"), windows, Calibration(num_samples=2, sample_length=8))
    assert max(map(len, windows)) > 64
    assert Probe(captured, windows).all().kl > 0


def test_a_capture_leaves_nothing_behind(captured: Captured) -> None:
    for exact, quantized in zip(captured.exact, captured.quantized, strict=True):
        assert list(exact.linears) == list(quantized.linears)
        for linear in exact.linears.values():
            assert isinstance(linear.weight, torch.Tensor) and linear.act is None
        assert not any(isinstance(linear.weight, torch.Tensor) for linear in quantized.linears.values())


def test_training_is_refused(model: Path) -> None:
    with pytest.raises(QuantizationError, match="qat trains all weights together"):
        capture(model, load_recipe("qat"), [[1, 2]])
