"""HTTP/1.1, below the application: connections, what they may take, and whom they turn away."""

from __future__ import annotations

import asyncio
import logging
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, cast

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from fptq_server.config import ServerConfig
from fptq_server.record import peer

if TYPE_CHECKING:
    from starlette.responses import Response
    from starlette.types import Scope

    from fptq_server.metrics import Metrics
    from fptq_server.middleware import Door

log = logging.getLogger("fptq.server")


class Cycle(RequestResponseCycle):
    """An answer that ends its connection, as its client asked, leaves it open until the whole body is there: what came
    afterwards would reset it, and the answer be lost. One to HTTP/1.0, which knows no chunks, ends with the connection
    where its length is not known."""

    awaits_body = False
    _to_the_end = False

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.awaits_body = not self.keep_alive and not self.waiting_for_100_continue
            self._to_the_end = self.scope["http_version"] == "1.0" and \
                not any(name.lower() == b"content-length" for name, _ in message["headers"])
        if self._to_the_end:
            self.chunked_encoding, self.expected_content_length = False, len(message.get("body", b""))
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self.awaits_body = self.awaits_body and self.more_body
            self.keep_alive = self.keep_alive or self.awaits_body
        await super().send(message)


class BoundedProtocol(HttpToolsProtocol):
    """Declines upgrades, as to HTTP/2: the request is answered as it is. Closes connections that uvicorn would keep for
    ever: headers twice as long as are read, or that have not ended
    `head_timeout` seconds after the connection or their first byte; a body that has not ended `body_timeout` after its
    answer. A body that comes too slowly, before its answer, is RequestLimits'. What finds its `door` closed is answered
    as soon as its headers are there."""

    limits: ServerConfig
    metrics: Metrics
    door: Door | None
    _head_bytes = 0
    _in_head = True
    _in_message = False
    _refused = False  # the request whose body comes, at the door
    _ends = False  # with the body that comes
    _deadline: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._close_in(self.limits.head_timeout)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self.loop.call_later(self.limits.write_timeout, self._give_up)

    def resume_writing(self) -> None:
        self._reads()
        super().resume_writing()

    def _reads(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def _give_up(self) -> None:
        """What waits for the client is dropped, and what is generated for it ends."""
        log.warning("%s has not read for %g s", peer(self.client), self.limits.write_timeout)
        self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._reads()
        self._keep()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        unread: bytes | None = data
        try:
            while unread is not None:
                unread = self._parse(unread)
        except httptools.HttpParserError as error:
            self._refuse(400, f"not an HTTP request: {error}")
            return
        if self._in_head:
            self._head_bytes += len(data)
            if self._head_bytes > 2 * self.limits.max_header_bytes:
                self._refuse(431, "the request's headers are too long")
        elif self._deadline is None and self.timeout_keep_alive_task is None and not self._in_message and self._idle:
            self._close_in(self.limits.head_timeout)  # line ends between requests stop uvicorn's own timer

    def _parse(self, data: bytes) -> bytes | None:
        """What is still to be parsed where the parser has stopped after the head of a request that would upgrade: that
        head without its wish, for a new parser, and what follows."""
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as stopped:
            if not self._upgrades():
                return None
            [end] = stopped.args
            head = b"%s %s HTTP/1.1\r\n" % (self.parser.get_method(), self.url)
            head += b"".join(b"%s: %s\r\n" % header for header in self.headers if header[0] != b"upgrade")
            self.parser = httptools.HttpRequestParser(self)
            return head + b"\r\n" + data[end:]
        return None

    def _upgrades(self) -> bool:
        """The parser takes what follows the head for another protocol. CONNECT is refused as any unknown method."""
        return bool(self.parser.should_upgrade()) and self.parser.get_method() != b"CONNECT"

    def on_message_begin(self) -> None:
        self._in_head, self._in_message, self._head_bytes = True, True, 0
        self._close_in(self.limits.head_timeout)
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        if self._upgrades():
            return
        self._in_head = False
        self._keep()
        if self.door is not None and self._idle and self.parser.get_method() == b"POST":
            answer = self.door.refusal(cast("Scope", self.scope), self.url)
            if answer is not None:
                self._turn_away(answer)
                return
        super().on_headers_complete()
        self.cycle.__class__ = Cycle  # its task has not begun

    def _turn_away(self, answer: Response) -> None:
        """Without a cycle of its own, which costs more than all else of a refusal."""
        if self.parser.get_http_version() == "1.0" or not self.parser.should_keep_alive():
            answer.headers["connection"] = "close"
        headers = [*self.server_state.default_headers, *answer.raw_headers]
        lines = b"".join(b"%s: %s\r\n" % header for header in headers)
        self.transport.write(b"%s%s\r\n%s" % (STATUS_LINE[answer.status_code], lines, bytes(answer.body)))
        self.server_state.total_requests += 1
        self._refused, self._ends = True, "connection" in answer.headers
        if self._ends and self.expect_100_continue:
            self.transport.close()  # the body does not come
        else:
            self._close_in(self.limits.body_timeout)

    @property
    def _idle(self) -> bool:
        """No answer is under way."""
        return self.cycle is None or self.cycle.response_complete

    def shutdown(self) -> None:
        if self._idle and self._in_message and not self._in_head:
            self._ends = True
        else:
            super().shutdown()

    def on_body(self, body: bytes) -> None:
        if not self._refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if self._upgrades():
            return
        self._in_message = False
        self._keep()
        if self._ends:
            self.transport.close()
        elif self._refused:
            self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive,
                                                                self.timeout_keep_alive_handler)
        else:
            super().on_message_complete()
        self._refused = False

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._in_message and not self._in_head:
            self._ends = isinstance(self.cycle, Cycle) and self.cycle.awaits_body
            self._close_in(self.limits.body_timeout)

    def _close_in(self, seconds: float) -> None:
        self._keep()
        self._deadline = self.loop.call_later(seconds, self._too_late, seconds)

    def _keep(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _too_late(self, seconds: float) -> None:
        self._deadline = None
        if not self._idle:
            self._close_in(seconds)  # an answer is under way, and the next request waits for it
        elif self._in_message and self._in_head:
            self._refuse(408, f"the request's headers did not end within {seconds:g} s")
        else:
            self.transport.close()

    def _refuse(self, status: int, message: str) -> None:
        """Answer what never became a request, and close."""
        if self.transport.is_closing():
            return
        log.warning("%s %d %s", peer(self.client), status, message)
        self.metrics.record_response("", status)
        body = message.encode("ascii", "backslashreplace")
        self.transport.write(b"HTTP/1.1 %d %s\r\ncontent-type: text/plain\r\ncontent-length: %d\r\n"
                             b"connection: close\r\n\r\n%s"
                             % (status, HTTPStatus(status).phrase.encode(), len(body), body))
        self.transport.close()
