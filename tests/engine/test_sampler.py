"""Oracles: torch's log_softmax in double precision, and transformers' logits processors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from fptq_runtime.engine.request import Request, SamplingParams
from fptq_runtime.engine.sampler import sample, token_logprobs, top_indices

PROMPT = [1, 2, 3]


def request(output: tuple[int, ...] = (), seed: int = 0, **params: Any) -> Request:
    made = Request("r", 0, PROMPT, SamplingParams(**{"max_tokens": 100, **params}), seed, 0.0)
    made.token_ids += output
    return made


def row(seed: int, size: int = 200, scale: float = 3.0) -> np.ndarray:
    return (scale * np.random.default_rng(seed).normal(size=size)).astype(np.float32)


def frequencies(logits: np.ndarray, draws: int = 4000, **params: Any) -> np.ndarray:
    counts = np.zeros(logits.size)
    for seed in range(draws):
        counts[sample(logits, request(seed=seed, **params), ())] += 1
    return counts


def expected(logits: np.ndarray, *processors: Any) -> np.ndarray:
    """The distribution that transformers would draw from."""
    scores = LogitsProcessorList(processors)(torch.tensor([PROMPT]), torch.from_numpy(logits)[None].clone())
    return scores[0].double().softmax(-1).numpy()


def assert_drawn_from(counts: np.ndarray, probabilities: np.ndarray) -> None:
    """Nothing of probability 0, and Pearson's chi-square within 6 sigma of its mean, over cells expected 5 times."""
    assert counts[probabilities == 0].sum() == 0
    means = counts.sum() * probabilities
    cells = means >= 5
    observed = np.append(counts[cells], counts[~cells].sum())
    means = np.append(means[cells], means[~cells].sum())
    observed, means = observed[means > 0], means[means > 0]
    freedom = max(1, means.size - 1)
    assert ((observed - means) ** 2 / means).sum() < freedom + 6 * np.sqrt(2 * freedom)


@pytest.mark.parametrize(("params", "processors"), [
    ({}, []),
    ({"temperature": 0.5}, [TemperatureLogitsWarper(0.5)]),
    ({"temperature": 1.7, "top_k": 7}, [TemperatureLogitsWarper(1.7), TopKLogitsWarper(7)]),
    ({"top_p": 0.8}, [TopPLogitsWarper(0.8)]),
    ({"min_p": 0.1}, [MinPLogitsWarper(0.1)]),
    ({"temperature": 1.3, "min_p": 0.03, "top_k": 20, "top_p": 0.7},
     [TemperatureLogitsWarper(1.3), MinPLogitsWarper(0.03), TopKLogitsWarper(20), TopPLogitsWarper(0.7)]),
    ({"repetition_penalty": 1.8}, [RepetitionPenaltyLogitsProcessor(1.8)]),
])
def test_draws_follow_transformers_distribution(params: dict[str, Any], processors: list[Any]) -> None:
    logits = row(5)
    logits[PROMPT] += 8  # so that the penalty shows
    assert_drawn_from(frequencies(logits, **params), expected(logits, *processors))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1 << 20), size=st.sampled_from([2, 50, 300, 5000]), scale=st.sampled_from([0.01, 1.0, 8.0]),
       top_k=st.integers(0, 60), top_p=st.floats(0.05, 1.0), min_p=st.sampled_from([0.0, 0.0, 0.2]),
       temperature=st.sampled_from([1e-6, 0.6, 1.0, 3.0]))
def test_nothing_outside_transformers_support_is_drawn(seed: int, size: int, scale: float, top_k: int, top_p: float,
                                                       min_p: float, temperature: float) -> None:
    logits = row(seed, size, scale)
    processors = [TemperatureLogitsWarper(temperature)]
    processors += [MinPLogitsWarper(min_p)] if min_p else []
    processors += [TopKLogitsWarper(min(top_k, size))] if top_k else []
    processors += [TopPLogitsWarper(min(top_p + 1e-3, 1.0))]  # where a sum falls on the boundary, rounding decides
    allowed = expected(logits, *processors)
    assume(np.isfinite(allowed).all())
    for draw in range(10):
        assert allowed[sample(logits, request(seed=seed + draw, top_k=top_k, top_p=top_p, min_p=min_p,
                                              temperature=temperature), ())] > 0


def test_greedy_takes_the_lowest_id_on_ties_and_no_notice_of_the_seed() -> None:
    logits = np.array([0, 3, 1, 3], dtype=np.float32)
    assert {sample(logits, request(seed=s, temperature=0, top_k=1, top_p=0.5), ()) for s in range(5)} == {1}


@pytest.mark.parametrize("temperature", [5e-324, 1e-46, 1e-30, 1e-6])
def test_a_vanishing_temperature_is_greedy(temperature: float) -> None:
    logits = row(6)
    with np.errstate(invalid="raise"):
        drawn = {sample(logits, request(seed=s, temperature=temperature, top_k=9, top_p=0.5), ()) for s in range(5)}
    assert drawn == {int(logits.argmax())}


def test_presence_and_frequency_count_the_output_alone() -> None:
    logits = np.zeros(6, dtype=np.float32)
    logits[[4, 5, 1]] = [5.0, 4.0, 4.5]
    before = logits.copy()
    assert sample(logits, request((4, 4), temperature=0), ()) == 4
    assert sample(logits, request((4, 4), temperature=0, frequency_penalty=0.2), ()) == 4
    assert sample(logits, request((4, 4), temperature=0, frequency_penalty=0.3), ()) == 1
    assert sample(logits, request((4, 4), temperature=0, presence_penalty=0.4), ()) == 4
    assert sample(logits, request((4, 4), temperature=0, presence_penalty=0.6), ()) == 1
    assert sample(logits, request((1, 4, 4), temperature=0, presence_penalty=2.0), ()) == 5
    assert np.array_equal(logits, before), "the row is the caller's"


def test_bias_bans_and_forces() -> None:
    logits = row(1)
    best = int(logits.argmax())
    assert sample(logits, request(temperature=0, logit_bias={best: -100}), ()) == int(top_indices(logits, 2)[1])
    assert sample(logits, request(logit_bias={17: 100}), ()) == 17


def test_ends_are_suppressed_until_min_tokens() -> None:
    logits = row(2)
    first, second, third = (int(i) for i in top_indices(logits, 3))
    params: dict[str, Any] = {"temperature": 0, "min_tokens": 2, "stop_token_ids": (second,)}
    assert sample(logits, request((9,), **params), {first}) == third
    assert sample(logits, request((9, 9), **params), {first}) == first
    assert sample(logits, request((9,), ignore_eos=True, **params), {first}) == first
    scores = MinNewTokensLengthLogitsProcessor(len(PROMPT), 2, [first, second])(
        torch.tensor([[*PROMPT, 9]]), torch.from_numpy(logits)[None].clone())
    assert int(scores.argmax()) == third


def test_the_draw_depends_on_seed_and_position_alone() -> None:
    logits = row(3, 1000, 1.0)
    drawn = {sample(logits, request((5,) * position, seed=seed), ()) for seed in range(5) for position in range(5)}
    assert len(drawn) > 15
    assert sample(logits, request(seed=-1), ()) == sample(logits, request(seed=(1 << 64) - 1), ())
    for offset in range(1, 8):  # wherever in a batch's buffer the row begins
        buffer = np.zeros(1100, dtype=np.float32)
        buffer[offset : offset + 1000] = logits
        moved = buffer[offset : offset + 1000]
        for params in ({}, {"top_p": 0.9}, {"top_k": 9}, {"min_p": 0.01}):
            assert sample(moved, request(seed=8, **params), ()) == sample(logits, request(seed=8, **params), ())
        assert token_logprobs(moved, 7, 5) == token_logprobs(logits, 7, 5)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1 << 20), size=st.sampled_from([1, 2, 97, 5000, 60000]),
       scale=st.sampled_from([0.0, 1.0, 50.0]), num_top=st.integers(0, 20))
def test_logprobs_are_log_softmax(seed: int, size: int, scale: float, num_top: int) -> None:
    logits = row(seed, size, scale)
    token = seed % size
    entry = token_logprobs(logits, token, num_top)
    oracle = torch.from_numpy(logits).double().log_softmax(-1).numpy()
    assert entry.logprob == pytest.approx(oracle[token], abs=2e-5)
    order = np.argsort(-logits, kind="stable")[:num_top]
    assert [i for i, _ in entry.top] == order.tolist()
    assert [value for _, value in entry.top] == pytest.approx(oracle[order].tolist(), abs=2e-5)
    assert token_logprobs(logits, int(order[0]) if num_top else 0, 0).logprob == (entry.top[0][1] if num_top else
                                                                                  token_logprobs(logits, 0, 0).logprob)


@given(values=st.lists(st.integers(-3, 3), min_size=1, max_size=40), k=st.integers(1, 45))
def test_top_indices_with_ties(values: list[int], k: int) -> None:
    array = np.array(values, dtype=np.float32)
    assert top_indices(array, k).tolist() == sorted(range(len(values)), key=lambda i: (-values[i], i))[:k]


def test_logits_that_are_not_finite_are_an_error() -> None:
    for bad in (np.nan, np.inf):
        logits = row(4)
        logits[50] = bad
        with pytest.raises(ValueError, match="not finite"):
            sample(logits, request(), ())
        with pytest.raises(ValueError, match="not finite"), np.errstate(invalid="ignore"):
            token_logprobs(logits, 3, 1)
