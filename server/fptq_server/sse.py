"""Server-sent events, and work that stops when its client goes away."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from fptq_server.errors import APIError
from fptq_server.record import RequestRecord, record_of

log = logging.getLogger("fptq.server")

STREAM_RESPONSE: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}

T = TypeVar("T")


class TextTemplate:
    """JSON that differs from chunk to chunk in one text alone: rendered once, with the placeholder for it."""

    placeholder = "\0text\0"
    _encode = json.JSONEncoder(ensure_ascii=False).encode

    def __init__(self, rendered: str) -> None:
        self._head, _, self._tail = rendered.partition(self._encode(self.placeholder))

    def __call__(self, text: str) -> str:
        return self._head + self._encode(text) + self._tail


async def run_while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Raises ClientDisconnect, once the work is cancelled, where the client goes first. The body must be read."""

    async def disconnected() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.create_task(work), asyncio.create_task(disconnected())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientDisconnect
        return tasks[0].result()  # type: ignore[return-value]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def data_frame(data: str) -> str:
    return f"data: {data}\n\n"


def named_frame(data: str) -> str:
    """With the event's name, which is its JSON's type."""
    return f"event: {json.loads(data)['type']}\ndata: {data}\n\n"


class EventStream(Response):
    """Sends each JSON text of `events` as one event, framed by `frame`; a comment after `keep_alive` seconds of silence
    keeps proxies from closing the connection. A failure on the way is an event too, what `fail` says of it, since the
    status has been sent. `close` runs in any case, even where the client left before the first event."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[str, None], close: Callable[[], None], keep_alive: float,
                 done: str | None = None, frame: Callable[[str], str] = data_frame,
                 fail: Callable[[APIError], str] = APIError.body) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._close = close
        self._keep_alive = keep_alive
        self._done = done
        self._frame = frame
        self._fail = fail

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await run_while_connected(receive, self._send_all(record_of(scope), send))
        finally:
            self._close()

    async def _send_all(self, record: RequestRecord, send: Send) -> None:
        loop = asyncio.get_running_loop()
        last_sent = loop.time()

        async def write(text: str, more_body: bool = True) -> None:
            nonlocal last_sent
            last_sent = loop.time()
            await send({"type": "http.response.body", "body": text.encode(), "more_body": more_body})

        async def keep_alive() -> None:
            while True:
                await asyncio.sleep(max(0.0, last_sent + self._keep_alive - loop.time()))
                if loop.time() - last_sent >= self._keep_alive:
                    await write(": keep-alive\n\n")

        async def fail(error: APIError) -> None:
            record.error = error.summary
            await write(self._frame(self._fail(error)))

        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        heartbeat = asyncio.create_task(keep_alive())
        try:
            async with aclosing(self._events) as events:
                async for event in events:
                    await write(self._frame(event))
            if self._done is not None:
                await write(f"data: {self._done}\n\n")
        except APIError as error:
            await fail(error)
        except Exception:
            log.exception("request %s failed in its stream", record.id)
            await fail(APIError(500, "internal error", reason="failed", code="internal"))
        finally:
            heartbeat.cancel()
        await write("", more_body=False)
