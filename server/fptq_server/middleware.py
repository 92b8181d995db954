"""What surrounds every request: its id, its log line, its limits, and the answer where code failed."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import zlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fptq_runtime.engine.async_engine import AsyncEngine
from fptq_runtime.engine.engine import QueueFullError
from fptq_runtime.engine.request import ANYONE
from fptq_server.auth import PUBLIC_PATHS
from fptq_server.errors import APIError, ErrorHandlers
from fptq_server.generation import no_place
from fptq_server.keys import ApiKeys
from fptq_server.metrics import Metrics
from fptq_server.record import RequestRecord, peer, record_of
from fptq_server.tracing import Tracing

access_log = logging.getLogger("fptq.access")
log = logging.getLogger("fptq.server")

CLIENT_REQUEST_ID = re.compile(r"[!-~]{1,128}")
BODY_RATE = 64 << 10  # bytes a second at which a long body may come
GZIP = 16 + zlib.MAX_WBITS
PROBES = PUBLIC_PATHS | {"/metrics"}


class Routes:
    """A path as its route is written, however a client or a proxy puts it: without root_path, where a proxy leaves that
    on; with /v1, where a client's base URL has none.

    paths: of all routes.
    """

    def __init__(self, root_path: str, paths: Iterable[str]) -> None:
        self._root_path = root_path
        self._versioned = {path.split("/")[2] for path in paths if path.startswith("/v1/")}

    def __call__(self, path: str) -> str:
        if path.startswith(f"{self._root_path}/"):
            path = path.removeprefix(self._root_path)
        return f"/v1{path}" if path[1:].partition("/")[0] in self._versioned else path


class Routing:
    """Outermost. A request as its route is written: HEAD as GET, whose body uvicorn leaves out."""

    def __init__(self, app: ASGIApp, routes: Routes) -> None:
        self._app = app
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope = {**scope, "path": self._routes(scope["path"]),
                     "method": "GET" if scope["method"] == "HEAD" else scope["method"]}
        await self._app(scope, receive, send)


class RequestLog:
    """What came of each request, counted, logged and traced."""

    def __init__(self, metrics: Metrics, tracing: Tracing | None = None) -> None:
        self._metrics = metrics
        self._tracing = tracing

    def begin(self, scope: Scope) -> RequestRecord:
        """Takes the client's X-Request-Id or makes one."""
        record = record_of(scope)
        request_id = Headers(scope=scope).get("x-request-id", "")
        if CLIENT_REQUEST_ID.fullmatch(request_id):
            record.id = request_id
        return record

    def end(self, scope: Scope, status: int, start: float) -> None:
        """start: time.monotonic() at its beginning."""
        record = record_of(scope)
        self._metrics.record_response(scope["path"], status)
        if record.origin.tenant:
            self._metrics.record_key(record.origin.tenant, record.prompt_tokens or 0, record.completion_tokens)
        if scope["path"] not in PROBES or status >= 400:
            self._write(scope, record, status, time.monotonic() - start)
        if self._tracing is not None:
            self._tracing.record(scope["method"], scope["path"], Headers(scope=scope), record, status, start)

    @staticmethod
    def _write(scope: Scope, record: RequestRecord, status: int, seconds: float) -> None:
        path, client = scope["path"].encode("unicode_escape").decode(), peer(scope.get("client"))
        line = f"{client} {scope['method']} {path} {status} {seconds:.3f}s {record.id} {record}"
        fields = {"client": client, "method": scope["method"], "path": path, "status": status,
                  "seconds": round(seconds, 6), **record.fields()}
        access_log.info("%s", line.rstrip(), extra={"fields": fields})


class RequestContext:
    """Sends the request's id back, and sees to it that there is an answer."""

    def __init__(self, app: ASGIApp, errors: ErrorHandlers, requests: RequestLog) -> None:
        self._app = app
        self._errors = errors
        self._requests = requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = self._requests.begin(scope)
        status = 499  # as nginx has it: the client left before an answer
        start = time.monotonic()

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], (b"x-request-id", record.id.encode())]}
            await send(message)

        async def answer(error: APIError) -> None:
            await self._errors.refuse(scope, error)(scope, receive, send_with_id)

        try:
            await self._app(scope, receive, send_with_id)
        except ClientDisconnect:
            record.client_gone = True
        except asyncio.CancelledError:  # by uvicorn at exit, where a client stalls; it would log a traceback
            if status == 499:
                await answer(APIError(503, "the server is shutting down", reason="draining", code="draining",
                                      retry_after=1))
        except Exception:
            log.exception("request %s failed", record.id)
            if status != 499:
                raise
            await answer(APIError(500, f"internal error; the server's log has it as request {record.id}",
                                  reason="failed", code="internal"))
        finally:
            self._requests.end(scope, status, start)


def _seconds(text: str) -> float | None:
    """None where that is no time."""
    try:
        seconds = float(text)
    except ValueError:
        return None
    return seconds if seconds > 0 else None


def _too_large(most: int) -> APIError:
    return APIError(413, f"the request body is too large; at most {most} bytes are read", reason="too_large")


def _unzipped(receive: Receive, most: int) -> Receive:
    member = zlib.decompressobj(wbits=GZIP)
    size = 0

    async def unzipped() -> Message:
        nonlocal member, size
        message = await receive()
        if message["type"] != "http.request":
            return message
        packed, body = message.get("body", b""), b""
        try:
            while packed:
                if member.eof:  # gzip files can be put one after the other
                    member = zlib.decompressobj(wbits=GZIP)
                part = member.decompress(packed, most + 1 - size)
                body, packed, size = body + part, member.unused_data, size + len(part)
                if size > most:
                    raise _too_large(most)
        except zlib.error:
            raise APIError(400, "the request body is not gzip, as its Content-Encoding says") from None
        if not message.get("more_body", False) and not member.eof:
            raise APIError(400, "the request body, in gzip, has no end")
        return {**message, "body": body}

    return unzipped


class RequestLimits:
    """Takes X-Max-Wait, how long the client would wait for its first token. Refuses long headers, bodies past the limit
    whether or not they announce their length, bodies that stop for body_timeout, or take longer than it and a second
    for each BODY_RATE bytes that came. gzip is undone, within the same limit."""

    def __init__(self, app: ASGIApp, max_header_bytes: int, max_body_bytes: int, body_timeout: float,
                 errors: ErrorHandlers, large_bodies: Mapping[str, int] | None = None) -> None:
        """large_bodies: the most bytes by path, where they are others than max_body_bytes."""
        self._app = app
        self._large_bodies = large_bodies or {}
        self._max_header_bytes = max_header_bytes
        self._max_body_bytes = max_body_bytes
        self._body_timeout = body_timeout
        self._errors = errors

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        most = self._large_bodies.get(scope["path"], self._max_body_bytes)
        header_bytes = sum(len(name) + len(value) for name, value in scope["headers"])
        headers = Headers(scope=scope)
        length = headers.get("content-length", "0")
        encoding = headers.get("content-encoding", "identity")
        if header_bytes > self._max_header_bytes:
            error = APIError(431, f"the headers have {header_bytes} bytes; at most {self._max_header_bytes} are read",
                             reason="too_large")
        elif length.isdecimal() and int(length) > most:
            error = _too_large(most)
        elif encoding.lower() not in ("identity", "gzip"):
            error = APIError(415, f"Content-Encoding {encoding} is not supported; send the body as it is, or with gzip",
                             code="not_supported")
        elif (max_wait := _seconds(headers.get("x-max-wait", "inf"))) is None:
            error = APIError(400, "X-Max-Wait must be a number of seconds above 0", param="X-Max-Wait")
        else:
            record = record_of(scope)
            record.origin = replace(record.origin, max_wait=max_wait)
            limited = self._limited(receive, most)
            await self._app(scope, limited if encoding.lower() == "identity" else _unzipped(limited, most), send)
            return
        await self._errors.refuse(scope, error)(scope, receive, send)

    def _limited(self, receive: Receive, most: int) -> Receive:
        loop = asyncio.get_running_loop()
        start = loop.time()
        received = 0
        complete = False

        async def limited() -> Message:
            nonlocal received, complete
            if complete:
                return await receive()
            left = start + self._body_timeout + received / BODY_RATE - loop.time()
            try:
                message = await asyncio.wait_for(receive(), min(left, self._body_timeout))
            except asyncio.TimeoutError:
                raise APIError(408, f"after {loop.time() - start:.3g} s the request body has {received} bytes and no "
                                    "end", reason="timeout", code="timeout") from None
            complete = not message.get("more_body", False)
            received += len(message.get("body", b""))
            if received > most:
                raise _too_large(most)
            return message

        return limited


class Admission:
    """Innermost. A request for an answer that would find the queue full is refused before anything of its body is read;
    another holds a place until the engine has it, so that no more are read than will be taken.

    paths: where such requests come, by POST.
    """

    def __init__(self, app: ASGIApp, engine: AsyncEngine, paths: Collection[str], errors: ErrorHandlers) -> None:
        self._app = app
        self._engine = engine
        self._paths = paths
        self._errors = errors

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] not in self._paths:
            await self._app(scope, receive, send)
            return
        record = record_of(scope)
        try:
            record.place = place = self._engine.enter(record.origin)
        except QueueFullError as error:
            await self._errors.refuse(scope, no_place(error))(scope, receive, send)
            return
        try:
            await self._app(scope, receive, send)
        finally:
            place.leave()


class Door:
    """Outside of the application, which costs several times as much as a refusal itself: what Admission would refuse,
    told before a scope has been made a request. Whatever it does not understand at a glance goes in.

    paths: where requests for answers come. elsewhere: header fields that make a request the application's to refuse.
    """

    def __init__(self, engine: AsyncEngine, paths: Collection[str], routes: Routes, keys: ApiKeys,
                 errors: ErrorHandlers, requests: RequestLog, elsewhere: Collection[str]) -> None:
        self._engine = engine
        self._paths = paths
        self._routes = routes
        self._keys = keys
        self._errors = errors
        self._requests = requests
        self._elsewhere = {name.encode() for name in elsewhere}

    def refusal(self, scope: Scope, url: bytes) -> Response | None:
        """The answer to a POST whose headers are there, where no place is free for it. It is counted and logged."""
        path = self._routes(url.partition(b"?")[0].decode("latin-1"))
        if path not in self._paths or not self._elsewhere.isdisjoint(name for name, _ in scope["headers"]):
            return None
        start, headers, origin = time.monotonic(), Headers(scope=scope), ANYONE
        if self._keys:
            if (key := self._keys.of(headers)) is None:
                return None
            origin = key.origin
        if (max_wait := _seconds(headers.get("x-max-wait", "inf"))) is None:
            return None
        try:
            self._engine.enter(replace(origin, max_wait=max_wait)).leave()
        except QueueFullError as error:
            scope["method"], scope["path"] = "POST", path
            record = self._requests.begin(scope)
            record.origin = origin
            answer = self._errors.refuse(scope, no_place(error))
            answer.headers["x-request-id"] = record.id
            self._requests.end(scope, answer.status_code, start)
            return answer
        return None
