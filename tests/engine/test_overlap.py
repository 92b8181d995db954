"""An asynchronous backend: the next batch is under way while this one's text is made."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fptq_runtime.engine.engine import Engine
from fptq_runtime.engine.grammar import Grammar
from fptq_runtime.engine.request import FinishReason, SamplingParams
from tests.engine.fake import VOCAB, gist, make_engine, run, solo, tokens
from tests.engine.test_engine import GREEDY, greedy


def executor(engine: Engine) -> Any:
    return engine.backend.executor  # type: ignore[attr-defined]


def stop_text(prompt: list[int], at: int) -> str:
    """What the sequence's text ends with at its token number `at`, and not before."""
    events = solo(prompt, GREEDY)[0]
    text = "".join(event.text for event in events[: at + 1])
    assert events[at].text
    return text[-3:]


def test_the_next_batch_is_launched_before_the_text_is_made() -> None:
    engine = make_engine(asynchronous=True)
    log: list[str] = []
    executor(engine).before = lambda batch: log.append("launch")
    engine.tokenizer.stream = lambda *_: SimpleNamespace(  # type: ignore
        step=lambda token_id: log.append("text") or "x")
    engine.add_request("a", [1, 2, 3], greedy(max_tokens=4))
    reported = 0
    while engine.has_unfinished_requests:
        reported += len(engine.step()[0])
        engine.check_integrity()
    assert log == ["launch", "launch", "text", "launch", "text", "launch", "text", "text"]
    assert reported == 4, "every step tells what it computed"


def test_what_is_known_to_end_is_not_computed_again() -> None:
    """Ends by length cost no row; one by a token or by text costs one, which is dropped."""
    for params, batches in ((greedy(max_tokens=5), 5), (greedy(max_tokens=0), 1), (
            greedy(stop=(stop_text([1, 2, 3], 4),)), 6), (
            greedy(stop_token_ids=(tokens(solo([1, 2, 3], GREEDY)[0])[4],)), 6)):
        engine = make_engine(asynchronous=True)
        engine.add_request("a", [1, 2, 3], params)
        assert gist(run(engine)["a", 0]) == gist(solo([1, 2, 3], params)[0])
        assert len(executor(engine).batches) == batches


def test_a_step_reads_what_the_one_before_draws_without_the_host() -> None:
    """Sequences with penalties, log-probabilities and grammars, too; their draws wait for what is known of the text."""
    engine = make_engine(asynchronous=True)
    sent = [greedy(max_tokens=6),
            greedy(max_tokens=6, frequency_penalty=0.5, logprobs=2),
            greedy(max_tokens=6, ignore_eos=False, structured=Grammar.regex("[A-Z]{20}")),
            greedy(max_tokens=6, ignore_eos=False, structured=Grammar.regex("[a-z]{20}"))]  # no token of which it has
    for i, params in enumerate(sent):
        engine.add_request(str(i), [1, 2, 3 + i], params)
    events = run(engine)
    assert executor(engine).fed == 3 * 5 + 1, "all but the first token of each, and one of what fails"
    assert events["3", 0][-1].finish_reason is FinishReason.ERROR
    for i, params in enumerate(sent):
        assert gist(events[str(i), 0]) == gist(solo([1, 2, 3 + i], params)[0])


@pytest.mark.parametrize("seed", [0, 1, 5, 6, 7])
def test_company_preemption_and_ends_of_every_kind(seed: int) -> None:
    """Each request gets what a synchronous engine gives it alone; those that are aborted, a beginning of it."""
    place = random.Random(seed)
    engine = make_engine(asynchronous=True, max_num_seqs=5, max_num_batched_tokens=40, num_blocks=5,
                         max_model_len=64, enable_prefix_caching=place.random() < 0.5)
    sent = {}
    for i in range(14):
        prompt = [place.randrange(1, 5) for _ in range(place.randrange(1, 30))]
        sent[str(i)] = prompt, SamplingParams(
            max_tokens=place.choice((0, 1, 2, 9, 60)), temperature=place.choice((0.0, 1.0)), seed=i,
            ignore_eos=place.random() < 0.5, stop=(chr(place.randrange(40, 97)),) if place.random() < 0.3 else (),
            stop_token_ids=(place.randrange(VOCAB),) if place.random() < 0.3 else (), n=place.choice((1, 1, 3)),
            presence_penalty=place.choice((0.0, 0.7)), logprobs=place.choice((None, 1)), min_tokens=0,
            prompt_logprobs=place.choice((None, None, 1)))
    events: dict[tuple[str, int], list[Any]] = {}
    left, preempted = list(sent), 0
    while left or engine.has_unfinished_requests:
        for name in left[: place.randrange(4)]:
            engine.add_request(name, *sent[name])
            left.remove(name)
        if place.random() < 0.1:
            engine.abort(place.choice(list(sent)))
        outputs, stats = engine.step()
        preempted += stats.preemptions
        engine.check_integrity()
        for output in outputs:
            events.setdefault((output.request_id, output.index), []).append(output)
    assert preempted
    assert executor(engine).fed
    assert engine.step()[1].kv_usage == 0
    for (name, index), got in events.items():
        alone = solo(*sent[name], max_model_len=64)[index]
        if got[-1].finish_reason is FinishReason.ABORT:
            assert tokens(got) == tokens(alone)[: len(tokens(got))]
        else:
            assert gist(got) == gist(alone)


def test_after_a_dropped_batch_the_engine_goes_on() -> None:
    engine = make_engine(asynchronous=True)
    params = greedy(stop=(stop_text([1, 2, 3], 4),))
    for name in "abc":
        engine.add_request(name, [1, 2, 3], params)
        assert gist(run(engine)[name, 0]) == gist(solo([1, 2, 3], params)[0])
        assert engine.step()[1].kv_usage == 0


def test_a_request_aborted_in_flight_may_come_back_under_its_name() -> None:
    engine = make_engine(asynchronous=True)
    engine.add_request("a", [1, 2, 3], greedy(prompt_logprobs=2))
    engine.add_request("b", [4, 5, 6], GREEDY)
    seen = engine.step()[0]
    engine.abort("a")
    [ended] = [output for output in engine.step()[0] if output.request_id == "a"]
    assert ended.finish_reason is FinishReason.ABORT
    engine.check_integrity()
    engine.add_request("a", [7, 8], GREEDY)
    engine.abort("b")
    events = run(engine)
    assert gist(events["a", 0]) == gist(solo([7, 8], GREEDY)[0])
    assert events["b", 0][-1].finish_reason is FinishReason.ABORT
    assert {output.request_id for output in seen} == {"a", "b"}


@pytest.mark.parametrize("failing", [0, 1, 3])
def test_a_batch_that_fails_in_flight_ends_its_sequences_alone(failing: int) -> None:
    engine = make_engine(asynchronous=True, max_num_seqs=2, enable_prefix_caching=False)
    prompt = list(range(1, 41))
    for name in "abc":
        engine.add_request(name, prompt, GREEDY)
    batches = iter(range(100))

    def fail(batch: Any) -> None:
        if next(batches) == failing:
            executor(engine).cache[:] = 77
            raise RuntimeError("the kernel broke")

    executor(engine).before = fail
    events = run(engine)
    assert [events[name, 0][-1].finish_reason for name in "abc"] == [
        FinishReason.ERROR, FinishReason.ERROR, FinishReason.LENGTH]
    assert tokens(events["a", 0]) == tokens(solo(prompt, GREEDY)[0])[:failing]
    assert gist(events["c", 0]) == gist(solo(prompt, GREEDY)[0])


def test_a_device_that_fails_when_it_is_waited_for() -> None:
    engine = make_engine(asynchronous=True)
    engine.add_request("a", [1, 2, 3], GREEDY)
    engine.step()
    sample, engine.backend.sample = engine.backend.sample, lambda *_: 1 / 0  # type: ignore
    engine.add_request("b", [4, 5, 6], GREEDY)
    [ended] = engine.step()[0]
    assert (ended.request_id, ended.finish_reason) == ("a", FinishReason.ERROR)
    engine.backend.sample = sample  # type: ignore[method-assign]
    assert gist(run(engine)["b", 0]) == gist(solo([4, 5, 6], GREEDY)[0])


def test_logits_that_are_not_finite_end_their_sequence_alone() -> None:
    engine = make_engine(asynchronous=True)

    def spoil(logits: np.ndarray) -> np.ndarray:
        if len(logits) == 2 and executor(engine).batches[-1].positions[1] == 9:
            logits[1] = np.nan
        return logits

    executor(engine).after = spoil
    engine.add_request("good", [1, 2, 3], GREEDY)
    engine.add_request("broken", [VOCAB - 1] * 8, GREEDY)
    events = run(engine)
    assert gist(events["good", 0]) == gist(solo([1, 2, 3], GREEDY)[0])
    assert len(tokens(events["broken", 0])) == 2
    assert events["broken", 0][-1].finish_reason is FinishReason.ERROR
