"""One vector from rows that come in any steps; and through the engine, beside requests that draw tokens."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fptq_runtime.config import Pooling
from fptq_runtime.engine.pooling import Pooler
from fptq_runtime.engine.request import FinishReason, SamplingParams
from fptq_runtime.errors import FptqError
from tests.engine.fake import gist, logits_after, make_engine, run, solo

POOLINGS: list[Pooling] = ["last", "mean", "weightedmean"]


def pooled(rows: np.ndarray, pooling: Pooling) -> np.ndarray:
    weights = {"last": None, "mean": np.ones(len(rows)), "weightedmean": np.arange(1, len(rows) + 1)}[pooling]
    return rows[-1] if weights is None else np.average(rows.astype(np.float64), 0, weights)


@given(data=st.data(), length=st.integers(1, 40), pooling=st.sampled_from(POOLINGS))
def test_steps_do_not_matter(data: st.DataObject, length: int, pooling: Pooling) -> None:
    """Of any size, and some rows a second time, as after a preemption."""
    rows = np.random.default_rng(length).normal(size=(length, 3)).astype(np.float32)
    whole, parts = Pooler(pooling), Pooler(pooling)
    whole.add(0, rows)
    np.testing.assert_allclose(whole.result(), pooled(rows, pooling), rtol=1e-12)
    at = 0
    while at < length:
        start, end = data.draw(st.integers(0, at)), data.draw(st.integers(at + 1, length))
        parts.add(start, rows[start:end])
        at = end
    assert np.array_equal(whole.result(), parts.result())


def test_what_is_not_finite() -> None:
    pooler = Pooler("mean")
    pooler.add(0, np.array([[1, np.nan]], np.float32))
    with pytest.raises(ValueError, match="not finite"):
        pooler.result()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_in_company(asynchronous: bool) -> None:
    """Prompts in chunks, too little cache, shared prefixes: every vector is that of its own text, and requests that
    draw tokens get what they get alone."""
    generator = random.Random(7)
    engine = make_engine(num_blocks=20, max_num_batched_tokens=24, asynchronous=asynchronous)
    prompts, params = {}, {}
    for number in range(40):
        beginning = [5] * generator.choice([0, 16, 40])
        name = str(number)
        prompts[name] = [*beginning, *generator.choices(range(1, 97), k=generator.randint(1, 60))]
        params[name] = SamplingParams(max_tokens=0, pooling=generator.choice(POOLINGS)) if number % 3 else \
            SamplingParams(max_tokens=12, seed=number, logprobs=1)
        engine.add_request(name, prompts[name], params[name])
    for (name, index), events in run(engine).items():
        if (pooling := params[name].pooling) is None:
            assert gist(events) == gist(solo(prompts[name], params[name])[index])
            continue
        [event] = events
        assert (event.finish_reason, event.token_ids, event.text) == (FinishReason.STOP, (), "")
        rows = np.array([-logits_after(prompts[name][: end + 1]) for end in range(len(prompts[name]))])
        assert event.embedding is not None
        np.testing.assert_allclose(event.embedding, pooled(rows, pooling), rtol=1e-6)


def test_the_whole_context() -> None:
    engine = make_engine(max_model_len=64)
    engine.add_request("full", [3] * 64, SamplingParams(max_tokens=0, pooling="mean"))
    assert run(engine)["full", 0][-1].embedding is not None


@pytest.mark.parametrize("other", [{"max_tokens": 1}, {"n": 2}, {"prompt_logprobs": 0}], ids=str)
def test_nothing_else_at_once(other: dict[str, int]) -> None:
    with pytest.raises(FptqError, match=next(iter(other))):
        SamplingParams(**{"max_tokens": 0, "pooling": "last", **other})
