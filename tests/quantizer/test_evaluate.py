"""Perplexity as methods define it. Oracle: transformers' loss, window by window."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from fptq_runtime.kernels.reference import ReferenceBackend
from fptq_runtime.models.tokenizer import Tokenizer
from fptq_runtime.quantizer import evaluate as module
from fptq_runtime.quantizer.calibrate import CalibrationError, Text
from fptq_runtime.quantizer.evaluate import evaluate, split_windows
from tests.quantizer.models import save_model

TEXT = Text("fox", "The quick brown fox jumps over the lazy dog, and then some more. " * 9, "0" * 64)


def test_windows() -> None:
    """BOS counts towards the window; a rest that scores nothing is left out."""
    assert split_windows([5, 6, 7, 8, 9], [1], 3) == [[1, 5, 6], [1, 7, 8], [1, 9]]
    assert split_windows([5, 6, 7, 8], [], 3) == [[5, 6, 7]]
    assert split_windows([], [1], 3) == []


@pytest.mark.parametrize("chunk_floats", [260 * 50, 1 << 25])
def test_is_transformers_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_floats: int) -> None:
    """Windows of the model's 128 tokens, whole and in chunks of fifty."""
    monkeypatch.setattr(module, "LOGITS_FLOATS", chunk_floats)
    model = save_model("llama", tmp_path)
    tokenizer = Tokenizer(tmp_path)
    ids = tokenizer.encode(TEXT.content, add_special_tokens=False)
    total, count = 0.0, 0
    for start in range(0, len(ids), 127):
        window = torch.tensor([[1, *ids[start : start + 127]]])
        with torch.no_grad():
            total += float(model(window, labels=window).loss) * (window.shape[1] - 1)
        count += window.shape[1] - 1
    result = evaluate(tmp_path, TEXT, ReferenceBackend(), kv_dtype="float32")
    assert result.tokens == count == len(ids)
    assert result.window == 128
    assert result.perplexity == pytest.approx(math.exp(total / count), rel=1e-4)
    assert (result.text, result.text_sha256) == (TEXT.name, TEXT.sha256)
    shorter = evaluate(tmp_path, TEXT, ReferenceBackend(), kv_dtype="float32", max_tokens=50)
    assert shorter.tokens == 50


def test_nothing_to_score(tmp_path: Path) -> None:
    save_model("llama", tmp_path)
    with pytest.raises(CalibrationError, match="too short"):
        evaluate(tmp_path, Text("empty", "", ""), ReferenceBackend())
