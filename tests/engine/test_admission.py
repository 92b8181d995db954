"""What is accepted begins in time, at any load: the engine over a fake model and a fake clock."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fptq_runtime.engine.admission import Forecast, Queued, Work
from fptq_runtime.engine.engine import Engine, QueueFullError
from fptq_runtime.engine.request import Origin, SamplingParams
from tests.engine.fake import logits_after, make_engine, solo, tokens

STEP, TOKEN = 0.02, 0.0005  # seconds of a fake step, and of each token in it


def repeating(token_ids: Any) -> Any:
    """Answers that go round."""
    return logits_after(token_ids[-1:])


@dataclass
class Load:
    """What came of the requests that were sent to one engine. Seconds on its clock."""

    waits: dict[str, float] = field(default_factory=dict)  # to the first token, of those accepted
    refused: list[tuple[float, float, str]] = field(default_factory=list)  # when, retry_after, tenant
    generated: int = 0
    seconds: float = 0.0


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        for module in ("engine", "sequence"):
            monkeypatch.setattr(f"fptq_runtime.engine.{module}.time.monotonic", lambda: self.now)

    def engine(self, model: Any = logits_after, **options: Any) -> Engine[Any]:
        engine = make_engine(**{"max_num_seqs": 8, "max_num_batched_tokens": 64, "num_blocks": 512} | options)
        engine.backend.executor.model = model  # type: ignore[attr-defined]
        engine.backend.executor.before = self._tick  # type: ignore[attr-defined]
        return engine

    def _tick(self, batch: Any) -> None:
        self.now += STEP + TOKEN * len(batch.token_ids)

    def send(self, engine: Engine[Any], arrivals: list[tuple[float, int, int, str]]) -> Load:
        """(seconds, prompt tokens, tokens of the answer, tenant) each; until the last has arrived."""
        load, pending, sent, begun = Load(), sorted(arrivals), {}, self.now
        while pending or engine.has_unfinished_requests:
            while pending and begun + pending[0][0] <= self.now:
                at, prompt, answer, tenant = pending.pop(0)
                name = f"{tenant}-{len(sent)}"
                sent[name] = begun + at
                params = SamplingParams(max_tokens=answer, temperature=0, ignore_eos=True)
                try:
                    engine.add_request(name, [len(sent) % 90 + 1] * prompt, params, Origin(tenant))
                except QueueFullError as error:
                    load.refused.append((self.now - begun, error.retry_after, tenant))
            if not engine.has_unfinished_requests:
                self.now = max(self.now, begun + pending[0][0]) if pending else self.now
                continue
            for output in engine.step()[0]:
                load.generated += len(output.token_ids)
                load.waits.setdefault(output.request_id, self.now - sent[output.request_id])
            if pending:
                load.seconds = self.now - begun
        return load


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def arrivals(rate: float, seconds: float, seed: int, tenant: str = "", prompt: Callable[[random.Random], int] =
             lambda r: r.randint(4, 60)) -> list[tuple[float, int, int, str]]:
    """Poisson, with lengths of an order of magnitude."""
    random_ = random.Random(seed)
    at, made = 0.0, []
    while (at := at + random_.expovariate(rate)) < seconds:
        made.append((at, prompt(random_), random_.choice((5, 10, 20, 40, 80)), tenant))
    return made


def capacity(clock: Clock) -> tuple[float, float]:
    """Tokens and requests a second, of an engine that never lacks work."""
    load = clock.send(clock.engine(max_waiting_requests=10000), arrivals(100, 10, 9))
    return load.generated / clock.now, len(load.waits) / clock.now


@pytest.mark.parametrize(("overload", "max_wait"), [(1.3, 2.0), (3.0, 10.0), (10.0, 2.0)])
def test_at_overload_what_is_accepted_begins_in_time_and_no_capacity_is_lost(clock: Clock, overload: float,
                                                                             max_wait: float) -> None:
    tokens_per_second, requests_per_second = capacity(clock)
    load = clock.send(clock.engine(max_wait=max_wait), arrivals(overload * requests_per_second, 60, 1))
    late = [wait for wait in load.waits.values() if wait > max_wait]
    assert len(late) <= 0.01 * len(load.waits)
    assert load.refused
    assert load.generated >= 0.95 * tokens_per_second * load.seconds


@pytest.mark.parametrize("num_blocks", [512, 24])
def test_guesses_that_are_right_let_more_wait(clock: Clock, num_blocks: int) -> None:
    """As above, where a step gains several tokens of each answer, also where the cache holds few of them."""
    engine = clock.engine(repeating, max_wait=4.0, speculation=True, num_blocks=num_blocks)
    load = clock.send(engine, arrivals(50, 15, 1))
    late = [wait for wait in load.waits.values() if wait > 4.0]
    assert len(late) <= 0.02 * len(load.waits)
    assert load.refused
    assert sorted(load.waits.values())[len(load.waits) // 2] > 2.0


def test_a_burst_that_meets_a_cold_engine(clock: Clock) -> None:
    """Nothing is measured yet but the first steps."""
    engine = clock.engine(max_wait=5.0)
    burst = [(0.0 if i < 8 else 0.2, 30, 40, "") for i in range(300)]
    load = clock.send(engine, burst)
    assert max(load.waits.values()) <= 5.0
    assert len(load.waits) > 20


def test_a_burst_of_long_prompts_is_not_judged_by_who_runs_in_its_first_steps(clock: Clock) -> None:
    """A step takes in one of them alone, and answers are short: all are through in two seconds."""
    engine = clock.engine(max_wait=4.0)
    clock.send(engine, arrivals(2, 20, 7))
    load = clock.send(engine, [(0.01 * i, 150, 2, "") for i in range(25)])
    assert load.refused == []
    assert 0.5 < max(load.waits.values()) < 4.0


def test_a_cache_that_holds_few_is_taken_into_account(clock: Clock) -> None:
    engine = clock.engine(max_wait=3.0, num_blocks=20)  # two answers' worth
    clock.send(engine, [(0.05 * i, 60, 40, "") for i in range(40)])
    load = clock.send(engine, [(0.2 * i, 60, 40, "") for i in range(150)])
    assert load.refused
    assert sum(wait > 3.1 for wait in load.waits.values()) <= 0.05 * len(load.waits)


def test_below_capacity_nobody_is_refused(clock: Clock) -> None:
    _, requests_per_second = capacity(clock)
    load = clock.send(clock.engine(max_wait=10.0), arrivals(0.8 * requests_per_second, 60, 2))
    assert load.refused == []


def test_retry_after_is_when_a_place_is_free(clock: Clock) -> None:
    """Of a queue that nobody joins meanwhile, within a factor of two."""
    engine = clock.engine(max_wait=4.0, max_waiting_requests=10000)
    clock.send(engine, arrivals(30, 20, 3))
    for i in range(1000):
        try:
            engine.add_request(str(i), [i % 90 + 1] * 30, SamplingParams(max_tokens=40, temperature=0, ignore_eos=True))
        except QueueFullError:
            break
    params = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)
    engine.step()
    engine.config.__dict__["max_wait"] = 1.0  # as a client's own limit
    with pytest.raises(QueueFullError) as refused:
        engine.add_request("late", [1] * 30, params)
    begun = clock.now
    while True:
        engine.step()
        try:
            engine.add_request("late", [1] * 30, params)
            break
        except QueueFullError:
            pass
    assert 0.5 <= refused.value.retry_after / (clock.now - begun) <= 2


def test_a_prompt_that_takes_longer_than_anyone_may_wait_is_served_some_day(clock: Clock) -> None:
    engine = clock.engine(max_wait=0.5, max_model_len=4096)
    clock.send(engine, arrivals(5, 5, 4))
    load = clock.send(engine, [(0.0, 3000, 5, "")])
    assert not load.refused
    assert [wait > 0.5 for wait in load.waits.values()] == [True]


def test_one_tenants_flood_leaves_another_its_latency(clock: Clock) -> None:
    _, requests_per_second = capacity(clock)
    quiet = arrivals(0.2 * requests_per_second, 60, 5, "quiet")
    alone = clock.send(clock.engine(max_wait=10.0), quiet)
    together = clock.send(clock.engine(max_wait=10.0), quiet + arrivals(8 * requests_per_second, 60, 6, "loud"))
    assert all(tenant == "loud" for _, _, tenant in together.refused)
    of_quiet = sorted(wait for name, wait in together.waits.items() if name.startswith("quiet"))
    assert len(of_quiet) == len(quiet)
    slot = 45 * (STEP + 16 * TOKEN) / 8  # that a running answer of the other holds before it is the quiet one's turn
    median = sorted(alone.waits.values())[len(quiet) // 2]
    assert of_quiet[len(quiet) // 2] <= 1.5 * (median + slot)


def test_the_caps_are_shared_too(clock: Clock) -> None:
    engine = clock.engine(max_waiting_requests=12)
    params = SamplingParams(max_tokens=5, temperature=0)
    taken = dict.fromkeys("ab", 0)
    for tenant in "ab":
        for i in range(30):
            try:
                engine.add_request(f"{tenant}{i}", [1, 2], params, Origin(tenant))
                taken[tenant] += 1
            except QueueFullError:
                pass
    assert taken == {"a": 20, "b": 10}


def test_prompts_leave_answers_their_pace(clock: Clock) -> None:
    """Steps of one answer and of long prompts: as long as wanted and no longer, and prompts get on all the same."""
    longest: dict[float | None, float] = {}
    for target in (None, 0.03, 0.001):
        engine = clock.engine(max_num_batched_tokens=200, max_model_len=1024, itl_target=target)
        clock.send(engine, arrivals(5, 5, 4))
        params = SamplingParams(max_tokens=150, temperature=0, ignore_eos=True)
        engine.add_request("answer", [1] * 9, params)
        for _ in range(5):
            engine.step()
        for i in range(4):
            engine.add_request(str(i), [i + 2] * 500, replace(params, max_tokens=2))
        begun, seconds, ended = clock.now, [], set()
        while engine.has_unfinished_requests:
            for output in engine.step()[0]:
                if output.finish_reason is not None:
                    ended.add(output.request_id)
            if "answer" not in ended:
                seconds.append(clock.now - begun)
            begun = clock.now
            engine.check_integrity()
        assert len(ended) == 5
        longest[target] = max(seconds)
    assert longest[None] > 0.1
    assert longest[0.03] <= 0.031
    assert longest[0.001] <= STEP + TOKEN * 22, "of a prompt a step always has a little"


def test_priorities_go_first(clock: Clock) -> None:
    engine = clock.engine()
    params = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)
    order: list[str] = []
    for i in range(30):
        engine.add_request(f"later-{i}", [i + 1] * 9, params, Origin(priority=1))
    for i in range(4):
        engine.add_request(f"sooner-{i}", [i + 40] * 9, params, Origin(priority=-1))
    while engine.has_unfinished_requests:
        for output in engine.step()[0]:
            if output.num_output_tokens == 1:
                order.append(output.request_id)
        engine.check_integrity()
    assert order[:4] == [f"sooner-{i}" for i in range(4)]
    assert order[4:] == [f"later-{i}" for i in range(30)]


def test_tenants_share_no_prefix() -> None:
    prompt, params = list(range(1, 65)), SamplingParams(max_tokens=2, temperature=0)
    engine = make_engine()
    cached = []
    for name, tenant in (("1", "a"), ("2", "a"), ("3", "b"), ("4", ""), ("5", "b")):
        engine.add_request(name, prompt, params, Origin(tenant))
        events = []
        while engine.has_unfinished_requests:
            events += engine.step()[0]
        assert tokens(events) == tokens(solo(prompt, params)[0])
        cached.append(events[-1].num_cached_tokens)
    assert cached == [0, 48, 0, 0, 48]


@given(st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 5000)), max_size=30), st.integers(0, 30),
       st.integers(1, 40), st.integers(1, 9000), st.lists(st.tuples(st.integers(0, 600), st.floats(0, 10))),
       st.lists(st.tuples(st.integers(0, 6000), st.booleans())))
def test_a_forecast_is_a_time(works: list[tuple[int, int]], running: int, slots: int, prompt: int,
                              steps: list[tuple[int, float]], answers: list[tuple[int, bool]]) -> None:
    forecast = Forecast(512)
    for step in steps:
        forecast.observe_step(*step)
    for answer in answers:
        forecast.observe_answer(*answer)
    assert all(0 <= forecast.output(Work(1, k, 900)) <= 900 - k for k in (0, 1, 50, 899, 900))
    work = [Work(prompt, most // 3, most) for prompt, most in works]
    held = forecast.slots(work[:running], slots)
    ahead = Queued()
    for each in work[running:]:
        ahead = ahead.plus(Queued(1, each.prompt, forecast.output(each)))
    begins, own = forecast.wait(held, ahead, prompt)
    assert 0 <= begins < float("inf")
    assert 0 <= own < float("inf")
    more, _ = forecast.wait(held, ahead.plus(Queued(1, 100, 100)), prompt)
    assert more >= begins * (1 - 1e-9)
