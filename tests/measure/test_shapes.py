"""Shapes as artifacts: what is written is what serves."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.shape_artifact import write_shape_artifact
from fptq_runtime.artifact.io import verify
from fptq_runtime.engine.llm import LLM
from fptq_runtime.engine.request import SamplingParams
from fptq_runtime.kernels.select import select_backend
from fptq_runtime.measure.shapes import CONFIGS, SHAPES
from fptq_runtime.models.families import parse_config


def reshape(monkeypatch: pytest.MonkeyPatch, **changes: int) -> None:
    monkeypatch.setitem(CONFIGS, "llama-3.2-1b", {**CONFIGS["llama-3.2-1b"], **changes})
    monkeypatch.setitem(SHAPES, "llama-3.2-1b", parse_config(CONFIGS["llama-3.2-1b"]))


@pytest.mark.parametrize("head_bits", [4, 8])
def test_a_shape_is_an_artifact(head_bits: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two layers of it, and a vocabulary larger than the demo's."""
    reshape(monkeypatch, num_hidden_layers=2, vocab_size=5000, hidden_size=256, intermediate_size=512,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
    path = write_shape_artifact("llama-3.2-1b", tmp_path / "out", select_backend("auto", 1), head_bits)
    verify(path)
    llm = LLM(path, max_num_seqs=1, kv_cache_memory=1 << 20, threads=1)
    assert llm.engine.tokenizer.vocab_size == 5000
    [[answer]] = llm.generate(["Once upon a time"], SamplingParams(max_tokens=4, ignore_eos=True))
    assert len(answer.token_ids) == 4


MEASURED = """
import sys
from fptq_runtime.kernels.select import select_backend
from fptq_runtime.models.loader import Checkpoint, load_model
def memory(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) / 1024
backend = select_backend("native", 2)
before = memory("VmRSS")
model = load_model(Checkpoint(sys.argv[1]), backend)
print(memory("VmRSS") - before, memory("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_model_holds_its_packed_weights_and_little_more(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """18 MiB of int4 linears and a head of 16 MiB; neither the file's copy of them nor its 64 MiB of embeddings."""
    reshape(monkeypatch, num_hidden_layers=3, vocab_size=32768, hidden_size=1024, intermediate_size=3072,
            num_attention_heads=16, num_key_value_heads=8, max_position_embeddings=1024)
    path = write_shape_artifact("llama-3.2-1b", tmp_path / "out", select_backend("native", 1), 4)
    run = subprocess.run([sys.executable, "-c", MEASURED, str(path)], capture_output=True, text=True, check=True)
    held, peak = map(float, run.stdout.split())
    packed = 35
    assert packed - 8 < held < packed + 8
    assert peak < 1.15 * (packed + 16) + 8
