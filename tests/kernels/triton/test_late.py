"""Steps that are queued and computed late give what they give at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fptq_runtime.engine.engine import Engine
from fptq_runtime.engine.request import SamplingParams
from fptq_runtime.kernels.base import DeviceLostError, StepInput
from fptq_runtime.kernels.triton.backend import TritonBackend, TritonExecutor
from tests.engine.fake import gist, run
from tests.kernels.small import VOCAB, Batcher, Options, limits, make_decoder, random_tokens
from tests.kernels.triton.late import late_device
from tests.kernels.triton.test_backend import engine_for

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

TINY = Options(act="dynamic", layers=1, max_len=128, hidden=32, intermediate=32, heads=2, kv_heads=1)
PARTS = ((("a", 9),), (("a", 5), ("b", 3)), (("a", 1), ("b", 1)), (("a", 1),), (("b", 1), ("a", 1)))
LIMITS = limits(TINY, "int8", block_size=16, num_blocks=8, max_tokens=32)


def executor() -> TritonExecutor:
    backend = TritonBackend()
    return backend.compile(make_decoder(TINY, backend), LIMITS)


def steps() -> list[StepInput]:
    batcher = Batcher(LIMITS, np.random.default_rng(0))
    sequences = {name: batcher.sequence(random_tokens(batcher.rng, 20)) for name in "ab"}
    return [batcher.step([(sequences[name], count) for name, count in parts]) for parts in PARTS]


def test_steps_queued_before_anything_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts in chunks, and replays of a graph's own inputs and logits."""
    plain = executor()
    expected = [plain.step(step).numpy().copy() for step in steps()]
    with late_device(monkeypatch, VOCAB) as device:
        late = executor()
        queued = [late.step(step) for step in steps()]
        assert device.done < device.queued
        device.wait()
        got = [logits.numpy() for logits in queued]
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_an_engine_that_launches_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunked prompts, drawn, scored and stopped by text while the next step is in flight, blocks taken over from
    sequences that it still holds."""
    generator = np.random.default_rng(1)
    sent = [(random_tokens(generator, int(length)), SamplingParams(
        max_tokens=5, temperature=float(i % 2), seed=i, logprobs=i, ignore_eos=True, top_p=0.9 if i == 1 else 1.0,
        prompt_logprobs=0 if i == 2 else None)) for i, length in enumerate((30, 5, 12, 20))]

    def outputs(backend: TritonBackend) -> tuple[Engine, dict[str, Any]]:
        engine = engine_for(backend, make_decoder(TINY, backend), 96, max_num_batched_tokens=13, max_num_seqs=3)
        for i, (token_ids, params) in enumerate(sent):
            engine.add_request(str(i), token_ids, params)
        return engine, {key: gist(events) for key, events in run(engine).items()}

    _, expected = outputs(TritonBackend())
    with late_device(monkeypatch, VOCAB) as device:
        backend = TritonBackend()
        assert backend.asynchronous
        _, got = outputs(backend)
        assert device.taken > 5, "most steps read the tokens of the one before on the device"
    assert got == expected


def test_a_lost_device_is_told_from_a_step_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("an illegal memory access was encountered")

    with late_device(monkeypatch, VOCAB):
        made = executor()
        monkeypatch.setattr(TritonExecutor, "_run", broken)
        with pytest.raises(RuntimeError, match="illegal"):
            made.step(steps()[0])
        monkeypatch.setattr("torch.cuda.synchronize", broken)
        with pytest.raises(DeviceLostError, match="no longer answers: an illegal"):
            made.step(steps()[0])
