"""The engine on a thread of its own, and its outputs as asyncio streams."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from fptq_runtime.engine.engine import Engine, Place, QueueFullError
from fptq_runtime.engine.grammar import COMPILE_SECONDS, Grammar
from fptq_runtime.engine.output import RequestOutput
from fptq_runtime.engine.request import ANYONE, FinishReason, Origin, SamplingParams
from fptq_runtime.engine.stats import StepStats

logger = logging.getLogger(__name__)

STOP_SECONDS = 30.0  # how long stop() waits for the step that runs


class EngineDeadError(RuntimeError):
    """The engine's thread has ended; nothing more can be served."""


class RequestStream:
    """One request's outputs, in order, until every sequence has a finish_reason. Belongs to the event loop that added
    the request."""

    def __init__(self, request_id: str, num_sequences: int, abort: Callable[[str], None]) -> None:
        self.request_id = request_id
        self.unfinished = set(range(num_sequences))
        self._abort = abort
        self._outputs: deque[RequestOutput] = deque()
        self._arrived: asyncio.Future[None] | None = None  # what the consumer waits for
        self._undelivered = num_sequences  # sequences whose end the consumer has not seen

    def put(self, output: RequestOutput) -> None:
        if output.index in self.unfinished:
            self._outputs.append(output)
            if self._arrived is not None and not self._arrived.done():
                self._arrived.set_result(None)
            if output.finish_reason is not None:
                self.unfinished.discard(output.index)

    def abort(self) -> None:
        """Stop generating; the stream then ends with FinishReason.ABORT."""
        if self.unfinished:
            self._abort(self.request_id)

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> RequestOutput:
        if self._undelivered == 0:
            raise StopAsyncIteration
        while not self._outputs:
            self._arrived = asyncio.get_running_loop().create_future()
            await self._arrived
        output = self._outputs.popleft()
        if output.finish_reason is not None:
            self._undelivered -= 1
        return output


class AsyncEngine:
    """Runs engine.step() on its own thread while there is work, and sleeps otherwise.

    All methods belong to one event loop and never wait for a step. on_stats is called on the engine's thread.
    error: what ended the thread, if anything did; every open stream has then ended with FinishReason.ERROR.
    deviation: the greatest of the engine's probes, which run one by one while there is no work, all of them every
    probe_interval seconds; 1 is what is tolerated, None before the first round's end. on_deviation gets it too.
    """

    def __init__(self, engine: Engine[Any], on_stats: Callable[[StepStats], None] | None = None,
                 on_deviation: Callable[[float], None] | None = None, probe_interval: float = 60.0) -> None:
        self.engine = engine
        self.error: BaseException | None = None
        self.draining = False
        self.deviation: float | None = None
        self._on_stats = on_stats
        self._on_deviation = on_deviation
        self._probe_interval = probe_interval
        self._round: Iterator[float] | None = None
        self._worst = 0.0
        self._next_round = time.monotonic() + probe_interval
        self._streams: dict[str, RequestStream] = {}  # only touched on the event loop
        self._loop: asyncio.AbstractEventLoop | None = None
        self._idle = asyncio.Event()  # no stream is open
        self._idle.set()
        self._work = threading.Condition()
        self._stopping = False
        self._last_progress = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="fptq-engine", daemon=True)

    @property
    def seconds_since_progress(self) -> float:
        """Since the step that runs began, or since the thread died with work left; 0 when idle."""
        return time.monotonic() - self._last_progress if self.engine.has_unfinished_requests else 0.0

    def start(self) -> None:
        self._thread.start()

    def enter(self, origin: Origin = ANYONE) -> Place:
        """A place for a request that is not read yet. Raises QueueFullError."""
        if self.draining:
            raise QueueFullError(1.0, "draining")
        return self.engine.enter(origin)

    def add_request(self, request_id: str, prompt_token_ids: Sequence[int], params: SamplingParams,
                    origin: Origin = ANYONE, adapter: str = "") -> RequestStream:
        """Raises RequestError, AdapterError, QueueFullError, or EngineDeadError."""
        if self.draining:
            raise QueueFullError(1.0, "draining")
        with self._work:
            if self.error is not None or self._stopping:
                raise EngineDeadError("the engine has stopped")
            if not self.engine.has_unfinished_requests:
                self._last_progress = time.monotonic()
            self.engine.add_request(request_id, prompt_token_ids, params, origin, adapter)
            stream = RequestStream(request_id, params.n, self._abort)
            self._loop = asyncio.get_running_loop()
            self._streams[request_id] = stream
            self._idle.clear()
            self._work.notify()
        return stream

    async def compile(self, grammar: Grammar) -> None:
        """Have a grammar ready for add_request, which would wait for it. Raises GrammarError."""
        grammars = self.engine.grammars
        await asyncio.wait([asyncio.wrap_future(grammars.tokenizer)])
        await asyncio.wait([asyncio.wrap_future(grammars.submit(grammar))], timeout=COMPILE_SECONDS)
        grammars.parser(grammar, timeout=0)

    async def drain(self, timeout: float) -> int:
        """Refuse what is new and wait for what runs, at most `timeout` seconds; then abort the rest. Returns how many
        requests were aborted."""
        self.draining = True
        if await self._wait_idle(timeout):
            return 0
        unfinished = list(self._streams.values())
        for stream in unfinished:
            stream.abort()
        await self._wait_idle(STOP_SECONDS)
        return len(unfinished)

    def stop(self) -> None:
        """End the thread after the step that runs; open streams end with FinishReason.ABORT."""
        with self._work:
            self._stopping = True
            self._work.notify()
        if self._thread.is_alive():
            self._thread.join(STOP_SECONDS)

    async def _wait_idle(self, timeout: float) -> bool:
        try:
            await asyncio.wait_for(self._idle.wait(), timeout)
        except asyncio.TimeoutError:
            return False
        return True

    def _abort(self, request_id: str) -> None:
        self.engine.abort(request_id)
        with self._work:
            self._work.notify()

    def _run(self) -> None:
        reason = FinishReason.ABORT
        try:
            while not self._stopping:
                if not self._wait_for_work():
                    self._probe()
                    continue
                outputs, stats = self.engine.step()
                self._last_progress = time.monotonic()
                self._post(self._deliver, outputs)
                self._publish(stats)
        except BaseException as error:
            logger.exception("the engine has died")
            reason = FinishReason.ERROR
            with self._work:
                self.error = error
        self._post(self._end_all, reason)

    def _wait_for_work(self) -> bool:
        """False where a probe is due, or the thread is to end."""
        with self._work:
            due = None if self.engine.probes is None else max(0.0, self._next_round - time.monotonic())
            self._work.wait_for(lambda: self._stopping or self.engine.has_unfinished_requests, due)
            return not self._stopping and self.engine.has_unfinished_requests

    def _probe(self) -> None:
        if self.engine.probes is None or self._stopping:
            return
        if self._round is None:
            self._round, self._worst = self.engine.probes(), 0.0
        deviation = next(self._round, None)
        if deviation is not None:
            self._worst = max(self._worst, deviation)
            return
        self._round = None
        self._next_round = time.monotonic() + self._probe_interval
        if self._worst > 1 and (self.deviation or 0) <= 1:
            logger.error("this machine does not compute what was recorded: %s", "other bits on the same kernels"
                         if math.isinf(self._worst) else f"{self._worst:.3g} times what rounding explains")
        self.deviation = self._worst
        if self._on_deviation is not None:
            self._on_deviation(self._worst)

    def _publish(self, stats: StepStats) -> None:
        if self._on_stats is None:
            return
        try:
            self._on_stats(stats)
        except Exception:
            logger.exception("publishing a step's stats failed")

    def _post(self, deliver: Callable[..., None], argument: object) -> None:
        """One wakeup of the event loop a step, however many tokens it made."""
        if self._loop is None or not argument:
            return
        try:
            self._loop.call_soon_threadsafe(deliver, argument)
        except RuntimeError:  # the loop is closed: nobody listens any more
            logger.debug("outputs dropped: the event loop is closed")

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            stream = self._streams.get(output.request_id)
            if stream is None:
                continue
            stream.put(output)
            if not stream.unfinished:
                del self._streams[output.request_id]
        if not self._streams:
            self._idle.set()

    def _end_all(self, reason: FinishReason) -> None:
        self._deliver([
            RequestOutput(stream.request_id, index, (), "", (), reason)
            for stream in self._streams.values()
            for index in sorted(stream.unfinished)
        ])
