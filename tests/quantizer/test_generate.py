"""Windows that the model writes. Oracle: transformers on the same tokens, and its greedy choice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fptq_runtime.kernels.base import Backend
from fptq_runtime.kernels.reference import ReferenceBackend
from fptq_runtime.kernels.select import select_backend
from fptq_runtime.models.loader import Checkpoint, load_model
from fptq_runtime.models.tokenizer import Tokenizer
from fptq_runtime.quantizer import generate
from fptq_runtime.quantizer.calibrate import CalibrationError
from fptq_runtime.quantizer.generate import Turns, find_turns, generate_windows
from tests.quantizer.models import save_model

LENGTHS = [20, 2, 33, 1, 20, 40, 7]


def made(path: Path, lengths: list[int], seed: int = 0, backend: Backend | None = None) -> list[list[int]]:
    backend = backend or ReferenceBackend()
    return generate_windows(load_model(Checkpoint(path), backend), backend, Tokenizer(path), lengths, seed)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module]:
    path = tmp_path_factory.mktemp("llama")
    return path, save_model("llama", path)


def test_greedy_first_then_likely(llama: tuple[Path, torch.nn.Module]) -> None:
    """The random first token differs, three to five follow greedily, and what follows those is drawn: as likely on
    average as the model's own distribution makes it, and not its best token."""
    path, model = llama
    windows = made(path, [30] * 16)
    assert {len(window) for window in windows} == {30}
    assert all(window[0] == 1 for window in windows)
    assert len({window[1] for window in windows}) > 8
    tokens = torch.tensor(windows)
    with torch.no_grad():
        logits = model(tokens).logits[:, :-1]
    logits[..., model.config.eos_token_id] = -torch.inf
    best = logits.argmax(-1) == tokens[:, 1:]
    assert bool(best[:, 1:4].all())
    assert not bool(best[:, 4:6].all())
    logprobs = logits.log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs.clamp_min(-1e4)).sum(-1)[:, 6:]
    surprise = -logprobs.gather(-1, tokens[:, 1:, None])[:, 6:, 0]
    spread = float(surprise.std()) / surprise.numel() ** 0.5
    assert abs(float(surprise.mean() - entropy.mean())) < 4 * spread


def test_a_window_is_its_own(llama: tuple[Path, torch.nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the batch nor later windows change it; the seed does; no end of sequence within."""
    windows = made(llama[0], LENGTHS)
    assert [len(window) for window in windows] == LENGTHS
    assert made(llama[0], LENGTHS[:4]) == windows[:4]
    assert made(llama[0], LENGTHS, seed=1) != windows
    assert all(2 not in window[2:] for window in windows)
    monkeypatch.setattr(generate, "BATCH", 2)
    assert made(llama[0], LENGTHS) == windows


def test_native_backend(llama: tuple[Path, torch.nn.Module]) -> None:
    """The same first tokens; later a last bit may tip a draw."""
    native = select_backend("auto")
    if native.name == "reference":
        pytest.skip("the native extension is not built")
    ours = made(llama[0], LENGTHS, backend=native)
    assert [window[:4] for window in ours] == [window[:4] for window in made(llama[0], LENGTHS)]
    assert [len(window) for window in ours] == LENGTHS


TEMPLATE = ("{% for m in messages %}{{ '[' + m.role + ']' + m.content + ('/' if m.role == 'user' else eos_token) }}"
            "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}")


def test_turns(llama: tuple[Path, torch.nn.Module]) -> None:
    tokenizer = Tokenizer(llama[0], TEMPLATE)
    turns = find_turns(tokenizer)
    assert turns is not None
    assert [tokenizer.decode(part, False) for part in (turns.opening, turns.answer, turns.question)] == [
        "[user]", "/[assistant]", "</s>[user]"]
    assert find_turns(Tokenizer(llama[0])) is None
    for changed in ("{{ messages[0].content }}", "{{ messages[0].content.upper() }}", "{{ raise_exception('no') }}"):
        assert find_turns(Tokenizer(llama[0], changed)) is None


def test_conversations(llama: tuple[Path, torch.nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every other window is one: the template's words in their places, and none of the ends that this model often draws
    anywhere else. The others are what they are without."""
    monkeypatch.setattr(generate, "QUESTION_TOKENS", 9)
    backend, tokenizer = ReferenceBackend(), Tokenizer(llama[0])
    turns = Turns((1, 7, 8, 9), (10, 11, 12), (2, 13))
    decoder, lengths = load_model(Checkpoint(llama[0]), backend), [120, 120, 3, 3, 120, 120, 60, 100]
    ends = (2, *range(20, 260, 9))
    decoder.config = replace(decoder.config, eos_token_ids=ends)
    windows = generate_windows(decoder, backend, tokenizer, lengths, 0, turns=turns)
    assert [len(window) for window in windows] == lengths
    assert windows[::2] == generate_windows(decoder, backend, tokenizer, lengths, 0)[::2]
    assert windows[3] == [1, 7, 8]
    assert windows[1][4:13] != windows[5][4:13]
    answered = 0
    for window in (windows[1], windows[5], windows[7]):
        rest, part, asking = window, turns.opening, True
        while rest:
            assert rest[: len(part)] == [*part[: len(rest)]]
            rest = rest[len(part) :]
            part = turns.answer if asking else turns.question
            end = next((i for i in range(len(rest)) if (*rest[i : i + len(part)],) == part[: len(rest) - i]), len(rest))
            assert not set(ends) & set(rest[:end])
            assert not asking or end <= 9
            answered += not asking and end < len(rest)
            rest, asking = rest[end:], not asking
    assert answered > 3


def test_too_long(llama: tuple[Path, torch.nn.Module]) -> None:
    with pytest.raises(CalibrationError, match="context of 128"):
        made(llama[0], [129])
