"""Oracles: torch's log_softmax in double precision, transformers' logits processors, numpy's Philox; and for the native
sampler the reference, which sorts in double precision."""

from __future__ import annotations

from collections import abc
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import lru_cache
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

from fptq_runtime.engine.output import TokenLogprobs
from fptq_runtime.engine.request import SamplingParams
from fptq_runtime.engine.sampler import SampleBatch, SampleResult, Sampling
from fptq_runtime.engine.sequence import Sequence
from fptq_runtime.kernels.base import SampleInput, SampleOutput
from fptq_runtime.kernels.cpu import CpuBackend, _native
from fptq_runtime.kernels.sampling import _adjust, _masked, draw, sample_reference, uniform

PROMPT = [1, 2, 3]

Implementation = Callable[[np.ndarray, SampleInput], SampleOutput]


@pytest.fixture(scope="module")
def backends() -> Callable[[int, str | None], CpuBackend]:
    return lru_cache(CpuBackend)


@pytest.fixture(scope="module")
def native(backends: Callable[[int, str | None], CpuBackend]) -> Implementation:
    return backends(2, None).sample


@pytest.fixture(scope="module", params=["reference", "native"])
def implementation(request: pytest.FixtureRequest, native: Implementation) -> Implementation:
    return native if request.param == "native" else sample_reference


def request(output: tuple[int, ...] = (), seed: int = 0, **params: Any) -> Sequence:
    made = Sequence("r", 0, PROMPT, SamplingParams(**{"max_tokens": 100, **params}), seed, 0.0)
    made.token_ids.extend(output)
    return made


def row(seed: int, size: int = 200, scale: float = 3.0) -> np.ndarray:
    return (scale * np.random.default_rng(seed).normal(size=size)).astype(np.float32)


def batch_of(requests: abc.Sequence[Sequence], eos: Iterable[int] = (), allowed: np.ndarray | None = None
             ) -> SampleInput:
    """A row of logits for each. allowed: a mask for each row, bool [D, V]."""
    batch = SampleBatch() if allowed is None else SampleBatch(packed(allowed))
    for i, each in enumerate(requests):
        batch.draw(i, each, Sampling(each, eos), -1 if allowed is None else i)
    return batch.build()


def packed(allowed: np.ndarray) -> np.ndarray:
    """bool [masks, V] as SampleInput has it."""
    padded = np.pad(allowed, ((0, 0), (0, -allowed.shape[1] % 32)), constant_values=True)  # beyond V nothing counts
    return np.packbits(padded, axis=1, bitorder="little").view(np.uint32)


def draws(implementation: Implementation, logits: np.ndarray, requests: abc.Sequence[Sequence],
          eos: Iterable[int] = ()) -> list[int]:
    """What each request draws from the same row."""
    rows = np.tile(logits, (len(requests), 1))
    result = SampleResult(implementation(rows, batch_of(requests, eos)), logits.size)
    assert np.array_equal(rows, np.tile(logits, (len(requests), 1)), equal_nan=True), "logits stay as they are"
    return [result.token_id(i) for i in range(len(requests))]


def sample(implementation: Implementation, logits: np.ndarray, request: Sequence, eos: Iterable[int] = ()) -> int:
    return draws(implementation, logits, [request], eos)[0]


def score(implementation: Implementation, logits: np.ndarray, token_id: int, num_top: int) -> TokenLogprobs:
    batch = SampleBatch()
    batch.score(0, token_id, num_top)
    return SampleResult(implementation(logits[None].copy(), batch.build()), logits.size).logprobs(0, num_top)


def frequencies(implementation: Implementation, logits: np.ndarray, count: int = 4000, **params: Any) -> np.ndarray:
    requests = [request(seed=seed, **params) for seed in range(count)]
    return np.bincount(draws(implementation, logits, requests), minlength=logits.size)


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
def test_draws_follow_transformers_distribution(implementation: Implementation, params: dict[str, Any],
                                                processors: list[Any]) -> None:
    logits = row(5)
    logits[PROMPT] += 8  # so that the penalty shows
    assert_drawn_from(frequencies(implementation, logits, **params), expected(logits, *processors))


@settings(max_examples=60)
@given(seed=st.integers(0, 1 << 20), size=st.sampled_from([2, 50, 300, 5000]), scale=st.sampled_from([0.01, 1.0, 8.0]),
       top_k=st.integers(0, 60), top_p=st.floats(0.05, 1.0), min_p=st.sampled_from([0.0, 0.0, 0.2]),
       temperature=st.sampled_from([1e-6, 0.6, 1.0, 3.0]))
def test_nothing_outside_transformers_support_is_drawn(implementation: Implementation, seed: int, size: int,
                                                       scale: float, top_k: int, top_p: float,
                                                       min_p: float, temperature: float) -> None:
    logits = row(seed, size, scale)
    processors = [TemperatureLogitsWarper(temperature)]
    processors += [MinPLogitsWarper(min_p)] if min_p else []
    processors += [TopKLogitsWarper(min(top_k, size))] if top_k else []
    processors += [TopPLogitsWarper(min(top_p + 1e-3, 1.0))]  # where a sum falls on the boundary, rounding decides
    allowed = expected(logits, *processors)
    assume(np.isfinite(allowed).all())
    requests = [request(seed=seed + i, top_k=top_k, top_p=top_p, min_p=min_p, temperature=temperature)
                for i in range(10)]
    assert (allowed[draws(implementation, logits, requests)] > 0).all()


def test_greedy_takes_the_lowest_id_on_ties_and_no_notice_of_the_seed(implementation: Implementation) -> None:
    logits = np.array([0, 3, 1, 3], dtype=np.float32)
    requests = [request(seed=s, temperature=0, top_k=1, top_p=0.5) for s in range(5)]
    assert draws(implementation, logits, requests) == [1] * 5
    zeros = np.array([-1, -0.0, 0.0, -1], dtype=np.float32)
    assert draws(implementation, zeros, [*requests, request(top_k=1, temperature=1)]) == [1] * 6


@pytest.mark.parametrize("temperature", [5e-324, 1e-46, 1e-30, 1e-6, 2e-5])
def test_a_vanishing_temperature_is_greedy(implementation: Implementation, temperature: float) -> None:
    logits = row(6)
    requests = [request(seed=s, temperature=temperature, top_k=9 * (s % 2), top_p=0.5 + 0.1 * s) for s in range(6)]
    assert set(draws(implementation, logits, requests)) == {int(logits.argmax())}


def test_presence_and_frequency_count_the_output_alone(implementation: Implementation) -> None:
    logits = np.zeros(6, dtype=np.float32)
    logits[[4, 5, 1]] = [5.0, 4.0, 4.5]
    requests = [
        request((4, 4), temperature=0),
        request((4, 4), temperature=0, frequency_penalty=0.2),
        request((4, 4), temperature=0, frequency_penalty=0.3),
        request((4, 4), temperature=0, presence_penalty=0.4),
        request((4, 4), temperature=0, presence_penalty=0.6),
        request((1, 4, 4), temperature=0, presence_penalty=2.0),
        request((), temperature=0, presence_penalty=2.0),
    ]
    assert draws(implementation, logits, requests) == [4, 4, 1, 4, 1, 5, 4]


def test_bias_bans_and_forces(implementation: Implementation) -> None:
    logits = row(1)
    first, second = np.argsort(-logits)[:2].tolist()
    requests = [request(temperature=0, logit_bias={first: -100}), request(logit_bias={17: 100})]
    assert draws(implementation, logits, requests) == [second, 17]


def test_ends_are_suppressed_until_min_tokens(implementation: Implementation) -> None:
    logits = row(2)
    first, second, third = np.argsort(-logits)[:3].tolist()
    params: dict[str, Any] = {"temperature": 0, "min_tokens": 2, "stop_token_ids": (second,)}
    requests = [request((9,), **params), request((9, 9), **params), request((9,), ignore_eos=True, **params),
                request((9,), logit_bias={third: -50, first: 80}, **params)]
    fourth = int(np.argsort(-logits)[3])
    assert draws(implementation, logits, requests, {first}) == [third, first, first, fourth]
    scores = MinNewTokensLengthLogitsProcessor(len(PROMPT), 2, [first, second])(
        torch.tensor([[*PROMPT, 9]]), torch.from_numpy(logits)[None].clone())
    assert int(scores.argmax()) == third


def test_the_draw_depends_on_seed_and_position_alone(implementation: Implementation) -> None:
    logits = row(3, 1000, 1.0)
    requests = [request((5,) * position, seed=seed) for seed in range(5) for position in range(5)]
    assert len(set(draws(implementation, logits, requests))) > 15
    assert len(set(draws(implementation, logits, [request(seed=-1), request(seed=(1 << 64) - 1)]))) == 1


def test_a_mask_leaves_the_distribution_of_what_it_allows(implementation: Implementation) -> None:
    logits, allowed = row(8, 300), np.random.default_rng(8).random(300) < 0.3
    logits[np.flatnonzero(~allowed)[:3]] = np.nan, np.inf, 90
    batch = batch_of([request(seed=seed, logprobs=20, logit_bias={5: 2.0}) for seed in range(4000)],
                     allowed=np.tile(allowed, (4000, 1)))
    result = SampleResult(implementation(np.tile(logits, (4000, 1)), batch), logits.size)
    left = torch.from_numpy(np.where(allowed, logits, -np.inf)).double()
    own = left.log_softmax(-1)
    left[5] += 2
    counts = np.bincount([result.token_id(i) for i in range(4000)], minlength=logits.size)
    assert_drawn_from(counts, left.softmax(-1).numpy())
    for i in range(20):
        entry = result.logprobs(i, 20, masked=True)
        assert entry.logprob == pytest.approx(float(own[entry.token_id]), abs=2e-5)
        assert [token_id for token_id, _ in entry.top] == own.topk(20).indices.tolist()


def test_a_mask_of_few_tokens_or_none(implementation: Implementation) -> None:
    """Fewer than are to be reported; bias brings none of the others back."""
    logits = row(9, 70)
    allowed = np.zeros((3, 70), bool)
    allowed[0, [3, 64]], allowed[1, 69] = True, True
    params: dict[str, Any] = {"logprobs": 5, "logit_bias": {4: 100.0}}
    output = implementation(np.tile(logits, (3, 1)), batch_of([request(**params)] * 3, allowed=allowed))
    result = SampleResult(output, logits.size)
    assert {token_id for token_id, _ in result.logprobs(0, 5, masked=True).top} == {3, 64}
    assert result.token_id(0) in (3, 64)
    assert result.logprobs(1, 5, masked=True) == TokenLogprobs(69, 0.0, ((69, 0.0),))
    assert output.token_ids[2] == -1


@settings(max_examples=40)
@given(seed=st.integers(0, 1 << 20), size=st.sampled_from([1, 2, 97, 5000, 60000]),
       scale=st.sampled_from([0.0, 1.0, 50.0]), num_top=st.integers(0, 20))
def test_logprobs_are_log_softmax(implementation: Implementation, seed: int, size: int, scale: float,
                                  num_top: int) -> None:
    logits = row(seed, size, scale)
    token = seed % size
    entry = score(implementation, logits, token, num_top)
    oracle = torch.from_numpy(logits).double().log_softmax(-1).numpy()
    assert entry.token_id == token
    assert entry.logprob == pytest.approx(oracle[token], abs=2e-5)
    order = np.argsort(-logits, kind="stable")[:num_top]
    assert [i for i, _ in entry.top] == order.tolist()
    assert [value for _, value in entry.top] == pytest.approx(oracle[order].tolist(), abs=2e-5)
    for token_id, logprob in entry.top:
        assert score(implementation, logits, token_id, 0).logprob == logprob  # to the bit


def test_logprobs_of_a_draw_are_the_models_own(implementation: Implementation) -> None:
    """Whatever its bias and temperature."""
    logits = row(7, 3000)
    batch = batch_of([request(temperature=0.5, logit_bias={5: 90}, repetition_penalty=1.3, logprobs=4)])
    result = SampleResult(implementation(logits[None].copy(), batch), logits.size)
    assert result.logprobs(0, 4) == score(implementation, logits, 5, 4)


@given(values=st.lists(st.integers(-3, 3), min_size=1, max_size=40), k=st.integers(1, 45))
def test_top_logprobs_with_ties(implementation: Implementation, values: list[int], k: int) -> None:
    array = np.array([-np.inf if v == -3 else v for v in values] + [0], dtype=np.float32)
    top = score(implementation, array, 0, k).top
    assert [i for i, _ in top] == sorted(range(array.size), key=lambda i: (-array[i], i))[:k]


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf])
@pytest.mark.parametrize("at", [0, 50, 1023, 1030])
@pytest.mark.parametrize("params", [{}, {"temperature": 0}, {"top_k": 5}, {"top_p": 0.5}, {"logprobs": 2}])
def test_logits_that_are_not_finite_harm_their_row_alone(implementation: Implementation, bad: float, at: int,
                                                         params: dict[str, Any]) -> None:
    logits = np.stack([row(4, 1031), row(5, 1031), row(6, 1031)])
    good = implementation(logits, batch_of([request(**params)] * 3)).token_ids
    logits[1, at] = bad
    output = implementation(logits, batch_of([request(**params)] * 3))
    assert output.token_ids.tolist() == [good[0], -1, good[2]]
    result = SampleResult(output, 1031)
    for read in (lambda: result.token_id(1), lambda: result.logprobs(1, 1)):
        with pytest.raises(ValueError, match="not finite"):
            read()


SHAPES = {
    "normal": lambda rng, size: rng.normal(size=size),
    "wide": lambda rng, size: 8 * rng.normal(size=size),
    "flat": lambda rng, size: np.full(size, 1.5),
    "nearly flat": lambda rng, size: 1e-3 * rng.normal(size=size),
    "ties": lambda rng, size: rng.integers(-4, 4, size).astype(float),
    "one token": lambda rng, size: np.where(np.arange(size) == size // 2, 40.0, rng.normal(size=size)),
    "bottomless": lambda rng, size: np.where(rng.random(size) < 0.5, -np.inf, 1e30 * rng.random(size)),
    "huge": lambda rng, size: 1e38 * (rng.random(size) - 0.5),
}
PARAMS = st.fixed_dictionaries({}, optional={
    "temperature": st.sampled_from([0.0, 1e-4, 0.3, 0.7, 1.0, 2.0, 100.0]),
    "top_p": st.sampled_from([1e-9, 0.05, 0.5, 0.9, 0.95, 0.999, 1 - 1e-9]),
    "top_k": st.sampled_from([1, 2, 40, 300, 2500, 1 << 40]),
    "min_p": st.sampled_from([1e-6, 0.05, 0.5, 1.0]),
    "repetition_penalty": st.sampled_from([0.8, 1.3]),
    "presence_penalty": st.sampled_from([-0.5, 1.0]),
    "frequency_penalty": st.sampled_from([-0.2, 0.3]),
    "logit_bias": st.dictionaries(st.integers(0, 9), st.sampled_from([-100.0, -1.0, 2.0]), max_size=5),
    "min_tokens": st.integers(0, 4),
    "logprobs": st.integers(0, 20),
})
SHARES = st.sampled_from([None, 0.0, 0.01, 0.5, 0.99])
REQUESTS = st.builds(lambda output, seed, params: request(tuple(output), seed, **params),
                     st.lists(st.integers(0, 9), max_size=6), st.integers(-5, 1 << 50), PARAMS)


@settings(max_examples=150)
@given(requests=st.lists(REQUESTS, min_size=1, max_size=5), shape=st.sampled_from(sorted(SHAPES)),
       size=st.sampled_from([10, 97, 512, 513, 5000, 20011]), seed=st.integers(0, 1 << 20), share=SHARES)
def test_native_draws_what_the_reference_draws(native: Implementation, requests: list[Sequence], shape: str, size: int,
                                               seed: int, share: float | None) -> None:
    assert_draws_as_the_reference(native, requests, shape, size, seed, share, absolute=2e-5, relative=1e-6)


def assert_draws_as_the_reference(implementation: Implementation, requests: list[Sequence], shape: str, size: int,
                                  seed: int, share: float | None, absolute: float, relative: float) -> None:
    """Where both could, that is: at a boundary of the cumulative distribution or of a cut rounding decides. Log-
    probabilities within these. share: of the tokens, about so many are allowed; None: no masks."""
    rng = np.random.default_rng(seed)
    logits = np.stack([SHAPES[shape](rng, size) for _ in requests]).astype(np.float32)
    logits[:, 0] = np.where(np.isfinite(logits).any(axis=1), logits[:, 0], 0)
    allowed = None if share is None else rng.random(logits.shape) <= share
    if allowed is not None:
        logits[~allowed & (rng.random(logits.shape) < 0.1)] = np.nan  # nobody looks at these
        allowed[:, 0], logits[:, 0] = True, np.nan_to_num(logits[:, 0], neginf=0)
    batch = batch_of(requests, eos=(2, 5), allowed=allowed)
    got, reference = implementation(logits.copy(), batch), sample_reference(logits, batch)
    for d, each in enumerate(requests):
        if got.token_ids[d] != reference.token_ids[d]:
            assert got.token_ids[d] in nearby(logits, batch, d)
            continue
        if (top := each.params.logprobs) is not None:
            assert got.logprobs[d] == pytest.approx(reference.logprobs[d], abs=absolute, rel=relative)
            top = min(top, size)
            assert got.top_ids[d, :top].tolist() == reference.top_ids[d, :top].tolist()
            np.testing.assert_allclose(got.top_logprobs[d, :top], reference.top_logprobs[d, :top], atol=absolute,
                                       rtol=relative)


def nearby(logits: np.ndarray, batch: SampleInput, d: int) -> set[int]:
    """What the reference would draw with parameters and randomness a little off."""
    found = set()
    for p in (-2e-6, 0, 2e-6):
        for u in (-2e-6, 0, 2e-6):
            parameters = batch.parameters[d].copy()
            parameters["top_p"] = min(parameters["top_p"] * (1 + p), 1) if parameters["top_p"] < 1 else 1
            parameters["min_p"] *= 1 + p
            off = uniform(int(parameters["seed"]), int(batch.positions[d])) + u
            found.add(draw(_adjust(_masked(logits[d], batch, d), batch, d), parameters, min(max(off, 0.0), 1 - 1e-16)))
    return found


def test_uniform_is_numpys_philox(native: Implementation) -> None:
    """With equal weights a draw shows the leading bits of its uniform."""
    logits = np.zeros((400, 1 << 14), dtype=np.float32)
    requests = [request((5,) * (i % 7), seed=(i * 0x9E3779B97F4A7C15) % (1 << 64)) for i in range(400)]
    drawn = native(logits, batch_of(requests)).token_ids
    for token_id, each in zip(drawn, requests, strict=True):
        bits = np.random.Philox(key=each.seed, counter=each.num_tokens).random_raw()
        assert token_id == bits >> 50


@settings(max_examples=25)
@given(requests=st.lists(REQUESTS, min_size=2, max_size=6), shape=st.sampled_from(sorted(SHAPES)),
       size=st.sampled_from([97, 513, 20011]), seed=st.integers(0, 1 << 20), data=st.data())
def test_bits_do_not_depend_on_company_threads_or_isa(
    native: Implementation, backends: Callable[[int, str | None], CpuBackend], requests: list[Sequence], shape: str,
    size: int, seed: int, data: st.DataObject,
) -> None:
    rng = np.random.default_rng(seed)
    logits = np.stack([SHAPES[shape](rng, size) for _ in requests]).astype(np.float32)
    share = data.draw(SHARES)
    allowed = None if share is None else rng.random(logits.shape) <= share
    whole = native(logits.copy(), batch_of(requests, allowed=allowed))
    d = data.draw(st.integers(0, len(requests) - 1))
    for threads in (1, 3):
        for isa in _native.available_isas():
            other = backends(threads, isa).sample(logits.copy(), batch_of(requests, allowed=allowed))
            assert_same(whole, other, requests)
    offset = data.draw(st.integers(0, 15))  # wherever in memory the row begins
    buffer = np.zeros(size + 16, dtype=np.float32)
    buffer[offset : offset + size] = logits[d]
    own = None if allowed is None else allowed[d : d + 1]
    alone = native(buffer[None, offset : offset + size], batch_of([requests[d]], allowed=own))
    assert_same(SampleOutput(*(array[d : d + 1] for array in vars(whole).values())), alone, [requests[d]])


def assert_same(a: SampleOutput, b: SampleOutput, requests: abc.Sequence[Sequence]) -> None:
    assert a.token_ids.tolist() == b.token_ids.tolist()
    for d, each in enumerate(requests):
        if each.params.logprobs is not None and a.token_ids[d] >= 0:
            top = each.params.logprobs
            assert a.logprobs[d] == b.logprobs[d]
            assert a.top_ids[d, :top].tolist() == b.top_ids[d, :top].tolist()
            assert a.top_logprobs[d, :top].tolist() == b.top_logprobs[d, :top].tolist()


BATCH = batch_of([request((4, 5), logit_bias={3: 1.0}, presence_penalty=1.0, logprobs=2)] * 2,
                 allowed=np.ones((2, 50), bool))
int32 = lambda *values: np.array(values, np.int32)  # noqa: E731
MISTAKES: list[dict[str, Any]] = [
    {"rows": int32(0, 2)}, {"rows": int32(-1, 1)}, {"rows": int32(1, 1)}, {"rows": int32(1, 0)},
    {"token_ids": int32(-2, 0)}, {"token_ids": int32(0, 50)},
    {"num_logprobs": int32(-2, 1)},
    {"mask_rows": int32(0, 2)}, {"mask_rows": int32(-2, 0)},
    {"masks": BATCH.masks[:, :1].copy()}, {"masks": BATCH.masks.view(np.int32)}, {"masks": BATCH.masks[0]},
    {"bias_ids": int32(3, 50)}, {"bias_ids": int32(-1, 3)},
    {"bias_start": int32(1, 1, 2)}, {"bias_start": int32(0, 2, 1)}, {"bias_start": int32(0, 1, 3)},
    {"history": BATCH.history - 9}, {"history": BATCH.history + 47},
    {"history_start": int32(1, 5, 10)}, {"history_start": int32(0, 5, 11)}, {"history_start": int32(0, 5, 4)},
    {"output_start": int32(6, 8)}, {"output_start": int32(3, 4)},
    {"positions": BATCH.positions.astype(np.int32)}, {"positions": BATCH.positions[:1]},
    {"parameters": BATCH.parameters.astype([(name, "f8") for name in BATCH.parameters.dtype.names])},
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda m: f"{next(iter(m))} {next(iter(m.values())).tolist()}")
def test_a_wrong_array_is_refused_by_name_and_nothing_is_drawn(native: Implementation, mistake: dict[str, Any]) -> None:
    logits = np.stack([row(1, 50), row(2, 50)])
    before = logits.copy()
    with pytest.raises(ValueError, match=next(iter(mistake))):
        native(logits, replace(BATCH, **mistake))
    assert np.array_equal(logits, before)


@pytest.mark.parametrize(("name", "value"), [
    ("temperature", np.nan), ("temperature", -1), ("top_p", 0), ("top_p", np.nan), ("min_p", 1.1), ("top_k", -1),
    ("repetition_penalty", 0), ("presence_penalty", np.inf), ("frequency_penalty", np.nan),
])
def test_wrong_parameters_are_refused(native: Implementation, name: str, value: float) -> None:
    parameters = BATCH.parameters.copy()
    parameters[name][1] = value
    with pytest.raises(ValueError, match=r"parameters\[1\]"):
        native(np.stack([row(1, 50), row(2, 50)]), replace(BATCH, parameters=parameters))


def test_a_batch_may_be_empty(native: Implementation) -> None:
    assert native(np.zeros((0, 50), np.float32), SampleBatch().build()).token_ids.size == 0
