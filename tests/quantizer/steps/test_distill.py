"""Scales trained end to end. Oracles: the same recipe without it, finite differences, the artifact itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fptq_runtime.artifact.io import verify
from fptq_runtime.kernels.base import StepInput
from fptq_runtime.kernels.reference import ReferenceBackend, ReferenceOps
from fptq_runtime.models.decoder import Decoder
from fptq_runtime.models.loader import Checkpoint, load_block, load_head, load_model
from fptq_runtime.quantizer.evaluate import sum_kl
from fptq_runtime.quantizer.pipeline import quantize
from fptq_runtime.quantizer.recipe import Recipe, RecipeError, load_recipe
from fptq_runtime.quantizer.samples import Calibration
from fptq_runtime.quantizer.steps.activations import Activations
from fptq_runtime.quantizer.steps.base import QuantizationError
from fptq_runtime.quantizer.steps.distill import Distill, _Student, backward
from fptq_runtime.quantizer.steps.weights import Weights
from tests.quantizer.models import DEMO, save_model, through_the_gate

SMALL: dict[str, Any] = {"calibration": Calibration("random", 4, 32), "text_tokens": 400}


def recipe(distill: Distill | None, **weights: Any) -> Recipe:
    steps = (Activations(scheme="dynamic"), Weights(**weights), *([] if distill is None else [distill]))
    return Recipe(name="distilled", steps=steps)


def quantized(path: Path) -> Decoder:
    """As the quantizer has it before it is written."""
    checkpoint = Checkpoint(path)
    blocks = [load_block(checkpoint, index) for index in range(checkpoint.model_config.num_layers)]
    return Decoder(checkpoint.model_config, load_model(checkpoint, ReferenceBackend()).stem, blocks,
                   load_head(checkpoint))


def windows(count: int, length: int) -> list[list[int]]:
    return torch.randint(3, 260, (count, length), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.mark.parametrize("family", ["llama-tied-bias", "gemma3", "gpt2", "opt", "bloom", "qwen3-moe"])
def test_every_family(family: str, tmp_path: Path) -> None:
    """The artifact is whole; its codes are those of the recipe alone, and every scale and gain has moved."""
    save_model(family, tmp_path / "float", num_hidden_layers=2)
    plain = quantize(tmp_path / "float", tmp_path / "plain", recipe(None), **SMALL)
    manifest = quantize(tmp_path / "float", tmp_path / "out", recipe(Distill()), **SMALL)
    assert verify(tmp_path / "out") == manifest
    through_the_gate(tmp_path / "out", manifest, ReferenceBackend())
    assert manifest.layers == plain.layers
    assert manifest.quality.perplexity_before == plain.quality.perplexity_before
    assert manifest.quality.perplexity_after != plain.quality.perplexity_after
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "out"))
    assert before.keys() == after.keys()
    same = {name for name in before if torch.equal(before[name].float(), after[name].float())}
    assert {name for name in before if name.endswith("weight_packed")} <= same
    assert not {name for name in before if name.endswith("weight_scale")} & same


def test_it_nears_the_float_model(tmp_path: Path) -> None:
    """The demo, on text that it was not trained on."""
    settings: dict[str, Any] = {"calibration": Calibration(num_samples=24, sample_length=128), "text_tokens": 2048}
    manifests = [quantize(DEMO, tmp_path / name, recipe(distill, clip="mse"), **settings)
                 for name, distill in (("plain", None), ("out", Distill()))]
    plain, distilled = (manifest.quality for manifest in manifests)
    assert distilled.perplexity_after < plain.perplexity_after
    text = StepInput.whole(windows(2, 64))
    exact = load_model(Checkpoint(DEMO), ReferenceBackend())
    with torch.no_grad():
        expected = exact(ReferenceOps(text, None))
        kl = [sum_kl(expected, load_model(Checkpoint(tmp_path / name), ReferenceBackend())(
            ReferenceOps(text, None, "int8"))) for name in ("plain", "out")]
    assert kl[1] < kl[0]


def test_the_student_is_the_artifact(tmp_path: Path) -> None:
    """Before it is trained, and after it gave back what was, up to the scales' bfloat16."""
    save_model("llama-tied-bias", tmp_path / "float")
    quantize(tmp_path / "float", tmp_path / "out", recipe(None), **SMALL)
    decoder, batch = quantized(tmp_path / "out"), StepInput.whole(windows(2, 24))
    student = _Student(decoder, "float32")
    with torch.no_grad():
        artifact = load_model(Checkpoint(tmp_path / "out"), ReferenceBackend())(ReferenceOps(batch, None))
        assert torch.equal(student(batch), artifact)
        for parameter in student.parameters:
            parameter.mul_(2)  # which bfloat16 holds
        expected = student(batch)
        student.give_back()
        assert torch.equal(_Student(decoder, "float32")(batch), expected)
    assert not torch.equal(expected, artifact)


def test_gradients_are_finite_differences(tmp_path: Path) -> None:
    """Where no input is rounded; in one direction for each tensor."""
    save_model("qwen3", tmp_path / "float", num_hidden_layers=1)
    quantize(tmp_path / "float", tmp_path / "out",
             Recipe(name="x", steps=(Activations(scheme="float"), Weights())), **SMALL)
    student, given = _Student(quantized(tmp_path / "out"), "float32"), windows(2, 12)
    teacher = load_model(Checkpoint(tmp_path / "float"), ReferenceBackend())
    backward(student, teacher, given)
    batch, generator = StepInput.whole(given), torch.Generator().manual_seed(0)
    with torch.no_grad():
        exact = teacher(ReferenceOps(batch, None))
        for parameter in student.parameters:
            assert parameter.grad is not None
            direction = torch.randn(parameter.shape, generator=generator)
            direction /= direction.norm()
            kl = []
            for sign in (1, -1):
                parameter.add_(direction, alpha=sign * 1e-2)
                kl.append(sum_kl(exact, student(batch)) / len(batch.token_ids))
                parameter.sub_(direction, alpha=sign * 1e-2)
            slope = float((parameter.grad * direction).sum())
            assert (kl[0] - kl[1]) / 2e-2 == pytest.approx(slope, rel=2e-2, abs=1e-5)


def test_divergence_leaves_nothing(tmp_path: Path) -> None:
    save_model("llama-tied-bias", tmp_path / "float", num_hidden_layers=1)
    with pytest.raises(QuantizationError, match=r"distillation diverged at step \d+: lower its learning_rate"):
        quantize(tmp_path / "float", tmp_path / "out", recipe(Distill(learning_rate=1e30)), **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["float"]


def test_recipes() -> None:
    assert isinstance(load_recipe("fptq-max").steps[-1], Distill)
    assert load_recipe("fptq-max").weights is load_recipe("fptq-max").steps[-2]
    for steps, message in (
        ([Activations(scheme="dynamic"), Distill(), Weights()], "ends with one step"),
        ([Activations(scheme="dynamic"), Distill()], "ends with one step"),
        ([Distill()], "ends with one step"),
        ([Activations(scheme="dynamic"), Weights(scales="two-level"), Distill()], "two-level.* goes without it"),
    ):
        with pytest.raises(RecipeError, match=message):
            Recipe(name="x", steps=tuple(steps))
