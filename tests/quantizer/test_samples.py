"""The calibration set: which tokens, in windows of which lengths."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fptq_runtime.kernels.base import ActivationQuant
from fptq_runtime.kernels.reference import quantize_activations
from fptq_runtime.models.loader import Checkpoint
from fptq_runtime.models.tokenizer import Tokenizer
from fptq_runtime.quantizer.calibrate import CalibrationError, HiddenStates
from fptq_runtime.quantizer.samples import Calibration, CalibrationSet, Lengths, read_lengths
from fptq_runtime.quantizer.steps.base import observe, relative_error, static_act
from fptq_runtime.quantizer.walk import float_part, float_stem
from tests.quantizer.models import SHARED, save_model

TRACE = "TIMESTAMP,ContextTokens,GeneratedTokens\r\n2023-11-16 18:15:46.68,374,44\r\n2023-11-16 18:15:50.99,20,30\r\n"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    save_model("llama", path, num_hidden_layers=1)
    return path


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("It was a bright cold day in the wood, and the clock was striking thirteen. " * 20)
    return path


def calibrated(path: Path, *settings: object, **more: object) -> CalibrationSet:
    return Calibration(*settings, **more).draw(Checkpoint(path), Tokenizer(path))  # type: ignore[arg-type]


@pytest.mark.parametrize("source", ["text", "random", "self"])
def test_fewer_samples_are_the_first_of_more(llama: Path, text: Path, source: str) -> None:
    given = text if source == "text" else source
    more, fewer = calibrated(llama, given, 12, 24), calibrated(llama, given, 5, 24)
    assert more.windows[:5] == fewer.windows
    assert [len(window) for window in more.windows] == [24] * 12
    assert more.tokens.tokens == 12 * 24
    assert more.tokens.sha256 == fewer.tokens.sha256 if source == "text" else more.tokens.name == source
    assert more.lengths is None
    assert calibrated(llama, given, 5, 24, seed=1).windows != fewer.windows


def test_conversations_need_a_template(llama: Path) -> None:
    """With one every other window is a conversation, and the others are what the model writes anyway."""
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}{{ '[assistant]' }}"
    tokenizer, free = Tokenizer(llama, template), calibrated(llama, "self", 4, 24)
    made = Calibration("chat", 4, 24).draw(Checkpoint(llama), tokenizer)
    assert made.tokens.name == "chat"
    assert made.windows[::2] == free.windows[::2]
    opening = tokenizer.encode("[user]", add_special_tokens=False)
    assert all(window[: len(opening)] == opening for window in made.windows[1::2])
    with pytest.raises(CalibrationError, match="calibration chat needs a chat template"):
        calibrated(llama, "chat", 4, 24)


@pytest.mark.parametrize("source", ["text", "random", "self"])
def test_lengths_of_a_workload(llama: Path, text: Path, source: str, tmp_path: Path) -> None:
    """The context of 128 clips a quarter of the sequences; the tokens stay as many."""
    (tmp_path / "lengths.csv").write_text("length,count\n8,1\n16,2\n300,1\n")
    made = calibrated(llama, text if source == "text" else source, 16, 64, tmp_path / "lengths.csv")
    lengths = [len(window) for window in made.windows]
    assert sum(lengths) == 16 * 64 == made.tokens.tokens
    assert set(lengths[:-1]) == {8, 16, 128}
    assert lengths.count(128) == pytest.approx(len(lengths) / 4, abs=2)
    assert all(window[0] == 1 for window in made.windows)
    assert made.lengths is not None
    assert (made.lengths.name, made.lengths.clipped, made.lengths.windows) == ("lengths.csv", 0.25, len(lengths))
    assert made.lengths.quantiles == tuple(np.quantile(lengths, [0, 0.1, 0.5, 0.9, 1], method="inverted_cdf"))
    fewer = calibrated(llama, text if source == "text" else source, 8, 64, tmp_path / "lengths.csv").windows
    assert fewer[:-1] == made.windows[: len(fewer) - 1]


@settings(max_examples=50)
@given(st.dictionaries(st.integers(1, 4000), st.integers(1, 50), min_size=1, max_size=30), st.integers(0, 99),
       st.integers(2, 20000))
def test_drawn_lengths(counts: dict[int, int], seed: int, tokens: int) -> None:
    """They fill the budget, and many of them have the histogram's own quantiles."""
    ordered = sorted(counts)
    lengths = Lengths("x", "", np.array(ordered), np.array([counts[length] for length in ordered]))
    drawn = lengths.draw(tokens, 2048, seed)
    assert tokens - 1 <= sum(drawn) <= tokens
    assert set(drawn[:-1]) <= {min(max(length, 2), 2048) for length in counts}
    many = lengths.draw(500 * 4000, 4000, seed)
    for quantile in (0.1, 0.5, 0.9):
        low, high = (np.quantile(np.repeat(ordered, lengths.counts), min(max(q, 0), 1), method="inverted_cdf")
                     for q in (quantile - 0.03, quantile + 0.03))
        assert max(low, 2) <= np.quantile(many, quantile, method="inverted_cdf") <= max(high, 2)


@pytest.mark.parametrize(("name", "content", "expected"), [
    ("trace.csv", TRACE, {418: 1, 50: 1}),
    ("histogram.csv", "length,count\n8,1\n16,2\n8,3\n", {8: 4, 16: 2}),
    ("plain.csv", "8,1\n16,2\n9,0\n", {8: 1, 16: 2}),
    ("histogram.json", '{"8": 1, "16": 2}', {8: 1, 16: 2}),
])
def test_formats(tmp_path: Path, name: str, content: str, expected: dict[int, int]) -> None:
    (tmp_path / name).write_text(content)
    read = read_lengths(tmp_path / name)
    assert dict(zip(read.lengths.tolist(), read.counts.tolist(), strict=True)) == expected
    assert read.name == name


@pytest.mark.parametrize("content", [
    "", "\n\n", "{}", "{", '{"8": "many"}', '{"8": 1.5}', '{"eight": 1}', '{"0": 1}', "8,-1\n", "8\n9\n", "8,x\n",
    "1,2,3\n", "length,count\n", '{"8": 0}', "time,tokens,more\n1,2,3\n", TRACE.replace("374", "many"),
    "[" * 50000,
])
def test_malformed_lengths(tmp_path: Path, content: str) -> None:
    (tmp_path / "lengths").write_text(content)
    with pytest.raises(CalibrationError, match="lengths") as error:
        read_lengths(tmp_path / "lengths")
    assert "\n" not in str(error.value)
    with pytest.raises(CalibrationError, match="absent"):
        read_lengths(tmp_path / "absent")


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared is absent")
@pytest.mark.parametrize("name", ["code", "conv"])
def test_azure_trace(name: str) -> None:
    path = SHARED / "data" / "azure_llm_trace" / f"AzureLLMInferenceTrace_{name}.csv"
    read = read_lengths(path)
    rows = np.loadtxt(path, delimiter=",", skiprows=1, usecols=(1, 2), dtype=int)
    assert read.counts.sum() == len(rows)
    assert (read.lengths * read.counts).sum() == rows.sum()


@pytest.mark.parametrize(("settings", "message"), [
    ({"num_samples": 0}, "at least one sample of two tokens"),
    ({"sample_length": 1}, "at least one sample of two tokens"),
    ({"sample_length": 129}, "samples of 129 tokens exceed the model's context of 128"),
    ({"source": "empty.txt"}, "empty.txt has 0 tokens, fewer than one sample of 128"),
    ({"source": "short.txt", "sample_length": 20}, "short.txt has 5 tokens, fewer than one sample of 20"),
    ({"source": "short.txt", "lengths": "lengths.json"}, "short.txt has 5 tokens, fewer than one sample of 100"),
    ({"source": "absent.txt"}, "cannot read .*absent.txt"),
])
def test_errors(llama: Path, tmp_path: Path, settings: dict[str, object], message: str) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "short.txt").write_text("short")
    (tmp_path / "lengths.json").write_text(json.dumps({"100": 1}))
    there = {name: tmp_path / str(value) if name in ("source", "lengths") else value
             for name, value in settings.items()}
    with pytest.raises(CalibrationError, match=message) as error:
        calibrated(llama, **there)
    assert "\n" not in str(error.value)


@torch.inference_mode()
def static_scale_and_inputs(path: Path, windows: list[list[int]]) -> tuple[ActivationQuant, torch.Tensor]:
    """For the first linear of a block whose hidden states have a channel that grows with the position."""
    checkpoint = Checkpoint(path)
    states = HiddenStates(checkpoint.model, windows)
    states.run_stem(float_stem(checkpoint))
    for batch, state in zip(states.batches, states.states, strict=True):
        state[:, 0] += torch.from_numpy(batch.positions) / 4
    target = observe(checkpoint.model, float_part(checkpoint, 0), states).targets["qkv"]
    return static_act(target.stats.amax), target.stats.sample


def test_lengths_as_served_beat_a_fixed_length_where_ranges_grow(tmp_path: Path) -> None:
    """SLAC: of as many tokens, windows as long as the requests see what a static scale must cover at their end."""
    save_model("llama", tmp_path / "model", num_hidden_layers=1, max_position_embeddings=256)
    (tmp_path / "served.json").write_text(json.dumps({"12": 3, "250": 1}))
    fixed = calibrated(tmp_path / "model", "random", 40, 16)
    served = calibrated(tmp_path / "model", "random", 40, 16, tmp_path / "served.json")
    assert fixed.tokens.tokens == served.tokens.tokens
    long_windows = calibrated(tmp_path / "model", "random", 4, 250, seed=1).windows
    _, long = static_scale_and_inputs(tmp_path / "model", long_windows)
    errors = []
    for windows in (fixed.windows, served.windows):
        act, _ = static_scale_and_inputs(tmp_path / "model", windows)
        errors.append(relative_error(quantize_activations(long, act), long))
    assert errors[1] < 0.1 * errors[0]
    assert errors[1] < 1e-3
