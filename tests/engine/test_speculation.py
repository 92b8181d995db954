"""Guesses change nothing but the number of steps; what they are, and how many are tried."""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fptq_runtime.engine.engine import Engine
from fptq_runtime.engine.grammar import Grammar
from fptq_runtime.engine.request import FinishReason, Origin, SamplingParams
from fptq_runtime.engine.sequence import Sequence
from fptq_runtime.engine.speculation import (
    MAX_DRAFT,
    Candidate,
    Chances,
    Draft,
    Guesser,
    Speculator,
    StepCost,
    SuffixIndex,
)
from tests.engine.fake import EOS, VOCAB, gist, habitual, logits_after, make_engine, run, spelled, text, tokens

GRAMMARS = [None, None, Grammar.regex("([A-F]{3},){4,9}"), Grammar.regex('(YES, OF COURSE|NO, NEVER|MAYBE){2,6}')]


class Clock(StepCost):
    """Steps take a second, and a hundredth for each token: what this machine takes for the fake ones says nothing."""

    def observe(self, tokens: int, seconds: float) -> None:
        super().observe(tokens, 1 + tokens / 100)


def engine_of(speculation: bool, model: Callable[[Any], Any] = habitual, **options: Any) -> Engine[Any]:
    engine = make_engine(speculation=speculation, **options)
    engine.backend.executor.model = model  # type: ignore[attr-defined]
    if engine._speculator is not None:
        engine._speculator.cost = Clock()
    return engine


class Tally:
    """What was drafted and accepted, by kind, in the steps of one engine."""

    def __init__(self, engine: Engine[Any]) -> None:
        self.drafted: dict[str, int] = {}
        self.accepted: dict[str, int] = {}
        self.steps = 0
        step = engine.step

        def counted() -> Any:
            outputs, stats = step()
            self.steps += 1
            for kind, each in stats.drafts.items():
                assert 0 <= each.accepted <= each.drafted
                self.drafted[kind] = self.drafted.get(kind, 0) + each.drafted
                self.accepted[kind] = self.accepted.get(kind, 0) + each.accepted
            return outputs, stats

        engine.step = counted  # type: ignore[method-assign]


def random_request(generator: random.Random) -> tuple[list[int], SamplingParams]:
    passage = [generator.randrange(1, VOCAB) for _ in range(generator.randrange(1, 12))]
    prompt = (passage * 8)[: generator.randrange(2, 60)]
    structured = generator.choice(GRAMMARS)
    return prompt, SamplingParams(
        n=generator.choice([1, 1, 2]),
        max_tokens=generator.choice([0, 1, 5, 40, 60]),
        temperature=generator.choice([0.0, 0.0, 0.3, 1.0]),
        top_p=generator.choice([1.0, 0.9]),
        top_k=generator.choice([0, 0, 3]),
        repetition_penalty=generator.choice([1.0, 1.0, 1.1]),
        frequency_penalty=generator.choice([0.0, 0.0, 0.4]),
        seed=generator.randrange(1 << 40),
        stop=generator.choice([(), ("AB", "a"), (spelled(50),)]),
        stop_token_ids=generator.choice([(), (7, 40)]),
        ignore_eos=structured is None and generator.random() < 0.5,
        logprobs=generator.choice([None, 0, 3]),
        prompt_logprobs=generator.choice([None, None, None, 1]),
        structured=structured,
        prediction=generator.choice([(), tuple(passage * 3)]),
    )


@settings(max_examples=30)
@given(seed=st.integers(0, 1 << 30))
def test_the_same_tokens_and_log_probabilities_as_plain_decoding(seed: int) -> None:
    """Random requests, some with the answer of an earlier one as their prediction, in an engine that chunks, caches,
    preempts and aborts."""
    generator = random.Random(seed)
    engine = engine_of(
        True,
        max_model_len=128,
        num_blocks=generator.randrange(8, 30),
        max_num_seqs=generator.randrange(1, 7),
        max_num_batched_tokens=generator.choice([2, 9, 40, 300]),
        enable_prefix_caching=generator.random() < 0.7,
        asynchronous=generator.random() < 0.5,
    )
    plain = engine_of(False, max_model_len=128, max_num_batched_tokens=4096, enable_prefix_caching=False)
    sent: dict[str, tuple[list[int], SamplingParams]] = {}
    expected: dict[tuple[str, int], list[Any]] = {}
    got: dict[tuple[str, int], list[Any]] = {}
    aborted: set[str] = set()
    for i in range(10):
        prompt, params = random_request(generator)
        if sent and generator.random() < 0.3:
            name = generator.choice(list(sent))
            prompt, params = sent[name]
            answer = tokens(expected[name, 0])
            if answer and generator.random() < 0.5:
                answer[generator.randrange(len(answer))] = 5
            params = replace(params, prediction=tuple(answer))
        sent[str(i)] = prompt, params
        plain.add_request(str(i), prompt, params)
        expected |= run(plain)
        engine.add_request(str(i), prompt, params, Origin(generator.choice(["a", "b"])))
        for _ in range(generator.randrange(0, 8)):
            for output in engine.step()[0]:
                got.setdefault((output.request_id, output.index), []).append(output)
            engine.check_integrity()
        if generator.random() < 0.1:
            aborted.add(str(i))
            engine.abort(str(i))
    for key, rest in run(engine).items():
        got.setdefault(key, []).extend(rest)
    assert engine.step()[1].kv_usage == 0
    for key, events in expected.items():
        if got[key][-1].finish_reason is FinishReason.ABORT:
            assert key[0] in aborted
            assert tokens(events)[: len(tokens(got[key]))] == tokens(got[key])
        else:
            assert gist(got[key]) == gist(events)
            assert got[key][-1].num_output_tokens == len(tokens(events))


@pytest.mark.parametrize("kind", ["lookup", "prediction", "history", "forced"])
def test_guesses_of_each_kind_save_steps(kind: str) -> None:
    engine = engine_of(True, max_model_len=256, model=lambda ids: logits_after(
        ids[-1:] if kind == "lookup" else [len(ids), ids[-1]]))
    params = SamplingParams(max_tokens=100, temperature=0, ignore_eos=True)
    prompt = list(range(1, 40))
    if kind == "forced":
        params = replace(params, structured=Grammar.regex("A" * 50), ignore_eos=False)
    if kind in ("prediction", "history"):
        engine.add_request("first", prompt, params)
        answer = tokens(run(engine)["first", 0])
        if kind == "prediction":
            params = replace(params, prediction=tuple(answer))
    tally = Tally(engine)
    engine.add_request("again", prompt, params, Origin("other" if kind == "prediction" else ""))
    events = run(engine)["again", 0]
    assert tally.accepted[kind] > 0.6 * len(tokens(events))
    assert tally.steps < 0.5 * len(tokens(events))
    accepted, drafted = tally.accepted.get("prediction", 0), tally.drafted.get("prediction", 0)
    assert (events[-1].num_accepted_tokens, events[-1].num_rejected_tokens) == (accepted, drafted - accepted)


def test_what_is_right_beyond_a_stop_string_was_guessed_in_vain() -> None:
    engine = engine_of(True, max_model_len=256)
    params = SamplingParams(max_tokens=100, temperature=0, ignore_eos=True)
    engine.add_request("first", [1, 2, 3], params)
    events = run(engine)["first", 0]
    beyond = 0
    for at in range(30, 42):
        stop = text(events)[at : at + 4]
        tally = Tally(engine)
        predicted = replace(params, prediction=tuple(tokens(events)), stop=(stop,))
        engine.add_request(stop, [1, 2, 3], predicted, Origin(stop))
        last = run(engine)[stop, 0][-1]
        assert last.stop_reason == stop
        assert 0 < last.num_accepted_tokens <= last.num_output_tokens
        assert last.num_accepted_tokens + last.num_rejected_tokens == tally.drafted["prediction"]
        beyond += tally.accepted["prediction"] - last.num_accepted_tokens
    assert beyond > 0


def test_answers_are_no_guesses_for_other_tenants() -> None:
    engine = engine_of(True)
    params = SamplingParams(max_tokens=60, temperature=0, ignore_eos=True)
    speculator = engine._speculator
    assert speculator is not None
    engine.add_request("a", [1, 2, 3], params, Origin("a"))
    answer = tokens(run(engine)["a", 0])
    assert speculator._histories["a"].token_ids[-len(answer) :].tolist() == answer
    tally = Tally(engine)
    engine.add_request("b", [1, 2, 3], params, Origin("b"))
    run(engine)
    assert "history" not in tally.drafted
    assert speculator._histories["b"] is not speculator._histories["a"]


def test_text_that_cannot_be_guessed_costs_no_rows() -> None:
    engine = engine_of(True, logits_after, max_model_len=4096, num_blocks=1024)
    generator = random.Random(1)
    for i in range(4):
        engine.add_request(str(i), [generator.randrange(1, VOCAB) for _ in range(50)],
                           SamplingParams(max_tokens=1000, temperature=1, ignore_eos=True, seed=i))
    tally = Tally(engine)
    run(engine, check=False)
    assert sum(tally.drafted.values()) < 0.01 * 4 * 1000


def test_it_can_be_turned_off() -> None:
    engine = engine_of(False)
    tally = Tally(engine)
    engine.add_request("a", [1, 2] * 10, SamplingParams(max_tokens=50, temperature=0, prediction=(1, 2, 3)))
    events = run(engine)["a", 0]
    assert tally.drafted == {}
    assert tally.steps >= len(tokens(events))


@settings(max_examples=200)
@given(text=st.lists(st.integers(0, 3), max_size=60), tail=st.lists(st.integers(0, 3), max_size=20),
       cut=st.integers(0, 60), near=st.integers(0, 60))
def test_the_longest_passage_is_found(text: list[int], tail: list[int], cut: int, near: int) -> None:
    index = SuffixIndex(text[:cut])
    index.extend(text[cut:])
    place, length = index.find(array("i", tail), near)

    def shared(end: int) -> int:
        count = 0
        while count < min(16, end, len(tail)) and text[end - 1 - count] == tail[-1 - count]:
            count += 1
        return count if count > 1 else 0

    ends = [end for end in range(len(text) + 1) if shared(end)][-16:]  # as many as are compared
    assert length == max(map(shared, ends), default=0)
    if length:
        best = [end for end in ends if shared(end) == length]
        assert place == next((end for end in best if end - 1 >= near), best[-1])


def test_drafts_are_as_long_as_pays() -> None:
    def chosen(chances: list[list[float]], seconds: dict[int, float], tokens: int) -> list[int]:
        speculator = Speculator(frozenset())
        for _ in range(200):
            for rows, each in seconds.items():
                speculator.cost.observe(rows, each)
        candidates = [Candidate(Draft("lookup", (1,) * len(each)), each) for each in chances]
        return [len(draft.token_ids) for draft in speculator.choose(candidates, tokens, len(chances), 64)]

    free = {1: 1.0, 40: 1.0}
    assert chosen([[0.9**i for i in range(1, 9)]], free, 1) == [8]
    linear = {n: float(n) for n in (1, 2, 3, 9)}
    assert chosen([[0.9**i for i in range(1, 9)]], linear, 1) == [0], "a row costs as much as a step"
    steep_after_four = {n: 1.0 if n <= 4 else 10.0 for n in range(1, 7)}
    assert chosen([[0.9**i for i in range(1, 9)]], steep_after_four, 1) == [3]
    assert chosen([[0.9, 0.8, 0.7], [0.2, 0.1]], {n: 1.0 if n <= 4 else 10.0 for n in range(2, 7)}, 2) == [2, 0]
    assert chosen([[0.03]], {1: 1.0, 2: 1.1}, 1) == [0]


def test_a_bad_moment_is_not_believed_for_ever() -> None:
    cost = StepCost()
    for _ in range(5):
        cost.observe(1, 1.0)
    cost.observe(8, 50.0)
    assert cost.curve(1, 7)[7] > 10
    for _ in range(3000):
        cost.observe(1, 1.0)
    assert cost.curve(1, 7)[7] < 2
    assert cost.curve(1, 31) == sorted(cost.curve(1, 31))


def test_a_busy_machine_lengthens_all_steps_alike() -> None:
    """Where it was busy while drafts were tried, and is not any more, they are tried again at once."""
    cost = StepCost()
    for slow in (1, 1, 1, 10, 10, 10):
        for rows in (1, 4, 8):
            for _ in range(10):
                cost.observe(rows, slow * (1 + rows / 20))
    for _ in range(30):
        cost.observe(1, 1.05)
    assert cost.curve(1, 7)[7] == pytest.approx(1.4, rel=0.2)


def test_a_guess_of_its_own_end_repeats() -> None:
    [sequence] = Sequence.expand("a", [9, 1, 2, 3, 1, 2, 3], SamplingParams(max_tokens=9))
    guesser = Guesser(sequence, None, Chances())
    guesser.guess()
    assert guesser.tokens(8) == [1, 2, 3, 1, 2, 3, 1, 2]
    assert len(guesser.tokens(MAX_DRAFT)) == MAX_DRAFT
    assert EOS not in guesser.tokens(MAX_DRAFT)
