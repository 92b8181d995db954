"""The planner's clock, fits and fleets, against queues whose answers are known."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fptq_runtime import cli
from fptq_runtime.engine.request import SamplingParams
from fptq_runtime.engine.scheduler import SchedulerOutput
from fptq_runtime.errors import FptqError
from fptq_runtime.measure.plan import (
    TRACE_BLOCK,
    Arrival,
    Objective,
    Simulator,
    StepCost,
    day,
    parse_slo,
    plan,
    read_trace,
)
from tests.engine.fake import make_engine

FOREVER = (Objective("ttft", 99, 1e9), Objective("itl", 99, 1e9), Objective("e2e", 50, 1e9))


def profile(seconds: Callable[[int], float], pair: float = 0.0, **changes: Any) -> dict[str, Any]:
    """As `fptq bench --json` would print, of a machine whose steps take seconds(rows), and `pair` for each pair."""
    results = []
    for context in (128, 512, 1024):
        for batch in (1, 8, 64):
            rows = [512] * (batch * context // 512) + ([batch * context % 512] if batch * context % 512 else [])
            prefill = sum(map(seconds, rows)) + pair * batch * context**2 / 2
            decode = seconds(batch) + pair * batch * context
            results += [{"phase": "prefill", "batch": batch, "context": context,
                         "tokens_per_s": batch * context / prefill},
                        {"phase": "decode", "batch": batch, "context": context, "tokens_per_s": batch / decode}]
    return {"model": "known", "max_num_batched_tokens": 512, "max_model_len": 4096, "token_bytes": 1000,
            "results": results, **changes}


FLAT = profile(lambda rows: 0.1)


def test_the_fit_finds_what_steps_took() -> None:
    cost = StepCost.fit(profile(lambda rows: 0.01 + 0.001 * rows, pair=1e-6))
    assert np.interp([1, 8, 40, 64, 300, 512], cost.rows, cost.seconds) == pytest.approx(
        [0.011, 0.018, 0.05, 0.074, 0.31, 0.522])
    assert (cost.prompt_pair, cost.answer_pair) == pytest.approx((1e-6, 1e-6))
    with pytest.raises(FptqError, match="both phases"):
        StepCost.fit({**FLAT, "results": [row for row in FLAT["results"] if row["phase"] == "decode"]})
    with pytest.raises(FptqError, match="what `fptq bench --json` prints"):
        StepCost.fit({})


def test_one_request_takes_its_steps() -> None:
    """A prompt of three steps and four more tokens, 0.1 s a step."""
    outcome = Simulator(FLAT, [Arrival(0, 1100, 5)], FOREVER).run(1, "round-robin")
    assert outcome.percentiles == pytest.approx({"ttft_p99": 0.3, "itl_p99": 0.1, "e2e_p50": 0.7})
    assert outcome.seconds == pytest.approx(0.7) and outcome.tokens_per_s == pytest.approx(5 / 0.7)
    assert (outcome.prompt_tokens, outcome.output_tokens, outcome.met) == (1100, 5, True)


def test_tokens_take_time_beside_their_steps() -> None:
    """The three steps of a prompt sample once; two answers at once are two tokens a step."""
    outcome = Simulator(FLAT, [Arrival(0, 1100, 5)], FOREVER, delivery=0.01).run(1, "round-robin")
    assert outcome.percentiles == pytest.approx({"ttft_p99": 0.31, "itl_p99": 0.11, "e2e_p50": 0.75})
    both = Simulator(FLAT, [Arrival(0, 100, 5)] * 2, [Objective("itl", 50, 1e9)], delivery=0.01).run(1, "round-robin")
    assert both.percentiles == pytest.approx({"itl_p50": 0.12})


def test_a_queue_of_one_server_is_lindleys() -> None:
    """One sequence at a time and one step each: the wait is the recursion of a single server."""
    generator = np.random.default_rng(0)
    at = np.cumsum(generator.exponential(0.12, 500)) - 0.01
    outcome = Simulator(FLAT, [Arrival(float(t), 100, 1) for t in at], [Objective("ttft", 99, 1e9)],
                        max_num_seqs=1).run(1, "round-robin")
    free, took = 0.0, []
    for t in at:
        free = max(free, t) + 0.1
        took.append(free - t)
    assert outcome.percentiles["ttft_p99"] == pytest.approx(np.percentile(took, 99))
    assert outcome.seconds == pytest.approx(free)


def test_the_smallest_fleet() -> None:
    """Ten a second, each 0.1 s of one server: two replicas in turn are idle at times, one is late by and by."""
    trace = [Arrival(0.0999 * index, 100, 1) for index in range(400)]
    simulator = Simulator(FLAT, trace, [Objective("ttft", 99, 0.11)], max_num_seqs=1)
    one, found = simulator.run(1, "round-robin"), simulator.smallest("round-robin")
    assert not one.met and one.broken and found.met and found.replicas == 2
    with pytest.raises(FptqError, match=r"no fleet meets it.*ttft_p99 is 100 ms"):
        Simulator(FLAT, trace, [Objective("ttft", 99, 0.05)]).smallest("round-robin")


def test_prefixes_are_shared_as_the_trace_says() -> None:
    """Eight conversations of 1024 common tokens; a replica that had one computes only what is new."""
    trace = [Arrival(2.0 * turn + 0.01 * talk, 2 * TRACE_BLOCK + 100, 2,
                     (10 * talk, 10 * talk + 1, 1000 + 8 * turn + talk)) for turn in range(6) for talk in range(8)]
    simulator = Simulator(FLAT, trace, FOREVER)
    by_prefix, in_turn = simulator.run(3, "prefix"), simulator.run(3, "round-robin")
    assert by_prefix.cached_tokens == 5 * 8 * 2 * TRACE_BLOCK
    assert in_turn.cached_tokens < by_prefix.cached_tokens
    assert simulator.run(1, "round-robin").cached_tokens == by_prefix.cached_tokens
    assert in_turn.prompt_tokens == by_prefix.prompt_tokens == sum(each.prompt_tokens for each in trace)
    assert not Simulator(FLAT, [each._replace(blocks=()) for each in trace], FOREVER).run(1, "prefix").cached_tokens


def test_an_itl_target_shortens_steps() -> None:
    """Steps of 512 tokens take 0.52 s; who decodes meanwhile is to wait for 0.1 s."""
    trace = [Arrival(0, 16, 200), *(Arrival(1.0 + index, 1000, 2) for index in range(8))]
    slow = profile(lambda rows: 0.01 + 0.001 * rows)
    objective = [Objective("itl", 99, 1e9)]
    assert Simulator(slow, trace, objective).run(1, "round-robin").percentiles["itl_p99"] > 0.4
    assert Simulator(slow, trace, objective, itl_target=0.1).run(1, "round-robin").percentiles["itl_p99"] < 0.15


def test_a_sample_stands_for_a_fleet() -> None:
    """A tenth of the replicas with a tenth of the requests, at random times, is as busy as all."""
    at = np.cumsum(np.random.default_rng(0).exponential(0.01, 4000))
    trace = [Arrival(float(t), 100, 4) for t in at]
    smooth, objectives = profile(lambda rows: 0.01 + 0.001 * rows), [Objective("e2e", 50, 1e9)]
    whole, part = (plan(smooth, trace, objectives, replicas=40, sample=sample, cost_per_hour=1.0)
                   for sample in (None, 4))
    assert part.fleets[0].replicas == 40
    assert part.cost_per_million(part.fleets[0]) == pytest.approx(whole.cost_per_million(whole.fleets[0]), rel=0.1)
    assert part.fleets[0].percentiles["e2e_p50"] == pytest.approx(whole.fleets[0].percentiles["e2e_p50"], rel=0.1)
    with pytest.raises(FptqError, match="sample is a part"):
        plan(smooth, trace, objectives, sample=4)


def test_a_day() -> None:
    arrivals = list(day([Arrival(0, 100, 4)], 0.5))
    hours = np.bincount([int(each.seconds // 3600) for each in arrivals], minlength=24)
    assert len(hours) == 24 and hours[11:13].mean() == pytest.approx(1800, rel=0.1)
    assert hours[[0, 23]].mean() == pytest.approx(600, rel=0.2)


def test_objectives() -> None:
    assert parse_slo(" ttft_p99=2s, itl_p99.9=100ms ") == (Objective("ttft", 99, 2), Objective("itl", 99.9, 0.1))
    for wrong in ("", "ttft=2s", "ttft_p99=2", "ttft_p100=2s", "tpot_p99=2s"):
        with pytest.raises(FptqError):
            parse_slo(wrong)


def test_traces(tmp_path: Path) -> None:
    azure, mooncake = tmp_path / "azure.csv", tmp_path / "mooncake.jsonl"
    azure.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:04.9799600,4808,10\n"
                     "2023-11-16 18:17:04.4799600,3180,8\n")
    assert [each[1:3] for each in read_trace(azure)] == [(3180, 8), (4808, 10)]
    assert read_trace(azure)[1].seconds == pytest.approx(0.5)
    mooncake.write_text(json.dumps({"timestamp": 1500, "input_length": 600, "output_length": 5, "hash_ids": [0, 7]}))
    assert read_trace(mooncake) == [Arrival(0, 600, 5, (0, 7))]
    for text in ("a,b\n1,2\n", '{"timestamp": 1}', '{"timestamp": 1, "input_length": 600, "output_length": 5, '
                 '"hash_ids": [0]}', "TIMESTAMP,ContextTokens,GeneratedTokens\n"):
        azure.write_text(text)
        with pytest.raises(FptqError, match=r"azure\.csv"):
            read_trace(azure)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "profile.json").write_text(json.dumps(FLAT))
    (tmp_path / "trace.jsonl").write_text("\n".join(
        json.dumps({"timestamp": 100 * index, "input_length": 1000, "output_length": 4, "hash_ids": [0, index + 1]})
        for index in range(60)))
    command = ["plan", "--profile", str(tmp_path / "profile.json"), "--trace", str(tmp_path / "trace.jsonl")]
    command += ["--slo", "ttft_p99=250ms,itl_p99=150ms", "--cost-per-hour", "0.5"]
    plot = tmp_path / "plan.svg"
    with pytest.raises(SystemExit) as exit_code:
        cli.main([*command, "--plot", str(plot), "--json"])
    assert exit_code.value.code == 0
    answer = json.loads(capsys.readouterr().out)
    assert [fleet["routing"] for fleet in answer["fleets"]] == ["round-robin", "prefix"]
    assert all(fleet["met"] and fleet["cost_per_million_tokens"] > 0 for fleet in answer["fleets"])
    assert ET.parse(plot).getroot().tag.endswith("svg")
    with pytest.raises(SystemExit):
        cli.main([*command, "--max-model-len", "100"])
    assert "no request of the trace is shorter" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main([*command, "--replicas", "3"])
    assert "3 replicas, prefix: ttft_p99" in capsys.readouterr().out


def test_it_steps_as_the_engine_does() -> None:
    """The same prompts, all but the first during the first's step: steps of the same rows, to the last."""
    trace = [Arrival(0, 5 + 37 * index % 90, 3 + index % 7) for index in range(12)]
    engine = make_engine(max_num_seqs=5, max_num_batched_tokens=32, num_blocks=10, block_size=32, max_model_len=128)
    computed = []
    for number, each in enumerate(trace):
        engine.add_request(str(number), [1 + number] * each.prompt_tokens,
                           SamplingParams(max_tokens=each.output_tokens, ignore_eos=True, temperature=0))
        if number == 0:
            computed.append(engine.step()[1].batch_tokens)
    while engine.has_unfinished_requests:
        computed.append(engine.step()[1].batch_tokens)
    small = {**FLAT, "max_num_batched_tokens": 32, "token_bytes": 1000}
    simulator = Simulator(small, trace, FOREVER, max_num_seqs=5, max_model_len=128, kv_cache_memory=10 * 32 * 1000)
    rows, cost = [], simulator.cost

    def counted(step: SchedulerOutput) -> float:
        rows.append(step.num_tokens)
        return cost(step)

    simulator.cost = counted  # type: ignore[assignment]
    simulator.run(1, "round-robin")
    assert rows == computed
