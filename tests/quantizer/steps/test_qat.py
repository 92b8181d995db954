"""Training. Oracles: finite differences for the gradients, the artifact itself for what the student computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fptq_runtime.artifact.io import verify
from fptq_runtime.kernels.base import StepInput
from fptq_runtime.kernels.reference import ReferenceBackend, ReferenceOps
from fptq_runtime.models.loader import Checkpoint, load_model
from fptq_runtime.models.tokenizer import Tokenizer
from fptq_runtime.quantizer.pipeline import quantize
from fptq_runtime.quantizer.recipe import Recipe, RecipeError
from fptq_runtime.quantizer.samples import Calibration
from fptq_runtime.quantizer.steps import base
from fptq_runtime.quantizer.steps import qat as module
from fptq_runtime.quantizer.steps.activations import Activations
from fptq_runtime.quantizer.steps.base import QuantizationError, TuneWork
from fptq_runtime.quantizer.steps.fptq import Fptq
from fptq_runtime.quantizer.steps.qat import Qat, Student
from fptq_runtime.quantizer.steps.weights import Weights
from tests.models.hf import FAMILIES, HYBRIDS, MIXTURES
from tests.quantizer.models import DEMO, SHARED, STORIES, save_model, through_the_gate

TEXT = "It was a bright cold day in the wood, and the clock was striking thirteen. " * 20
SMALL: dict[str, Any] = {"calibration": Calibration("random", 4, 32), "text_tokens": 400}
TRAINED = {"num_sequences": 6, "sequence_length": 24, "batch_size": 2, "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    save_model("llama-tied-bias", tmp_path / "float", num_hidden_layers=1)
    return tmp_path / "float"


def windows(count: int, length: int, seed: int = 0) -> list[list[int]]:
    return torch.randint(3, 260, (count, length), generator=torch.Generator().manual_seed(seed)).tolist()


def recipe(scheme: Any = "dynamic", *, weights: dict[str, Any] | None = None, **settings: Any) -> Recipe:
    steps = (Qat(**{**TRAINED, **settings}), Activations(scheme=scheme), Weights(**(weights or {})))
    return Recipe(name="qat", steps=steps)


def student_of(path: Path, scheme: Any = "dynamic", weights: dict[str, Any] | None = None, **settings: Any) -> Student:
    return Student(Checkpoint(path), Activations(scheme=scheme), Weights(**(weights or {})), windows(2, 24), **settings)


@pytest.mark.parametrize("family", [family for family in HYBRIDS if family not in MIXTURES])
def test_recurrent_layers_are_refused(family: str, tmp_path: Path, text: Path) -> None:
    save_model(family, tmp_path / "float")
    with pytest.raises(QuantizationError, match="what its recurrent layers have beside linears"):
        quantize(tmp_path / "float", tmp_path / "out", recipe(), text=text, **SMALL)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in (*MIXTURES, *HYBRIDS)])
def test_every_family(family: str, tmp_path: Path, text: Path) -> None:
    """A few steps, and an artifact that is whole; every trained tensor has moved, and the embeddings have not."""
    save_model(family, tmp_path / "float", **({} if family == "gpt-neo" else {"num_hidden_layers": 2}))
    manifest = quantize(tmp_path / "float", tmp_path / "out", recipe(), text=text, **SMALL)
    plain = quantize(tmp_path / "float", tmp_path / "plain", Recipe(name="x", steps=recipe().steps[1:]), text=text,
                     **SMALL)
    assert verify(tmp_path / "out") == manifest
    assert manifest.quality.perplexity_before == plain.quality.perplexity_before
    assert manifest.quality.perplexity_after != plain.quality.perplexity_after
    assert manifest.provenance == plain.provenance
    through_the_gate(tmp_path / "out", manifest, ReferenceBackend())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["float", "out", "plain"], "no state is left"
    student = student_of(tmp_path / "float")
    student(StepInput.whole(windows(2, 24))).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().max() > 0) for p in student.parameters)
    trained = sum(p.numel() for p in student.parameters)
    source = Checkpoint(tmp_path / "float")
    embedding = source.model_config.vocab_size * source.model_config.hidden_size
    stem, config = source.model.stem, source.model_config
    if stem.positions is not None:
        trained += (config.max_position_embeddings + stem.position_offset) * config.hidden_size
    assert trained == source.num_parameters - (0 if source.tied else embedding), "a tied head is trained on its own"


@pytest.mark.parametrize(("scheme", "weights"), [
    ("dynamic", {}),
    ("static", {"head_bits": 4, "group_size": 32}),
    ("dynamic", {"keep": {"*.0.mlp.down_proj": 16, "*.o_proj": 8}, "head_bits": 16}),
    ("float", {"num_bits": 8, "group_size": None}),
    ("dynamic", {"grid": "float", "scales": "m2", "group_size": 32}),
])
def test_the_student_computes_what_the_artifact_will(tmp_path: Path, text: Path, scheme: Any,
                                                     weights: dict[str, Any]) -> None:
    """To the last bit where scales are per token. Static scales are the float model's for the student, while the
    artifact's are measured behind quantized layers."""
    save_model("llama-tied-bias", tmp_path / "float", hidden_size=128, num_attention_heads=8)
    student = student_of(tmp_path / "float", scheme, weights, clip=True, kv_dtype="float32")
    optimizer = torch.optim.AdamW(student.parameters, lr=1e-3)
    batch = StepInput.whole(windows(2, 24, seed=1))
    for _ in range(3):
        student(batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    tuned = student.save(tmp_path / "tuned").path
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tuned / name).write_bytes((tmp_path / "float" / name).read_bytes())
    converted = Recipe(name="x", steps=(Activations(scheme=scheme), Weights(**weights)))
    quantize(tuned, tmp_path / "out", converted, text=text, **SMALL)
    artifact = load_model(Checkpoint(tmp_path / "out"), ReferenceBackend())
    with torch.no_grad():
        expected, logits = artifact(ReferenceOps(batch, None)), student(batch)
    if scheme != "static":
        assert torch.equal(logits, expected)
    assert float((logits - expected).norm() / expected.norm()) < 0.2


def test_gradients_are_finite_differences(tmp_path: Path) -> None:
    """Where nothing is rounded. In one direction for each tensor, at a step where float32 still resolves the change."""
    save_model("qwen3", tmp_path)
    student = student_of(tmp_path, "float", {"num_bits": 16, "head_bits": 16}, kv_dtype="float32")
    student._rounded = lambda linear, bits, per_channel=False: linear  # type: ignore[method-assign]
    batch = StepInput.whole(windows(2, 12))

    def loss() -> torch.Tensor:
        return student(batch).log_softmax(-1)[:, 5].double().mean()

    loss().backward()
    generator = torch.Generator().manual_seed(0)
    for parameter in student.parameters:
        assert parameter.grad is not None
        direction = parameter.grad + parameter.grad.norm() * 0.1 * torch.randn(
            parameter.shape, generator=generator) / parameter.numel() ** 0.5
        direction *= 2e-2 / direction.norm()
        with torch.no_grad():
            parameter += direction
            above = loss()
            parameter -= 2 * direction
            below = loss()
            parameter += direction
        expected = float((parameter.grad.double() * direction).sum())
        assert float(above - below) / 2 == pytest.approx(expected, rel=0.02, abs=1e-5)


def test_no_tensor_is_made_elsewhere(tmp_path: Path) -> None:
    """On the meta device nothing can be read, and no op takes a tensor of another device."""
    for family in ("qwen2-window", "bloom"):
        save_model(family, tmp_path / family)
        student = student_of(tmp_path / family, device="meta")
        logits = student(StepInput.whole(windows(2, 24)))
        logits.sum().backward()
        assert logits.shape == (48, 260)
        assert {p.grad.device.type for p in student.parameters if p.grad is not None} == {"meta"}


class _Interrupted(Exception):
    pass


def interrupt(monkeypatch: pytest.MonkeyPatch, name: str, after: int) -> None:
    """Stop the run once `name` has been saved so often."""
    save, saved = module._State.save, []

    def counted(self: Any, saving: str, value: object) -> None:
        save(self, saving, value)
        saved.append(saving)
        if saved.count(name) == after:
            raise _Interrupted

    monkeypatch.setattr(module._State, "save", counted)


@pytest.mark.parametrize(("name", "after"), [("text", 1), ("text", 2), ("training", 1), ("training", 2),
                                             ("training", 4)])
def test_goes_on_where_it_was(source: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, name: str,
                              after: int) -> None:
    """The same bytes as without the interruption, and nothing is computed twice."""
    monkeypatch.setattr(module, "GENERATED", 4)
    monkeypatch.setattr(module, "SAVE_SECONDS", 0.0)
    quantize(source, tmp_path / "whole", recipe(), text=text, **SMALL)
    with monkeypatch.context() as patch:
        interrupt(patch, name, after)
        with pytest.raises(_Interrupted):
            quantize(source, tmp_path / "out", recipe(), text=text, **SMALL)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.state", "float", "whole"]
    with monkeypatch.context() as patch:
        steps = []
        backward: Callable[..., float] = module.backward
        patch.setattr(module, "backward", lambda *args: steps.append(0) or backward(*args))
        quantize(source, tmp_path / "out", recipe(), text=text, **SMALL)
    assert len(steps) == (3 if name == "text" else 3 - min(after, 3))
    whole, resumed = ({file.name: file.read_bytes() for file in (tmp_path / out).iterdir()} for out in ("whole", "out"))
    assert resumed == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["float", "out", "whole"]


class _Draft:
    """A state that nobody goes on from."""

    def load(self, name: str, default: Any) -> Any:
        return default

    def save(self, name: str, value: object) -> None:
        pass


@pytest.mark.parametrize("scheme", ["static", "dynamic"])
def test_training_lowers_the_loss(source: Path, tmp_path: Path, scheme: Any) -> None:
    """Forty steps on one batch."""
    student, batch = student_of(source, scheme, kv_dtype="int8"), windows(4, 24, seed=3)
    teacher = load_model(Checkpoint(source), ReferenceBackend())

    def divergence() -> float:
        with torch.no_grad():
            expected, logits = (model.log_softmax(-1) for model in (
                teacher(ReferenceOps(StepInput.whole(batch), None)), student(StepInput.whole(batch))))
        return float((expected.exp() * (expected - logits)).sum(-1).mean())

    before = divergence()
    checkpoint, tokenizer = Checkpoint(source), Tokenizer(source)
    calibrated = Calibration("random", 1, 8).draw(checkpoint, tokenizer)
    work = TuneWork(checkpoint, tokenizer, (), calibrated, tmp_path / "state", False)
    Qat(batch_size=4, learning_rate=1e-3)._train(work, student, batch * 40, _Draft())  # type: ignore[arg-type]
    assert divergence() < 0.2 * before


def test_trains_on_calibration_text(source: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of the length that training asks for, out of the text that calibration has."""
    trained_on: list[list[int]] = []
    monkeypatch.setattr(Qat, "_train", lambda self, work, student, found, state: trained_on.extend(found))
    arguments = {**SMALL, "calibration": Calibration(text, 4, 32)}
    quantize(source, tmp_path / "out", recipe("static", data="calibration"), text=text, **arguments)
    assert [len(window) for window in trained_on] == [24] * 6
    tokenizer = Tokenizer(source)
    assert all(tokenizer.decode(window[1:]) in TEXT for window in trained_on)


def test_another_runs_state_is_refused(source: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch,
                                       ) -> None:
    with monkeypatch.context() as patch:
        interrupt(patch, "text", 1)
        with pytest.raises(_Interrupted):
            quantize(source, tmp_path / "out", recipe(), text=text, **SMALL)
    for changed in (recipe(learning_rate=1e-4), recipe("static")):
        with pytest.raises(ValueError, match=r"\.out\.state was left by an interrupted run") as error:
            quantize(source, tmp_path / "out", changed, text=text, **SMALL)
        assert "\n" not in str(error.value)
    (tmp_path / ".out.state" / "text.pt").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"text\.pt is damaged") as error:
        quantize(source, tmp_path / "out", recipe(), text=text, **SMALL)
    assert "\n" not in str(error.value)


def test_clear_errors(source: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments: dict[str, Any] = {"text": text, **SMALL}
    with monkeypatch.context() as patch:
        patch.setattr(base, "available_memory", lambda: 10**6)
        with pytest.raises(ValueError, match=r"qat needs \d+ MB of memory"):
            quantize(source, tmp_path / "out", recipe(), **arguments)
    with pytest.raises(ValueError, match="lower qat's learning_rate"):
        quantize(source, tmp_path / "out", recipe(learning_rate=1e30), **arguments)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no CUDA device"):
            quantize(source, tmp_path / "out", recipe(device="cuda"), **arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["float"], "nothing is left"
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(ValueError, match=r"cannot write to .*\.out\.state: .*No space left") as error:
            quantize(source, tmp_path / "out", recipe(), **arguments)
    assert "\n" not in str(error.value)
    assert [path.name for path in (tmp_path / ".out.state").iterdir()] == ["run.json"], "nothing half-written"


@pytest.mark.parametrize(("steps", "message"), [
    ((Activations(scheme="dynamic"), Qat(), Weights()), "'qat', 'activations', 'weights'"),
    ((Qat(), Fptq(), Weights()), "'qat', 'activations', 'weights'"),
    ((Qat(), Activations(scheme="dynamic"), Weights(clip="mse")), "takes no clip"),
    ((Qat(), Activations(scheme="dynamic"), Weights(lorc=8)), "lorc"),
])
def test_what_training_goes_with(steps: tuple[Any, ...], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe(name="x", steps=steps)


def test_rate_rises_and_falls() -> None:
    rates = [module.rate(1.0, done, 100) for done in range(100)]
    assert rates[0] == pytest.approx(1 / 5, rel=1e-3)
    assert max(rates) == pytest.approx(1, abs=0.01)
    assert rates[50] == pytest.approx(0.5)
    assert 0 < rates[-1] < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("model", [
    DEMO, pytest.param(STORIES, marks=pytest.mark.skipif(not STORIES.is_dir(), reason="../shared is absent"))])
def test_beats_rounding(model: Path, tmp_path: Path) -> None:
    """Trained on what it writes itself, a model loses less at int4 than it does rounded to nearest, clipped or not."""
    qat = Qat(num_sequences=64, sequence_length=128, batch_size=4, learning_rate=3e-4)
    plain = (Activations(scheme="dynamic"), Weights())
    recipes = (
        Recipe(name="qat", steps=(qat, *plain)),
        Recipe(name="rounded", steps=plain),
        Recipe(name="clipped", steps=(plain[0], Weights(clip="mse"))),
    )
    settings: dict[str, Any] = {"calibration": Calibration(None, 8, 256), "text_tokens": 6000}
    if model == STORIES:
        settings["text"] = SHARED / "data" / "eval" / "tinystories.txt"
    trained, *rounded = (quantize(model, tmp_path / r.name, r, **settings).quality for r in recipes)
    losses = [quality.perplexity_after / quality.perplexity_before - 1 for quality in rounded]
    assert trained.perplexity_after / trained.perplexity_before - 1 < 0.85 * min(losses)
