"""Batches that a server works on beside its other requests: behind them in the queue, and never in all of its slots."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Iterator
from contextlib import closing
from typing import Any, Literal

from fptq_runtime.artifact.files import open_file
from fptq_runtime.engine.request import Origin
from fptq_runtime.errors import FptqError
from fptq_server.batch import (
    Answers,
    BatchRequest,
    BatchRunner,
    Problem,
    StoppedError,
    check_batch,
    read_batch,
    unanswered,
)
from fptq_server.batch_store import ENDED, BatchStore, StoredBatch, StoreFullError
from fptq_server.protocol_batches import Batch, BatchCreate, BatchError, BatchErrors, RequestCounts, Status

log = logging.getLogger("fptq.server")

MAX_REQUESTS = 50_000  # OpenAI's
HOUR = 3600
BEHIND = 1 << 30  # of priorities, which have nine digits: everybody else goes first
End = Literal["cancelled", "expired", "stopped"]
WHY = {"cancelled": ("batch_cancelled", "the batch was cancelled before this request was answered"),
       "expired": ("batch_expired", "the batch's completion_window ended before this request was answered")}


class BatchJobs:
    """Those of a key one after the other, those of several keys at the same time. All methods belong to one event loop;
    `start` goes on with what the store has."""

    def __init__(self, store: BatchStore, runner: BatchRunner) -> None:
        self.store = store
        self._runner = runner
        self._keys: dict[str, asyncio.Task[None]] = {}
        self._running: dict[str, tuple[asyncio.Event, list[End]]] = {}  # what ends a batch early, and why
        self._stopped = False

    @property
    def endpoints(self) -> frozenset[str]:
        return self._runner.urls

    def start(self) -> None:
        for stored in self.store.batches.values():
            self._work_for(stored.owner)

    async def stop(self) -> None:
        """Where a later server has the same store, it goes on."""
        self._stopped = True
        for batch_id in self._running:
            self._end(batch_id, "stopped")
        await asyncio.gather(*self._keys.values(), return_exceptions=True)

    def create(self, body: BatchCreate, origin: Origin) -> Batch:
        """Raises StoreFullError."""
        now = int(time.time())
        batch = Batch(id=f"batch_{uuid.uuid4().hex}", endpoint=body.endpoint, input_file_id=body.input_file_id,
                      completion_window=body.completion_window, created_at=now,
                      expires_at=now + HOUR * int(body.completion_window[:-1]), metadata=body.metadata)
        expiry = body.output_expires_after
        self.store.put_batch(StoredBatch(
            owner=origin.tenant, object=batch, priority=origin.priority, output_id=f"file-{uuid.uuid4().hex}",
            error_id=f"file-{uuid.uuid4().hex}", output_seconds=None if expiry is None else expiry.seconds))
        self._work_for(origin.tenant)
        return batch

    def cancel(self, stored: StoredBatch) -> None:
        """One that has ended stays as it is."""
        if stored.object.id in self._running:
            self._set(stored, "cancelling")
            self._end(stored.object.id, "cancelled")
        elif stored.object.status not in ENDED:
            self._set(stored, "cancelled")

    def _work_for(self, owner: str) -> None:
        if not self._stopped and (owner not in self._keys or self._keys[owner].done()):
            self._keys[owner] = asyncio.get_running_loop().create_task(self._work(owner))

    async def _work(self, owner: str) -> None:
        while not self._stopped:
            waiting = (each for each in self.store.batches.values()
                       if each.owner == owner and each.object.status not in ENDED)
            stored = next(waiting, None)
            if stored is None:
                return
            try:
                await self._run(stored)
            except StoppedError as error:
                log.error("batch %s stops here: %s", stored.object.id, error)
                return
            except (FptqError, OSError) as error:
                log.error("batch %s fails: %s", stored.object.id, error)
                self._fail(stored, [Problem("storage_full" if isinstance(error, StoreFullError) else "server_error",
                                            str(error))])
            except Exception:
                log.exception("batch %s fails", stored.object.id)
                self._fail(stored, [Problem("server_error", "internal error")])

    async def _run(self, stored: StoredBatch) -> None:
        batch, gone = stored.object, asyncio.Event()
        ends: list[End] = []
        self._running[batch.id] = gone, ends
        deadline = asyncio.get_running_loop().call_later(batch.expires_at - time.time(), self._end, batch.id, "expired")
        try:
            with open_file(self.store.content(batch.input_file_id)) as source:
                total, problems = await asyncio.to_thread(check_batch, source, MAX_REQUESTS, batch.endpoint)
                if problems:
                    self._fail(stored, problems)
                    return
                if batch.status == "validating":
                    self._set(stored, "in_progress")
                elif batch.status == "cancelling":  # before a restart
                    self._end(batch.id, "cancelled")
                with closing(Answers(self.store.content(stored.output_id), 0o600)) as succeeded, \
                        closing(Answers(self.store.content(stored.error_id), 0o600)) as failed:
                    self.store.room(succeeded.size + failed.size)

                    def write(answer: dict[str, Any]) -> None:
                        response = answer["response"]
                        ok = response is not None and response["status_code"] == 200
                        (succeeded if ok else failed).write(answer)
                        batch.request_counts = RequestCounts(total=total, completed=len(succeeded), failed=len(failed))
                        self.store.room(succeeded.size + failed.size)

                    def left() -> Iterator[BatchRequest]:
                        return (request for _, request in read_batch(source) if isinstance(request, BatchRequest)
                                and request.custom_id not in succeeded and request.custom_id not in failed)

                    batch.request_counts = RequestCounts(total=total, completed=len(succeeded), failed=len(failed))
                    origin = Origin(stored.owner, BEHIND + stored.priority)
                    await self._runner.run(left(), origin, write, gone)
                    if "stopped" in ends:
                        return
                    if ends:
                        for request in left():
                            write(unanswered(request.custom_id, *WHY[ends[0]]))
                    self._set(stored, "finalizing")
            self._publish(stored)
            self._set(stored, "completed" if not ends else "expired" if ends[0] == "expired" else "cancelled")
        finally:
            deadline.cancel()
            del self._running[batch.id]

    def _end(self, batch_id: str, why: End) -> None:
        gone, ends = self._running[batch_id]
        ends.append(why)
        gone.set()

    def _fail(self, stored: StoredBatch, problems: list[Problem]) -> None:
        stored.object.errors = BatchErrors(data=[BatchError(
            code=problem.code, line=problem.line, message=problem.message, param=problem.param)
            for problem in problems])
        self._publish(stored)
        self._set(stored, "failed")

    def _publish(self, stored: StoredBatch) -> None:
        name = stored.object.id
        stored.object.output_file_id = self.store.publish(stored, stored.output_id, f"{name}_output.jsonl")
        stored.object.error_file_id = self.store.publish(stored, stored.error_id, f"{name}_error.jsonl")

    def _set(self, stored: StoredBatch, status: Status) -> None:
        stored.object.status = status
        setattr(stored.object, f"{status}_at", int(time.time()))
        self.store.put_batch(stored)
