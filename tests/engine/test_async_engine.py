from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from fptq_runtime.engine.async_engine import AsyncEngine, EngineDeadError, RequestStream
from fptq_runtime.engine.engine import QueueFullError, RequestError
from fptq_runtime.engine.output import RequestOutput
from fptq_runtime.engine.request import FinishReason, SamplingParams
from fptq_runtime.engine.stats import StepStats
from fptq_runtime.kernels.base import DeviceLostError
from tests.engine.fake import gist, make_engine, solo, tokens

GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
ENDLESS = SamplingParams(max_tokens=100_000, temperature=0, ignore_eos=True)


@asynccontextmanager
async def running(on_stats: Callable[[StepStats], None] | None = None, **options: Any) -> AsyncIterator[AsyncEngine]:
    engine = AsyncEngine(make_engine(**options), on_stats)
    engine.start()
    try:
        yield engine
    finally:
        await asyncio.to_thread(engine.stop)


def executor(engine: AsyncEngine) -> Any:
    return engine.engine.backend.executor  # type: ignore[attr-defined]


async def collect(stream: RequestStream) -> list[RequestOutput]:
    return [output async for output in stream]


def in_loop(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    def wrapper() -> None:
        asyncio.run(asyncio.wait_for(test(), 60))

    wrapper.__name__ = test.__name__
    return wrapper


@in_loop
async def test_32_streams_each_equal_to_its_solo_run() -> None:
    async with running(max_num_seqs=20, max_num_batched_tokens=50, num_blocks=90) as engine:
        params = [SamplingParams(max_tokens=20, seed=i, logprobs=2, ignore_eos=True) for i in range(32)]
        prompts = [[i % 5 + 1] * (i + 3) for i in range(32)]
        streams = [engine.add_request(str(i), prompts[i], params[i]) for i in range(32)]
        for i, events in enumerate(await asyncio.gather(*map(collect, streams))):
            assert gist(events) == gist(solo(prompts[i], params[i])[0])
        assert engine.seconds_since_progress == 0
        assert engine.engine.num_running == engine.engine.num_waiting == 0


@in_loop
async def test_a_stream_ends_after_its_last_sequence() -> None:
    async with running() as engine:
        params = SamplingParams(n=3, max_tokens=5, seed=1, ignore_eos=True)
        events = await collect(engine.add_request("a", [1, 2], params))
        assert sorted(e.index for e in events if e.finish_reason) == [0, 1, 2]
        assert await collect(engine.add_request("a", [1, 2], params)) == events


@in_loop
async def test_bad_and_excess_requests_are_refused_at_once() -> None:
    async with running(max_num_seqs=1, max_waiting_requests=1) as engine:
        with pytest.raises(RequestError):
            engine.add_request("bad", [], GREEDY)
        held = threading.Event()
        executor(engine).before = lambda batch: held.wait(10)
        first, second = (engine.add_request(name, [1], ENDLESS) for name in "ab")
        with pytest.raises(QueueFullError):
            engine.add_request("c", [1], GREEDY)
        first.abort()
        second.abort()
        held.set()
        for stream in (first, second):
            assert (await collect(stream))[-1].finish_reason is FinishReason.ABORT
        assert len(await collect(engine.add_request("c", [1], GREEDY))) == 12


@in_loop
async def test_abort() -> None:
    async with running(max_model_len=100_000, num_blocks=7000) as engine:
        stream = engine.add_request("a", [1], ENDLESS)
        async for output in stream:
            if output.num_output_tokens == 3:
                break
        stream.abort()
        assert (await collect(stream))[-1].finish_reason is FinishReason.ABORT
        assert not engine.engine.has_unfinished_requests
        assert len(await collect(engine.add_request("b", [1], GREEDY))) == 12


@in_loop
async def test_drain_waits_refuses_and_then_aborts() -> None:
    async with running() as engine:
        stream = engine.add_request("a", [1], GREEDY)
        assert await engine.drain(30) == 0
        with pytest.raises(QueueFullError) as refused:
            engine.add_request("b", [1], GREEDY)
        assert refused.value.reason == "draining"
        assert (await collect(stream))[-1].finish_reason is FinishReason.LENGTH
    async with running(max_model_len=100_000, num_blocks=7000) as engine:
        streams = [engine.add_request(str(i), [1], ENDLESS) for i in range(3)]
        assert await engine.drain(0.05) == 3
        for stream in streams:
            assert (await collect(stream))[-1].finish_reason is FinishReason.ABORT


@in_loop
async def test_stop_ends_open_streams() -> None:
    engine = AsyncEngine(make_engine(max_model_len=100_000, num_blocks=7000))
    engine.start()
    stream = engine.add_request("a", [1], ENDLESS)
    await anext(stream)
    await asyncio.to_thread(engine.stop)
    assert (await collect(stream))[-1].finish_reason is FinishReason.ABORT
    with pytest.raises(EngineDeadError):
        engine.add_request("b", [1], GREEDY)
    assert engine.error is None


@in_loop
async def test_a_failed_step_hangs_nobody() -> None:
    async with running() as engine:
        def fail(batch: Any) -> None:
            executor(engine).before = lambda batch: None
            raise RuntimeError("the kernel broke")

        executor(engine).before = fail
        assert (await collect(engine.add_request("a", [1], GREEDY)))[-1].finish_reason is FinishReason.ERROR
        assert tokens(await collect(engine.add_request("b", [1], GREEDY))) == tokens(solo([1], GREEDY)[0])
        assert engine.error is None


@in_loop
async def test_probes_run_while_there_is_no_work() -> None:
    """One by one, round after round, and none while a request waits; what they find is told."""
    rounds: list[float] = []
    deviations = [[0.1, 0.5], [], [0.2, 7.0, 0.3], [0.4]]

    def probes() -> Iterator[float]:
        yield from deviations.pop(0) if deviations else [0.0]

    inner = make_engine()
    inner.probes = probes
    engine = AsyncEngine(inner, None, rounds.append, probe_interval=0.01)
    engine.start()
    for _ in range(20):
        assert tokens(await collect(engine.add_request("a", [1], GREEDY))) == tokens(solo([1], GREEDY)[0])
    while len(rounds) < 5:
        await asyncio.sleep(0.01)
    assert rounds[:5] == [0.5, 0.0, 7.0, 0.4, 0.0]
    await asyncio.to_thread(engine.stop)
    assert engine.deviation == 0.0
    assert engine.error is None


@in_loop
async def test_a_lost_device_ends_the_engine() -> None:
    """So that /livez fails and the process is started anew, instead of failing request after request."""
    async with running() as engine:
        def lose(batch: Any) -> None:
            raise DeviceLostError("the GPU no longer answers")

        executor(engine).before = lose
        assert (await collect(engine.add_request("a", [1], GREEDY)))[-1].finish_reason is FinishReason.ERROR
        assert isinstance(engine.error, DeviceLostError)


@in_loop
async def test_a_dead_thread_ends_every_stream() -> None:
    async with running() as engine:
        added = threading.Event()
        engine.engine._scheduler.schedule = (  # type: ignore[method-assign]
            lambda _: added.wait(10) and 1 / 0)  # type: ignore[assignment,return-value]
        streams = [engine.add_request(str(i), [1], SamplingParams(n=2)) for i in range(3)]
        added.set()
        for stream in streams:
            assert {e.finish_reason for e in await collect(stream)} == {FinishReason.ERROR}
        assert isinstance(engine.error, ZeroDivisionError)
        with pytest.raises(EngineDeadError):
            engine.add_request("late", [1], GREEDY)
        assert engine.seconds_since_progress > 0


@in_loop
async def test_stats_that_cannot_be_published_stop_nothing() -> None:
    seen: list[StepStats] = []

    def publish(stats: StepStats) -> None:
        seen.append(stats)
        raise RuntimeError("no metrics today")

    async with running(publish) as engine:
        assert len(await collect(engine.add_request("a", [1], GREEDY))) == 12
        assert engine.error is None
    assert sum(stats.generated_tokens for stats in seen) == 12


@in_loop
async def test_the_loop_is_woken_once_a_step() -> None:
    async with running(max_num_seqs=16) as engine:
        loop = asyncio.get_running_loop()
        wakeups: list[Any] = []
        original = loop.call_soon_threadsafe

        def counted(callback: Any, *args: Any, **kwargs: Any) -> Any:
            if threading.current_thread().name == "fptq-engine":
                wakeups.append(args)
            return original(callback, *args, **kwargs)

        loop.call_soon_threadsafe = counted  # type: ignore[method-assign]
        held = threading.Event()
        executor(engine).before = lambda batch: held.wait(10)
        streams = [engine.add_request(str(i), [i + 1], GREEDY) for i in range(16)]
        held.set()
        await asyncio.gather(*map(collect, streams))
        assert len(wakeups) <= 13 < 16 * 12


@in_loop
async def test_progress_is_measured_while_a_step_runs() -> None:
    async with running() as engine:
        entered, held = threading.Event(), threading.Event()

        def hold(batch: Any) -> None:
            entered.set()
            held.wait(10)

        executor(engine).before = hold
        stream = engine.add_request("a", [1], GREEDY)
        assert await asyncio.to_thread(entered.wait, 10)
        await asyncio.sleep(0.05)
        assert engine.seconds_since_progress >= 0.05
        held.set()
        await collect(stream)
        assert engine.seconds_since_progress == 0
