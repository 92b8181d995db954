"""What `fptq bench` measures with: a shape with random weights, and rows for both phases."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fptq_runtime import cli
from fptq_runtime.engine.engine import Engine
from fptq_runtime.engine.stats import StepStats
from fptq_runtime.kernels.base import Roofs
from fptq_runtime.kernels.select import select_backend
from fptq_runtime.measure import bench
from fptq_runtime.measure.bench import Row, bench_config, measure, shape_engine
from fptq_runtime.measure.shapes import CONFIGS, SHAPES, NoText
from fptq_runtime.models.families import parse_config


@pytest.fixture(autouse=True)
def _small_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two layers and a small vocabulary of each."""
    for name, config in CONFIGS.items():
        monkeypatch.setitem(SHAPES, name, parse_config({
            **config, "num_hidden_layers": 2, "vocab_size": 512, "intermediate_size": 256,
            "max_position_embeddings": 256}))


def engine_for(name: str, row: Row, head_bits: int = 4, budget: int = 512) -> Engine:
    backend = select_backend(threads=1)
    config = bench_config(SHAPES[name].config, [row], 3, backend, max_num_batched_tokens=budget)
    return shape_engine(name, head_bits, backend, config)


@pytest.mark.parametrize("name", ["llama-3.2-1b", "qwen2.5-0.5b", "llama-2-7b"])
@pytest.mark.parametrize("head_bits", [4, 8])
def test_a_shape_runs(name: str, head_bits: int) -> None:
    row = Row(3, 20)
    engine = engine_for(name, row, head_bits)
    prefill, decode = (steps.against(None) for steps in measure(engine, row, steps=3, seconds=0))
    assert (prefill.phase, decode.phase) == ("prefill", "decode")
    assert {(one.batch, one.context) for one in (prefill, decode)} == {(3, 20)}
    assert min(prefill.tokens_per_s, prefill.step_ms, decode.tokens_per_s, decode.step_ms) > 0
    assert 0 < prefill.percent_outside_kernels < 100 and prefill.percent_of_roof is prefill.bound is None
    assert not engine.has_unfinished_requests


@pytest.mark.parametrize(("row", "budget"), [(Row(1, 5), 512), (Row(8, 13), 9), (Row(5, 20), 16), (Row(4, 3), 5)])
def test_decoding_is_measured_with_every_sequence_and_no_prompt(
    row: Row, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a few tokens a step compute the prompts one after the other, while the first ones decode."""
    engine = engine_for("qwen2.5-0.5b", row, budget=budget)
    seen: list[StepStats] = []
    step = engine.step

    def spy() -> object:
        outputs, stats = step()
        seen.append(stats)
        return outputs, stats

    monkeypatch.setattr(engine, "step", spy)
    prefill, decode = measure(engine, row, steps=3, seconds=0)
    pure = [one for one in seen if one.generated_tokens == row.batch and not one.prompt_tokens]
    assert decode.seconds == [one.step_seconds for one in pure] and len(pure) == 3
    assert decode.tokens == 3 * row.batch
    assert prefill.seconds == [one.step_seconds for one in seen if one.prompt_tokens]
    assert sum(one.prompt_tokens for one in seen) == row.batch * row.context
    assert not any(one.preemptions or one.prefix_hit_tokens for one in seen)


@given(batch=st.integers(1, 40), context=st.integers(1, 3000), steps=st.integers(1, 50), budget=st.integers(41, 1024))
def test_those_computed_first_last_until_the_last_was_measured(batch: int, context: int, steps: int, budget: int
                                                               ) -> None:
    """First come, first served: each step gives a token to those that decode, and what is left to the prompts."""
    left = [context] * batch
    produced = [0] * batch
    while any(left):
        room = budget - sum(not tokens for tokens in left)
        for index, tokens in enumerate(left):
            if tokens:
                left[index] -= min(tokens, room)
                room -= min(tokens, room)
            if not left[index]:
                produced[index] += 1
    assert max(produced) + steps <= Row(batch, context).output_tokens(steps, budget)


def test_the_roofs_bound_a_step() -> None:
    """400 multiply-adds at 100 ops/s take 8 s, 60 bytes at 6 bytes/s 10 s; the steps took 20 s."""
    steps = bench.Steps("decode", Row(2, 8), [9.0, 10.0, 14.0], 6, 16.5, 400, 60)
    measured = steps.against(Roofs(1e-7, 6e-9))
    assert steps.total_seconds == 30  # three times the median
    assert measured.tokens_per_s == pytest.approx(0.2) and measured.step_ms == 10000
    assert measured.percent_of_roof == pytest.approx(100 / 3) and measured.bound == "memory"
    assert measured.percent_outside_kernels == pytest.approx(50)
    assert steps.against(Roofs(2e-8, 6e-9)).bound == "compute"


def test_an_executor_says_what_a_step_must_do() -> None:
    shape = SHAPES["qwen2.5-0.5b"].config
    engine = engine_for("qwen2.5-0.5b", Row(1, 8))
    hidden, inner, heads = shape.hidden_size, shape.intermediate_size, 2 * shape.num_kv_heads + shape.num_heads
    layer = heads * shape.head_dim * hidden + hidden * hidden + 3 * hidden * inner
    one = engine.executor.work(10, 3)
    if engine.backend.name == "native":
        of_rows = hidden * hidden + 3 * hidden * inner + 512 * hidden  # all after the last attention
        assert one.multiply_adds == 10 * (2 * layer + 512 * hidden - of_rows) + 3 * of_rows
        weights = 2 * layer + 512 * hidden
        assert 1 + 2 * 8 / 128 / 4 <= one.weight_bytes / (weights / 2) <= 1 + 4 * 8 / 128 / 4
        assert engine.executor.work(10, 0).weight_bytes < one.weight_bytes


def test_the_default_rows() -> None:
    model = replace(SHAPES["llama-3.2-1b"].config, max_position_embeddings=32768)
    default = bench.rows((), (), model, 24, 512)
    assert {row.batch for row in default if row.context == 512} == {1, 2, 4, 8, 16, 32}
    assert {row.batch for row in default if row.context == 2048} == {1, 8}
    assert bench.rows((3,), (7, 100), model, 24, 512) == [Row(3, 7), Row(3, 100)]
    assert bench.rows((5,), (), model, 24, 512) == [Row(5, 512), Row(5, 2048)]
    assert bench.rows((), (100,), model, 24, 512) == [Row(batch, 100) for batch in (1, 2, 4, 8, 16, 32)]


def test_rows_fit_the_model() -> None:
    model = SHAPES["llama-3.2-1b"].config  # 256 positions
    assert bench.rows((), (), model, 8, 512)[0] == Row(1, 128)
    with pytest.raises(ValueError, match=r"2 prompts of 250 tokens .* exceed the model's 256 positions"):
        bench.rows((2,), (250,), model, 8, 512)
    with pytest.raises(ValueError, match="40 prompts of 240 tokens"):
        bench.rows((40,), (240,), model, 8, 512)
    with pytest.raises(ValueError, match="256 positions"):
        bench.rows((200,), (), model, 8, 512)


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", "--shape", "llama-3.2-1b", "--context", "16", "--steps", "2", "--seconds", "0"]
    with pytest.raises(SystemExit) as exit_code:
        cli.main([*arguments, "--batch", "1", "--batch", "3", "--json"])
    assert exit_code.value.code == 0
    answer = json.loads(capsys.readouterr().out)
    assert [(row["phase"], row["batch"], row["context"]) for row in answer["results"]] == [
        ("prefill", 1, 16), ("decode", 1, 16), ("prefill", 3, 16), ("decode", 3, 16)]
    assert "llama-3.2-1b, random weights, 4-bit head" in answer["model"] and answer["machine"]
    if answer["kernels"]["backend"] == "native":
        assert answer["roofs"]["gops"] > 1 and answer["roofs"]["read_gb_per_s"] > 0.1
        assert all(0 < row["percent_of_roof"] < 200 for row in answer["results"])
    with pytest.raises(SystemExit):
        cli.main([*arguments, "--batch", "2", "--phase", "decode", "--head-bits", "8"])
    table = capsys.readouterr().out
    assert "8-bit head" in table and "outside kernels" in table
    assert [line.split()[:3] for line in table.splitlines() if "16" in line.split()[:3]] == [["decode", "2", "16"]]


def test_the_command_measures_an_artifact(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_code:
        cli.main(["bench", "demo", "--batch", "2", "--context", "8", "--steps", "2", "--seconds", "0", "--json"])
    assert exit_code.value.code == 0
    assert {row["tokens_per_s"] > 0 for row in json.loads(capsys.readouterr().out)["results"]} == {True}


def test_the_command_offers_every_shape() -> None:
    """It lists them itself, since help must not import torch."""
    [option] = [parameter for parameter in cli.cli.commands["bench"].params if parameter.name == "shape"]
    assert list(option.type.choices) == list(SHAPES)  # type: ignore[attr-defined]


def test_no_steps_leave_nothing_to_measure() -> None:
    with pytest.raises(ValueError, match="1 step or more, not 0"):
        measure(None, Row(1, 8), steps=0)  # type: ignore[arg-type]


def test_no_text_is_no_text() -> None:
    stream = NoText().stream()
    assert stream.step(3) == stream.flush() == ""
