"""What surrounds every request: its id, its log line, its size limits, and the answer where code failed."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.auth import PUBLIC_PATHS
from server.errors import APIError
from server.metrics import Metrics

access_log = logging.getLogger("fptq.access")
log = logging.getLogger("fptq.server")

CLIENT_REQUEST_ID = re.compile(r"[!-~]{1,128}")
PROBES = PUBLIC_PATHS | {"/metrics"}


class RequestContext:
    """Outermost. Takes the client's X-Request-Id or makes one, and sends it back."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = Headers(scope=scope).get("x-request-id", "")
        if not CLIENT_REQUEST_ID.fullmatch(request_id):
            request_id = uuid.uuid4().hex
        status = 499  # as nginx has it: the client left before an answer
        start = time.monotonic()

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], (b"x-request-id", request_id.encode())]}
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except ClientDisconnect:
            pass
        except asyncio.CancelledError:  # by uvicorn at exit, where a client stalls; it would log a traceback
            if status == 499:
                await APIError(503, "the server is shutting down", code="draining").response()(scope, receive,
                                                                                              send_with_id)
        except Exception:
            log.exception("request %s failed", request_id)
            if status != 499:
                raise
            error = APIError(500, f"internal error; the server's log has it as request {request_id}", code="internal")
            self._metrics.record_rejection(error.reason)
            await error.response()(scope, receive, send_with_id)
        finally:
            self._metrics.record_response(getattr(scope.get("route"), "path_format", ""), status)
            if scope["path"] not in PROBES or status >= 400:
                seconds = time.monotonic() - start
                access_log.info("%s %s %d %.3fs %s", scope["method"], scope["path"].encode("unicode_escape").decode(),
                                status, seconds, request_id)


class SizeLimits:
    """Refuses long headers, and bodies past the limit whether or not they announce their length."""

    def __init__(self, app: ASGIApp, max_header_bytes: int, max_body_bytes: int, metrics: Metrics) -> None:
        self._app = app
        self._max_header_bytes = max_header_bytes
        self._max_body_bytes = max_body_bytes
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        header_bytes = sum(len(name) + len(value) for name, value in scope["headers"])
        length = Headers(scope=scope).get("content-length", "0")
        if header_bytes > self._max_header_bytes:
            error = APIError(431, f"the headers have {header_bytes} bytes; at most {self._max_header_bytes} are read")
        elif length.isdecimal() and int(length) > self._max_body_bytes:
            error = APIError(413, self._too_large)
        else:
            await self._app(scope, self._limited(receive), send)
            return
        self._metrics.record_rejection(error.reason)
        await error.response()(scope, receive, send)

    @property
    def _too_large(self) -> str:
        return f"the request body is too large; at most {self._max_body_bytes} bytes are read"

    def _limited(self, receive: Receive) -> Receive:
        received = 0

        async def limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_body_bytes:
                raise HTTPException(413, self._too_large)
            return message

        return limited
