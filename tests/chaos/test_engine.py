"""Requests come, go away and break, in any order: the engine loses no block and no answer."""

from __future__ import annotations

import os
import random
from typing import Any

import pytest

from fptq_runtime.engine.engine import QueueFullError
from fptq_runtime.engine.request import FinishReason, Origin, SamplingParams
from tests.engine.fake import make_engine, solo, tokens

REQUESTS = int(os.environ.get("FPTQ_CHAOS_REQUESTS", 400))


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("seed", range(2))
def test_cancelled_at_random(seed: int, asynchronous: bool) -> None:
    """With preemption, shared prefixes, tenants, priorities and broken steps; what is left alone is as if alone."""
    place = random.Random(seed)
    engine = make_engine(max_num_seqs=6, max_num_batched_tokens=40, num_blocks=24, asynchronous=asynchronous,
                         max_waiting_requests=30)
    executor: Any = engine.backend.executor  # type: ignore[attr-defined]
    sent: dict[str, tuple[list[int], SamplingParams]] = {}
    got: dict[tuple[str, int], list[int]] = {}
    reasons: dict[tuple[str, int], FinishReason] = {}
    count = 0

    def fail(batch: Any) -> None:
        executor.before = lambda batch: None
        raise RuntimeError("broken")

    while count < REQUESTS or engine.has_unfinished_requests:
        for _ in range(place.choice((0, 1, 1, 4)) if count < REQUESTS else 0):
            prompt = [place.choice((5, 5, 6))] * place.choice((3, 20, 33)) + [place.randrange(1, 90)]
            params = SamplingParams(n=place.choice((1, 1, 3)), max_tokens=place.choice((0, 1, 9, 60)), seed=count,
                                    ignore_eos=True)
            try:
                engine.add_request(str(count), prompt, params, Origin(place.choice("abc"), place.choice((0, 0, 1))))
            except QueueFullError:
                continue
            sent[str(count)] = prompt, params
            count += 1
        for name in place.sample(sorted(sent), min(len(sent), place.choice((0, 0, 1, 3)))):
            engine.abort(name)
        if place.random() < 0.01:
            executor.before = fail
        for output in engine.step()[0]:
            got.setdefault((output.request_id, output.index), []).extend(output.token_ids)
            if output.finish_reason is not None:
                reasons[output.request_id, output.index] = output.finish_reason
        engine.check_integrity()
    blocks = engine._scheduler.blocks
    assert blocks.usage == 0
    assert {name for name, _ in reasons} == set(sent)
    checked = place.sample(sorted(key for key in reasons if reasons[key] is FinishReason.LENGTH), 20)
    for name, index in checked:
        prompt, params = sent[name]
        assert got.get((name, index), []) == tokens(solo(prompt, params)[index])
    assert {FinishReason.ABORT, FinishReason.LENGTH} <= set(reasons.values())
