"""The engine over a fake model whose every token depends on the whole text it reads through the cache."""

from __future__ import annotations

import random
import threading
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fptq_runtime.engine.admission import Forecast
from fptq_runtime.engine.engine import Engine, QueueFullError, RequestError
from fptq_runtime.engine.request import FinishReason, Origin, SamplingParams
from tests.engine.fake import EOS, VOCAB, gist, logits_after, make_engine, run, solo, spelled, text, tokens

GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)


def greedy(**changes: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 12, "temperature": 0, "ignore_eos": True, **changes})


def one(prompt: list[int], params: SamplingParams, **options: Any) -> Any:
    """Events of the only sequence."""
    return solo(prompt, params, **options)[0]


def random_params(generator: random.Random) -> SamplingParams:
    return SamplingParams(
        n=generator.choice([1, 1, 1, 2, 3]),
        max_tokens=generator.randrange(0, 25),
        temperature=generator.choice([0.0, 0.0, 0.7, 1.5]),
        top_k=generator.choice([0, 5]),
        top_p=generator.choice([1.0, 0.8]),
        min_p=generator.choice([0.0, 0.05]),
        repetition_penalty=generator.choice([1.0, 1.3]),
        frequency_penalty=generator.choice([0.0, 0.5]),
        logit_bias=generator.choice([{}, {40: 3.0}]),
        seed=generator.randrange(1 << 40),
        stop=generator.choice([(), ("AB", "a"), (spelled(50),)]),
        logprobs=generator.choice([None, 0, 3]),
        prompt_logprobs=generator.choice([None, None, 0, 2]),
    )


@settings(max_examples=25)
@given(seed=st.integers(0, 1 << 30))
def test_company_does_not_matter(seed: int) -> None:
    """Random requests come and go in a cramped engine, which chunks, caches, preempts and aborts; each gives what it
    gives alone."""
    generator = random.Random(seed)
    options = {"max_model_len": 128, "block_size": 16}
    engine = make_engine(
        **options,
        num_blocks=generator.randrange(8, 24),
        max_num_seqs=generator.randrange(1, 9),
        max_num_batched_tokens=generator.choice([1, 3, 17, 64, 300]),
        enable_prefix_caching=generator.random() < 0.7,
        asynchronous=generator.random() < 0.5,
        speculation=True,
    )
    families = [[generator.randrange(1, VOCAB) for _ in range(60)] for _ in range(2)]
    sent: dict[str, tuple[list[int], SamplingParams]] = {}
    events: dict[tuple[str, int], list[Any]] = {}
    aborted: set[str] = set()
    for i in range(12):
        prompt = generator.choice(families)[: generator.randrange(1, 60)]
        prompt = prompt + [generator.randrange(1, VOCAB) for _ in range(generator.randrange(0, 40))]
        sent[str(i)] = prompt, random_params(generator)
        engine.add_request(str(i), *sent[str(i)])
        for _ in range(generator.randrange(0, 6)):
            for output in engine.step()[0]:
                events.setdefault((output.request_id, output.index), []).append(output)
            engine.check_integrity()
        if generator.random() < 0.15:
            aborted.add(victim := generator.choice(list(sent)))
            engine.abort(victim)
    for key, rest in run(engine).items():
        events.setdefault(key, []).extend(rest)
    assert engine.step()[1].kv_usage == 0
    for name, (prompt, params) in sent.items():
        expected = solo(prompt, params, **options)
        for index in range(params.n):
            got = events[name, index]
            assert [e.finish_reason is None for e in got] == [True] * (len(got) - 1) + [False]
            if got[-1].finish_reason is FinishReason.ABORT:
                assert name in aborted
                assert tokens(got) == tokens(expected[index])[: len(tokens(got))]
            else:
                assert gist(got) == gist(expected[index])


def test_preemption_happens_and_changes_nothing() -> None:
    options = {"num_blocks": 8, "max_model_len": 128, "enable_prefix_caching": False}
    engine = make_engine(**options)
    prompts = [[i + 1] * 20 for i in range(4)]
    params = [greedy(max_tokens=60, logprobs=1), greedy(max_tokens=60, prompt_logprobs=1)] * 2
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), prompt, params[i])
    preemptions, prompt_tokens, recomputed, computed, events = 0, 0, 0, 0, {}
    while engine.has_unfinished_requests:
        outputs, stats = engine.step()
        preemptions += stats.preemptions
        prompt_tokens += stats.prompt_tokens
        recomputed += stats.recomputed_tokens
        computed += stats.batch_tokens
        for output in outputs:
            events.setdefault(output.request_id, []).append(output)
    assert preemptions > 0
    assert prompt_tokens == sum(map(len, prompts)), "what is computed again is not counted again"
    assert computed - recomputed == sum(len(prompt) + 60 - 1 for prompt in prompts)
    for i, prompt in enumerate(prompts):
        assert gist(events[str(i)]) == gist(one(prompt, params[i]))


def test_an_echo_preempted_within_its_prompt_reports_each_position_once() -> None:
    engine = make_engine(num_blocks=9, max_model_len=128, max_num_batched_tokens=4)
    prompts = {"a": [1] * 15, "b": [2] * 15, "echo": list(range(1, 61))}
    params = {name: greedy(max_tokens=50, prompt_logprobs=1 if name == "echo" else None) for name in prompts}
    for name, prompt in prompts.items():
        engine.add_request(name, prompt, params[name])
    events: dict[str, list[Any]] = {}
    preempted_in_prompt = False
    while engine.has_unfinished_requests:
        outputs, stats = engine.step()
        for output in outputs:
            events.setdefault(output.request_id, []).append(output)
        preempted_in_prompt |= stats.preemptions > 0 and "echo" not in events
    assert preempted_in_prompt
    for name, prompt in prompts.items():
        assert gist(events[name]) == gist(one(prompt, params[name]))


def test_greedy_follows_the_model_step_by_step() -> None:
    prompt = [3, 1, 4, 1, 5]
    expected = list(prompt)
    for _ in range(12):
        expected.append(int(logits_after(expected).argmax()))
    assert tokens(one(prompt, GREEDY)) == expected[5:]


def test_logprobs_are_the_models_own() -> None:
    """Whatever the temperature, penalties and bias."""
    params = SamplingParams(max_tokens=8, temperature=2.0, top_k=3, repetition_penalty=2, logit_bias={7: 50}, seed=1,
                            logprobs=5, prompt_logprobs=2, ignore_eos=True)
    prompt = [9, 8, 7, 6]
    events = one(prompt, params)
    context = prompt + tokens(events)
    entries = [*events[0].prompt_logprobs, *(entry for event in events for entry in event.logprobs)]
    assert entries[0] is None
    assert len(entries) == len(context)
    assert all(event.prompt_logprobs is None for event in events[1:])
    for position in range(1, len(context)):
        row = logits_after(context[:position]).astype(np.float64)
        expected = row - np.log(np.exp(row).sum())
        entry = entries[position]
        assert entry.token_id == context[position]
        assert entry.logprob == pytest.approx(expected[entry.token_id], abs=1e-5)
        best = np.argsort(-row, kind="stable")[: len(entry.top)]
        assert [token for token, _ in entry.top] == best.tolist()
        assert [value for _, value in entry.top] == pytest.approx(expected[best].tolist(), abs=1e-5)
        assert dict(entry.top).get(entry.token_id, entry.logprob) == entry.logprob
    assert len(entries[1].top) == 2
    assert len(entries[-1].top) == 5


def test_echo_without_generation() -> None:
    events = one([5, 6, 7], greedy(max_tokens=0, prompt_logprobs=0))
    assert len(events) == 1
    assert events[0].token_ids == ()
    assert events[0].finish_reason is FinishReason.LENGTH
    assert [entry and entry.token_id for entry in events[0].prompt_logprobs] == [None, 6, 7]


def test_echo_reports_every_position_although_the_prefix_is_cached() -> None:
    engine = make_engine(max_num_batched_tokens=24)
    prompt = list(range(1, 71))
    engine.add_request("warm", prompt, GREEDY)
    run(engine)
    engine.add_request("echo", prompt, greedy(prompt_logprobs=1))
    events = run(engine)["echo", 0]
    assert gist(events) == gist(one(prompt, greedy(prompt_logprobs=1)))
    assert events[0].num_cached_tokens == 0
    engine.add_request("plain", prompt, GREEDY)
    assert run(engine)["plain", 0][0].num_cached_tokens == 64


def test_only_the_first_sequence_echoes() -> None:
    events = solo([5, 6, 7], greedy(n=2, prompt_logprobs=0))
    assert events[0][0].prompt_logprobs is not None
    assert events[1][0].prompt_logprobs is None


def test_sequence_i_is_what_seed_plus_i_gives() -> None:
    together = solo([5, 6], SamplingParams(n=3, seed=11, max_tokens=9, ignore_eos=True))
    for i in range(3):
        alone = one([5, 6], SamplingParams(seed=11 + i, max_tokens=9, ignore_eos=True))
        assert tokens(together[i]) == tokens(alone)
    assert len({tuple(tokens(events)) for events in together.values()}) == 3


def test_without_a_seed_two_requests_differ() -> None:
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    assert tokens(one([5], params)) != tokens(one([5], params))


def until(prompt: list[int], token_id: int) -> tuple[list[int], int]:
    """A continuation in which token_id is drawn early, from a prompt made for it. (prompt, tokens before it)"""
    for tail in range(1, 4000):
        context = [*prompt, tail % VOCAB or 1, tail // VOCAB + 1]
        start = len(context)
        for count in range(6):
            best = int(logits_after(context).argmax())
            if best == token_id:
                if count > 1:
                    return context[:start], count
                break
            context.append(best)
    raise AssertionError("no such prompt")


def test_eos_ends_and_is_reported_but_not_spelled() -> None:
    prompt, count = until([5], EOS)
    events = one(prompt, greedy(ignore_eos=False, logprobs=1, max_tokens=50))
    assert tokens(events)[count] == EOS
    assert len(tokens(events)) == count + 1
    assert events[-1].logprobs[0].token_id == EOS
    assert events[-1].finish_reason is FinishReason.STOP
    assert events[-1].stop_reason is None
    assert spelled(EOS) not in text(events)
    assert len(tokens(one(prompt, greedy(max_tokens=50)))) == 50  # ignore_eos


def test_stop_ids_end_with_their_id() -> None:
    prompt, count = until([5], 65)
    events = one(prompt, greedy(stop_token_ids=(65, 3), max_tokens=50))
    assert len(tokens(events)) == count + 1
    assert (events[-1].finish_reason, events[-1].stop_reason) == (FinishReason.STOP, 65)
    assert "A" not in text(events)


def test_min_tokens_keeps_the_ends_away() -> None:
    prompt, count = until([5], EOS)
    params = greedy(ignore_eos=False, min_tokens=count + 3, max_tokens=count + 3)
    events = one(prompt, params)
    assert len(tokens(events)) == count + 3
    assert EOS not in tokens(events)
    free = one(prompt, greedy(max_tokens=30))
    stop = text(free)[0]
    late = one(prompt, greedy(max_tokens=30, min_tokens=10, stop=(stop,)))
    assert len(tokens(late)) > 10
    assert len(tokens(one(prompt, greedy(max_tokens=30, stop=(stop,))))) <= 2


def test_stop_strings_cut_the_text() -> None:
    free = one([5, 9], greedy(max_tokens=40))
    whole = text(free)
    for length in (1, 2, 5):
        stop = whole[7 : 7 + length]
        events = one([5, 9], greedy(max_tokens=40, stop=("never", stop)))
        assert text(events) == whole[: whole.index(stop)]
        assert (events[-1].finish_reason, events[-1].stop_reason) == (FinishReason.STOP, stop)
        assert tokens(events) == tokens(free)[: len(tokens(events))]
    held = one([5, 9], greedy(max_tokens=40, stop=(whole[-3:] + "?",)))
    assert text(held) == whole  # held back at the end, then let go
    assert held[-1].finish_reason is FinishReason.LENGTH


def test_length_is_capped_by_the_context() -> None:
    events = one([1] * 50, greedy(max_tokens=1000), max_model_len=64)
    assert len(tokens(events)) == 14
    assert events[-1].finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize(("prompt", "params", "named"), [
    ([], {}, "empty"),
    ([1] * 64, {}, "64 tokens"),
    ([1, VOCAB], {}, str(VOCAB - 1)),
    ([-1], {}, "between 0"),
    ([1], {"logit_bias": {VOCAB: 1.0}}, "logit_bias"),
    ([1], {"stop_token_ids": (VOCAB,)}, "stop_token_ids"),
    ([1], {"n": 5}, "n 5"),
])
def test_bad_requests_are_refused_by_name(prompt: list[int], params: dict[str, Any], named: str) -> None:
    engine = make_engine(max_model_len=64, max_num_seqs=2, max_waiting_requests=2)
    with pytest.raises(RequestError, match=named):
        engine.add_request("bad", prompt, SamplingParams(**params))
    assert not engine.has_unfinished_requests
    engine.add_request("fits", [1] * 64, SamplingParams(max_tokens=0))
    engine.add_request("also", [1] * 63, GREEDY)
    assert tokens(run(engine)["also", 0]) == tokens(one([1] * 63, GREEDY))[:1]


def test_an_id_can_be_used_again_but_not_twice_at_once() -> None:
    engine = make_engine()
    engine.add_request("a", [1], GREEDY)
    with pytest.raises(RequestError, match="'a'"):
        engine.add_request("a", [1], GREEDY)
    run(engine)
    engine.add_request("a", [1], GREEDY)
    assert len(tokens(run(engine)["a", 0])) == 12


def test_the_queue_is_bounded() -> None:
    engine = make_engine(max_num_seqs=2, max_waiting_requests=3)
    for i in range(5):
        engine.add_request(str(i), [1], GREEDY)
    with pytest.raises(QueueFullError) as refused:
        engine.add_request("5", [1], GREEDY)
    assert refused.value.reason == "queue_full"
    assert refused.value.retry_after == 1
    engine.abort("3")
    engine.step()
    engine.add_request("5", [1], GREEDY)
    assert len(run(engine)) == 5
    engine = make_engine(max_num_seqs=1, max_waiting_tokens=100)
    engine.add_request("0", [1] * 200, GREEDY)  # nothing waits, so that any prompt can run some day
    engine.step()
    engine.add_request("1", [1] * 90, GREEDY)
    with pytest.raises(QueueFullError):
        engine.add_request("2", [1] * 90, GREEDY)


def test_retry_after_follows_the_measured_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("fptq_runtime.engine.engine.time.monotonic", lambda: now[0])
    engine = make_engine(max_num_seqs=1, max_waiting_requests=9)
    executor: Any = engine.backend.executor  # type: ignore[attr-defined]
    executor.before = lambda batch: now.__setitem__(0, now[0] + 0.5)
    for i in range(10):
        engine.add_request(str(i), [i + 1], greedy(max_tokens=4))
    for _ in range(8):
        engine.step()
    for i in range(10, 12):  # two have finished, in two seconds each
        engine.add_request(str(i), [i + 1], greedy(max_tokens=4))
    for n in (1, 3):  # places
        with pytest.raises(QueueFullError) as refused:
            engine.add_request("12", [1], greedy(max_tokens=4, n=n))
        assert 2 * n <= refused.value.retry_after <= 1.5 * 2 * n
    began, taken = now[0], 0.0
    while not taken:
        engine.step()
        with suppress(QueueFullError):
            engine.add_request("12", [1], greedy(max_tokens=4, n=3))
            taken = now[0] - began
    assert taken == 6


def test_those_who_are_refused_together_do_not_come_back_together() -> None:
    engine = make_engine(max_num_seqs=1, max_waiting_requests=1)
    told = []
    for i in range(102):
        with suppress(QueueFullError):
            engine.add_request(str(i), [1], GREEDY)
            continue
        with pytest.raises(QueueFullError) as refused:
            engine.enter()
        told.append(refused.value.retry_after)
    gaps = np.diff(sorted(told))
    assert 1 <= min(told) < max(told) <= 1.5
    assert 0 < min(gaps) <= max(gaps) <= 0.02


def test_who_comes_costs_the_same_however_many_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forecasts of a length that are made for it, taken or refused."""
    made: list[int] = []
    output = Forecast.output
    monkeypatch.setattr(Forecast, "output", lambda self, work: made.append(0) or output(self, work))  # type: ignore[func-returns-value]
    engine = make_engine(max_num_seqs=2, max_waiting_requests=198)
    counts = []
    for i in range(300):
        before = len(made)
        with suppress(QueueFullError):
            engine.add_request(str(i), [1], GREEDY, Origin(priority=i % 3))
        counts.append(len(made) - before)
    assert counts == [1] * 300
    for _ in range(20):
        engine.step()
        engine.check_integrity()
    before = len(made)
    with suppress(QueueFullError):
        while True:
            engine.enter()
    assert len(made) - before == 2, "of those that run, once after a step"


def test_a_place_is_held_for_who_is_on_the_way() -> None:
    """In the queue, as if it waited; of a tenant's share, too."""
    engine = make_engine(max_num_seqs=1, max_waiting_requests=3)
    places = [engine.enter() for _ in range(4)]
    with pytest.raises(QueueFullError):
        engine.enter()
    with pytest.raises(QueueFullError):
        engine.add_request("full", [1], GREEDY)
    engine.enter(Origin("another")).leave()
    for _ in range(2):
        places[0].leave()
    engine.add_request("0", [1], GREEDY)
    with pytest.raises(QueueFullError):
        engine.enter()
    for place in places:
        place.leave()
    engine.enter()
    assert len(run(engine)) == 1
    engine.check_integrity()


def test_abort_while_waiting_and_while_running() -> None:
    engine = make_engine(max_num_seqs=1)
    for name in "abc":
        engine.add_request(name, [1, 2], GREEDY)
    engine.step()
    engine.abort("a")
    engine.abort("b")
    engine.abort("unknown")
    outputs, stats = engine.step()
    assert {(o.request_id, o.finish_reason) for o in outputs if o.request_id != "c"} == {
        ("a", FinishReason.ABORT), ("b", FinishReason.ABORT)}
    assert sorted(o.num_output_tokens for o in outputs if o.request_id != "c") == [0, 1]
    assert [f.reason for f in stats.finished] == ["abort"] * 2
    assert stats.saved_tokens == 11 + 12
    engine.check_integrity()
    assert len(tokens(run(engine)["c", 0])) == 11


def test_a_sequence_that_breaks_ends_alone() -> None:
    """Logits that are not finite, and a detokenizer that throws."""
    engine = make_engine()
    executor: Any = engine.backend.executor  # type: ignore[attr-defined]

    def spoil(logits: np.ndarray) -> np.ndarray:
        batch = executor.batches[-1]
        for row, position in enumerate(batch.logits_rows):
            if batch.positions[position] == 29:
                logits[row, 3] = np.nan
        return logits

    executor.after = spoil
    good, broken = [5] * 4, [6] * 29
    engine.add_request("good", good, GREEDY)
    engine.add_request("broken", broken, GREEDY)
    engine.tokenizer.stream = lambda *_: SimpleNamespace(step=lambda token_id: 1 / 0)  # type: ignore
    engine.add_request("throws", [7] * 3, GREEDY)
    events = run(engine)
    assert gist(events["good", 0]) == gist(one(good, GREEDY))
    assert events["broken", 0][-1].finish_reason is FinishReason.ERROR
    assert len(tokens(events["broken", 0])) == 1
    assert events["throws", 0][-1].finish_reason is FinishReason.ERROR


def test_a_step_that_fails_ends_its_batch_and_the_engine_lives() -> None:
    engine = make_engine(max_num_seqs=2)
    executor: Any = engine.backend.executor  # type: ignore[attr-defined]
    prompt = list(range(1, 41))
    for name in "abc":
        engine.add_request(name, prompt, GREEDY)

    def fail(batch: Any) -> None:
        executor.before = lambda batch: None
        executor.cache[:] = 77  # whatever a broken step leaves behind
        raise RuntimeError("the kernel broke")

    executor.before = fail
    events = run(engine)
    assert [events[name, 0][-1].finish_reason for name in "abc"] == [
        FinishReason.ERROR, FinishReason.ERROR, FinishReason.LENGTH]
    assert gist(events["c", 0]) == gist(one(prompt, GREEDY))


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("poisoned", [{"a"}, {"c", "d"}, {"e"}, set("abcdef")])
def test_whoever_breaks_every_step_is_found_and_ends_alone(poisoned: set[str], asynchronous: bool) -> None:
    """They decode with the others for a while before their token breaks the kernel."""
    engine = make_engine(max_num_seqs=6, asynchronous=asynchronous)
    prompts = {name: [ord(name) - 90] * (3 + i) for i, name in enumerate("abcdef")}
    for name, prompt in prompts.items():
        engine.add_request(name, prompt, GREEDY)
    poison = {len(prompts[name]) + 4: one(prompts[name], GREEDY)[3].token_ids[0] for name in poisoned}

    def fail(batch: Any) -> None:
        last = batch.query_start_loc[1:] - 1
        if any(poison.get(length) == batch.token_ids[row] for row, length in zip(last, batch.seq_lens, strict=True)):
            raise RuntimeError("the kernel broke")

    engine.backend.executor.before = fail  # type: ignore[attr-defined]
    events = run(engine)
    for name, prompt in prompts.items():
        alone = one(prompt, GREEDY)
        if events[name, 0][-1].finish_reason is FinishReason.ERROR:
            assert name in poisoned
            assert tokens(events[name, 0]) == tokens(alone[:4])
        else:
            assert name not in poisoned
            assert gist(events[name, 0]) == gist(alone)


def test_stats_add_up() -> None:
    engine = make_engine(max_num_seqs=2, max_num_batched_tokens=16)
    for i in range(4):
        engine.add_request(str(i), [7] * 40, GREEDY)
    stats = []
    while engine.has_unfinished_requests:
        stats.append(engine.step()[1])
    assert sum(s.generated_tokens for s in stats) == 48
    assert sum(len(s.time_to_first_token) for s in stats) == 4
    assert sum(len(s.inter_token_seconds) for s in stats) == 44
    assert sum(len(s.queue_seconds) for s in stats) == 4
    assert sum(s.prefix_query_tokens for s in stats) == 160
    hits = sum(s.prefix_hit_tokens for s in stats)
    assert hits == 3 * 32
    assert sum(s.prompt_tokens for s in stats) == 160 - hits
    assert max(s.batch_tokens for s in stats) == 16
    assert max(s.num_running for s in stats) == 2
    assert max(s.num_waiting for s in stats) >= 2
    finished = [f for s in stats for f in s.finished]
    assert [f.reason for f in finished] == ["length"] * 4
    assert [(f.prompt_tokens, f.generated_tokens) for f in finished] == [(40, 12)] * 4
    queued = sum(seconds for s in stats for seconds in s.queue_seconds)
    phases = sum((f.prefill_seconds or 0) + (f.decode_seconds or 0) for f in finished)
    assert 0 < phases <= queued + phases <= sum(f.end_to_end_seconds for f in finished)
    first_tokens = [seconds for s in stats for seconds in s.time_to_first_token]
    assert 0 <= min(first_tokens) <= max(first_tokens) <= max(f.end_to_end_seconds for f in finished)
    assert stats[-1].kv_usage == 0 < max(s.kv_usage for s in stats) <= 1


def test_requests_may_arrive_from_another_thread_while_a_step_runs() -> None:
    engine = make_engine()
    executor: Any = engine.backend.executor  # type: ignore[attr-defined]
    adders: list[threading.Thread] = []

    def add_more(batch: Any) -> None:
        if len(adders) < 5:
            adders.append(threading.Thread(
                target=engine.add_request, args=(f"more{len(adders)}", [9, len(adders) + 1], GREEDY)))
            adders[-1].start()
            adders[-1].join()

    executor.before = add_more
    engine.add_request("first", [1, 2], GREEDY)
    events = run(engine)
    assert len(events) == 6
    for i in range(5):
        assert gist(events[f"more{i}", 0]) == gist(one([9, i + 1], GREEDY))


def test_prompt_logits_are_bounded_by_the_limits() -> None:
    engine: Engine = make_engine(max_num_seqs=3, max_num_batched_tokens=40)
    executor: Any = engine.backend.executor  # type: ignore[attr-defined]
    assert executor.limits.max_logits_rows == 43
    for i in range(3):
        engine.add_request(str(i), [i + 1] * 90, greedy(prompt_logprobs=1))
    events = run(engine)
    for i in range(3):
        assert gist(events[str(i), 0]) == gist(one([i + 1] * 90, greedy(prompt_logprobs=1)))
