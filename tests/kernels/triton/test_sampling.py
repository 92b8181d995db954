"""The device's draws: what the reference draws, and the sampler's own tests that need few draws."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fptq_runtime.engine.sequence import Sequence
from fptq_runtime.kernels.base import SampleInput, SampleOutput
from fptq_runtime.kernels.sampling import sample_reference
from fptq_runtime.kernels.triton.sampling import NUCLEUS
from fptq_runtime.kernels.triton.sampling import sample as sample_on_device
from tests.engine import test_sampler as sampler
from tests.engine.test_sampler import (
    REQUESTS,
    SHAPES,
    SHARES,
    Implementation,
    assert_draws_as_the_reference,
    batch_of,
    request,
    row,
)

test_greedy_and_ties = sampler.test_greedy_takes_the_lowest_id_on_ties_and_no_notice_of_the_seed
test_a_vanishing_temperature_is_greedy = sampler.test_a_vanishing_temperature_is_greedy
test_presence_and_frequency = sampler.test_presence_and_frequency_count_the_output_alone
test_bias_bans_and_forces = sampler.test_bias_bans_and_forces
test_ends_are_suppressed_until_min_tokens = sampler.test_ends_are_suppressed_until_min_tokens
test_a_mask_of_few_tokens_or_none = sampler.test_a_mask_of_few_tokens_or_none
test_logprobs_of_a_draw_are_the_models_own = sampler.test_logprobs_of_a_draw_are_the_models_own


def sample(logits: np.ndarray, batch: SampleInput) -> SampleOutput:
    return sample_on_device(torch.from_numpy(logits), batch).result()


@pytest.fixture(scope="module")
def implementation() -> Implementation:
    return sample


@settings(max_examples=30)
@given(requests=st.lists(REQUESTS, min_size=1, max_size=4), shape=st.sampled_from(sorted(SHAPES)),
       size=st.sampled_from([10, 97, 2048, 2049, 5000]), seed=st.integers(0, 1 << 20), share=SHARES)
def test_it_draws_what_the_reference_draws(requests: list[Sequence], shape: str, size: int, seed: int,
                                           share: float | None) -> None:
    assert_draws_as_the_reference(sample, requests, shape, size, seed, share, absolute=1e-12, relative=1e-12)


def test_uniform_is_numpys_philox() -> None:
    """With equal weights a draw shows the leading bits of its uniform."""
    logits = np.zeros((10, 1 << 12), dtype=np.float32)
    requests = [request((5,) * (i % 7), seed=(i * 0x9E3779B97F4A7C15) % (1 << 64)) for i in range(10)]
    for token_id, each in zip(sample(logits, batch_of(requests)).token_ids, requests, strict=True):
        assert token_id == np.random.Philox(key=each.seed, counter=each.num_tokens).random_raw() >> 52


@pytest.mark.parametrize("top_k", [0, NUCLEUS + 500])
def test_a_nucleus_of_more_tokens_than_are_looked_at_first(top_k: int) -> None:
    logits = np.stack([row(i, 5000, scale) for i, scale in enumerate([0.1, 5.0, 0.1, 3.0])])
    requests = [request(top_p=0.9, top_k=top_k, logprobs=2, seed=i) for i in range(4)]
    batch = batch_of(requests)
    got, reference = sample(logits, batch), sample_reference(logits, batch)
    assert got.token_ids.tolist() == reference.token_ids.tolist()
    np.testing.assert_allclose(got.logprobs, reference.logprobs, 1e-12)
    assert got.top_ids.tolist() == reference.top_ids.tolist()


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf])
@pytest.mark.parametrize("params", [{}, {"temperature": 0}, {"top_p": 0.5}, {"logprobs": 2}, {"logit_bias": {3: 1}}])
def test_logits_that_are_not_finite_harm_their_row_alone(bad: float, params: dict[str, Any]) -> None:
    logits = np.stack([row(4, 1031), row(5, 1031), row(6, 1031), np.full(1031, -np.inf, np.float32)])
    good = sample(logits[:3], batch_of([request(**params)] * 3)).token_ids
    logits[1, 1030] = bad
    assert sample(logits, batch_of([request(**params)] * 4)).token_ids.tolist() == [good[0], -1, good[2], -1]


def test_scores_and_draws_of_one_batch_and_their_company() -> None:
    """Rows may be scored and drawn from; a draw has the same bits whatever stands beside it."""
    logits = np.stack([row(i, 3000) for i in range(4)])
    requests = [request(seed=i, temperature=[0.0, 1.0, 2.0, 0.7][i], top_p=[1, 0.9, 0.999, 1][i],
                        top_k=[0, 0, 0, 1500][i], logprobs=i, frequency_penalty=0.1 * i) for i in range(4)]
    batch = sampler.SampleBatch()
    for i, each in enumerate(requests):
        batch.score(i, 17 + i, i)
        batch.draw(i, each, sampler.Sampling(each, ()))
    made = batch.build()
    together, reference = sample(logits, made), sample_reference(logits, made)
    assert together.token_ids.tolist() == reference.token_ids.tolist()
    for i, each in enumerate(requests):
        alone = sample(logits[i : i + 1], batch_of([each]))
        assert alone.token_ids[0] == together.token_ids[2 * i + 1]
        assert alone.logprobs[0] == together.logprobs[2 * i + 1]
        assert alone.top_logprobs[0, :i].tolist() == together.top_logprobs[2 * i + 1, :i].tolist()


def test_nothing_to_draw() -> None:
    assert sample(np.zeros((3, 7), np.float32), batch_of([])).token_ids.size == 0
