"""What `fptq bench` measures with: a shape with random weights, and rows for both phases."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fptq_runtime import cli
from fptq_runtime.bench import NoText, measure, shape_engine
from fptq_runtime.config import EngineConfig
from fptq_runtime.shapes import SHAPES

CONFIG = EngineConfig(max_model_len=64, max_num_seqs=4, kv_cache_memory=8 << 20, threads=1)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("head_bits", [4, 8])
def test_a_shape_runs(name: str, head_bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two layers and a small vocabulary of it."""
    monkeypatch.setitem(SHAPES, name, replace(SHAPES[name], num_layers=2, vocab_size=512, intermediate_size=256,
                                              max_position_embeddings=64))
    engine = shape_engine(name, head_bits, "auto", CONFIG)
    prefill, decode = measure(engine, 3, 20, 4, 1)
    assert (prefill.phase, decode.phase) == ("prefill", "decode")
    assert {(row.batch, row.context) for row in (prefill, decode)} == {(3, 20)}
    assert min(prefill.tokens_per_s, prefill.step_ms, decode.tokens_per_s, decode.step_ms) > 0
    assert not engine.has_unfinished_requests


def test_the_command_offers_every_shape() -> None:
    """It lists them itself, since help must not import torch."""
    [option] = [parameter for parameter in cli.cli.commands["bench"].params if parameter.name == "shape"]
    assert list(option.type.choices) == list(SHAPES)  # type: ignore[attr-defined]


def test_one_output_token_leaves_nothing_to_decode() -> None:
    with pytest.raises(ValueError, match="2 output tokens or more, not 1"):
        measure(None, 1, 8, 1, 1)  # type: ignore[arg-type]


def test_no_text_is_no_text() -> None:
    stream = NoText().stream()
    assert stream.step(3) == stream.flush() == ""
