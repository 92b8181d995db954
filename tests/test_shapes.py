"""Shapes as artifacts: what is written is what serves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fptq_runtime.artifact.io import verify
from fptq_runtime.engine.llm import LLM
from fptq_runtime.engine.request import SamplingParams
from fptq_runtime.kernels.select import select_backend
from fptq_runtime.shapes import SHAPES, write_shape_artifact


@pytest.mark.parametrize("head_bits", [4, 8])
def test_a_shape_is_an_artifact(head_bits: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two layers of it, and a vocabulary larger than the demo's."""
    monkeypatch.setitem(SHAPES, "llama-3.2-1b", replace(
        SHAPES["llama-3.2-1b"], num_layers=2, vocab_size=5000, hidden_size=256, intermediate_size=512, num_heads=4,
        num_kv_heads=2, max_position_embeddings=64))
    path = write_shape_artifact("llama-3.2-1b", tmp_path / "out", select_backend("auto", 1), head_bits)
    verify(path)
    llm = LLM(path, max_num_seqs=1, kv_cache_memory=1 << 20, threads=1)
    assert llm.engine.tokenizer.vocab_size == 5000
    [[answer]] = llm.generate(["Once upon a time"], SamplingParams(max_tokens=4, ignore_eos=True))
    assert len(answer.token_ids) == 4
