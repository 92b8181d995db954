"""Request ids, size limits, and what a client sees of a failure."""

from __future__ import annotations

import asyncio
import gzip
import itertools
import json
import re
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.types import Message, Receive, Scope, Send

from fptq_server.config import ModelCard, ServerConfig
from fptq_server.errors import ErrorHandlers
from fptq_server.metrics import Metrics
from fptq_server.middleware import BODY_RATE, RequestContext, RequestLog
from tests.server.conftest import Served, metric, wait_until


@pytest.fixture(scope="module")
def small(run_server: Callable[..., Any]) -> Iterator[Served]:
    with run_server(ServerConfig(max_body_bytes=1000, max_header_bytes=2000)) as served:
        yield served


def test_request_id(served: Served) -> None:
    assert served.http.get("/version", headers={"X-Request-Id": "mine-1"}).headers["X-Request-Id"] == "mine-1"
    made = {served.http.get("/version", headers=headers).headers["X-Request-Id"]
            for headers in ({}, {"X-Request-Id": "a b"}, {"X-Request-Id": "x" * 129})}
    assert len(made) == 3
    assert not made & {"a b", "x" * 129}
    for path in ("/nowhere", "/v1/completions"):  # refusals too
        assert "X-Request-Id" in served.http.post(path, json={}).headers


@pytest.mark.parametrize("path", ["/v1/completions", "/tokenize", "/generate_stream"])
def test_body_limit(small: Served, path: str) -> None:
    before = metric(small, "fptq_requests_rejected_total", reason="too_large")

    def chunks() -> Iterator[bytes]:
        for _ in range(20):
            yield b" " * 100

    for content in (b" " * 1001, chunks()):  # announced, and not
        response = small.http.post(path, content=content, headers={"Content-Type": "application/json"})
        assert response.status_code == 413
        assert "1000 bytes" in response.json()["error"]["message"]
    assert metric(small, "fptq_requests_rejected_total", reason="too_large") == before + 2


def test_what_is_refused_for_its_head_is_told_though_its_body_comes(small: Served) -> None:
    """A connection that ends with the answer is not reset by the rest of a long body."""
    closes = {"Connection": "close"}
    for headers, status in (({}, 413), ({"Content-Encoding": "br", "Transfer-Encoding": "chunked"}, 415),
                            ({"X-Long": "x" * 2000}, 431)):
        content = iter([b" " * 5_000_000]) if status == 415 else b" " * 5_000_000
        response = small.http.post("/v1/completions", content=content, headers=closes | headers)
        assert response.status_code == status
        assert response.headers["connection"] == "close"


def test_header_limit(small: Served) -> None:
    response = small.http.get("/version", headers={"X-Long": "x" * 2000})
    assert response.status_code == 431
    assert "2000" in response.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/completions", "/generate_stream"])
def test_internal_errors_stay_inside(served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
                                     path: str) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("the secret cause")

    monkeypatch.setattr(served.engine, "add_request", fail)
    response = served.http.post(path, json={"prompt" if path.startswith("/v1") else "inputs": "x"},
                                headers={"X-Request-Id": "find-me"})
    assert response.status_code == 500
    assert "secret" not in response.text
    assert "find-me" in response.json()["error"]["message"]
    assert response.headers["X-Request-Id"] == "find-me"
    assert "the secret cause" in caplog.text
    assert "find-me" in caplog.text


@pytest.mark.parametrize("started", [False, True])
def test_what_uvicorn_cancels_at_exit_leaves_no_traceback(started: bool) -> None:
    """A request whose client stalls is answered 503 where nothing was sent yet, and ends quietly."""
    sent: list[Message] = []

    async def stalled(scope: Scope, receive: Receive, send: Send) -> None:
        if started:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        raise asyncio.CancelledError

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    metrics = Metrics("0", ModelCard("m", 0, 8, 8))
    context = RequestContext(stalled, ErrorHandlers(metrics), RequestLog(metrics))
    asyncio.run(context({"type": "http", "method": "POST", "path": "/", "headers": []}, receive, send))
    assert [message["status"] for message in sent if "status" in message] == [200 if started else 503]


def access_line(caplog: pytest.LogCaptureFixture, request_id: str) -> str:
    """The line of one request, once it is there: it is written after the answer is sent."""
    lines: list[str] = []

    def logged() -> bool:
        lines[:] = [record.getMessage() for record in caplog.records if record.name == "fptq.access"
                    and f" {request_id}" in record.getMessage()]
        return bool(lines)

    wait_until(logged)
    [line] = lines
    return line


@pytest.mark.parametrize("stream", [False, True])
def test_the_log_says_whose_request_and_what_came_of_it(served: Served, caplog: pytest.LogCaptureFixture, stream: bool
                                                        ) -> None:
    caplog.set_level("INFO", "fptq.access")
    body = {"prompt": [5, 6, 7], "max_tokens": 4, "ignore_eos": True, "n": 2, "stream": stream}
    response = served.http.post("/v1/completions", json=body, headers={"X-Request-Id": f"whose-{stream}"})
    assert f'"cmpl-whose-{stream}"' in response.text
    line = access_line(caplog, f"whose-{stream}")
    assert re.fullmatch(rf"127\.0\.0\.1:\d+ POST /v1/completions 200 \d+\.\d{{3}}s whose-{stream} "
                        r"prompt=3 out=8 finish=length", line), line


def test_one_request_id_twice_at_once(served: Served) -> None:
    """Ids are the client's to choose."""
    body = {"prompt": "x", "max_tokens": 60, "ignore_eos": True}
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda _: served.http.post("/v1/completions", json=body,
                                                           headers={"X-Request-Id": "same"}), range(3)))
    assert [answer.status_code for answer in answers] == [200] * 3


def test_the_log_says_why_a_request_was_refused(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "fptq.access")
    served.http.post("/v1/completions", json={"prompt": "x", "a\n\x1b[31m": 1}, headers={"X-Request-Id": "why"})
    line = access_line(caplog, "why")
    assert " 400 " in line
    assert line.endswith("code=unknown_field param=a \\x1b[31m unknown field a \\x1b[31m")


@pytest.mark.parametrize(("content", "headers", "status", "message"), [
    (b'{"prompt": x}', {}, 400, "the request body is not valid JSON: Expecting value at character 11"),
    (b'{"prompt": "\xff"}', {}, 400, "the request body is not valid UTF-8: byte 0xff at offset 12"),
    (b"x", {"Content-Encoding": "br"}, 415,
     "Content-Encoding br is not supported; send the body as it is, or with gzip"),
    (b"{}", {"Content-Encoding": "gzip"}, 400, "the request body is not gzip, as its Content-Encoding says"),
    (gzip.compress(b"{}")[:-1], {"Content-Encoding": "gzip"}, 400, "the request body, in gzip, has no end"),
    (b"", {"Content-Encoding": "gzip"}, 400, "the request body, in gzip, has no end"),
])
def test_unreadable_bodies_are_named(served: Served, content: bytes, headers: dict[str, str], status: int, message: str
                                     ) -> None:
    response = served.http.post("/v1/completions", content=content,
                                headers={"Content-Type": "application/json"} | headers)
    assert response.status_code == status
    assert response.json()["error"]["message"] == message


@given(text=st.text(max_size=300), cuts=st.lists(st.integers(1, 400), max_size=5), members=st.integers(1, 3))
@settings(max_examples=25, database=None, deadline=None)
def test_gzip_bodies(served: Served, text: str, cuts: list[int], members: int) -> None:
    """In one member or several, in whatever pieces they come."""
    body = json.dumps({"prompt": text, "add_special_tokens": False}).encode()
    size = len(body) // members + 1
    packed = b"".join(gzip.compress(body[start:start + size]) for start in range(0, len(body), size))
    edges = [0, *sorted(cut for cut in set(cuts) if cut < len(packed)), len(packed)]
    pieces = (packed[start:end] for start, end in itertools.pairwise(edges))
    headers = {"Content-Type": "application/json"}
    answer = served.http.post("/tokenize", content=pieces, headers=headers | {"Content-Encoding": "gzip"})
    assert answer.status_code == 200, answer.text
    assert answer.json() == served.http.post("/tokenize", content=body, headers=headers).json()


def test_a_small_gzip_body_that_grows(small: Served) -> None:
    huge = gzip.compress(b" " * (64 << 20), 9)[:900]
    for content in (gzip.compress(b" " * 1001), gzip.compress(b" " * 600) * 2, huge):
        answer = small.http.post("/tokenize", content=content,
                                 headers={"Content-Type": "application/json", "Content-Encoding": "gzip"})
        assert answer.status_code == 413, answer.text
        assert "1000 bytes" in answer.json()["error"]["message"]


def begin_post(port: int, request_id: str, begun: bytes = b"{") -> socket.socket:
    """A request without the last 99 bytes of its body."""
    connection = socket.create_connection(("127.0.0.1", port), 30)
    connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                       b"X-Request-Id: %s\r\nContent-Length: %d\r\n\r\n%s"
                       % (request_id.encode(), len(begun) + 99, begun))
    return connection


def test_a_client_that_leaves_within_its_body(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    """It made no mistake that a refusal would count."""
    caplog.set_level("INFO", "fptq.access")
    before = metric(served, "fptq_requests_rejected_total", reason="invalid")
    with begin_post(served.port, "mid-body"):
        time.sleep(0.1)
    line = access_line(caplog, "mid-body")
    assert " 499 " in line
    assert line.endswith("client gone")
    assert metric(served, "fptq_requests_rejected_total", reason="invalid") == before


def test_a_client_that_leaves_its_stream(served: Served, monkeypatch: pytest.MonkeyPatch,
                                         caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "fptq.access")
    body = {"prompt": "x", "max_tokens": 1000, "ignore_eos": True, "stream": True}
    with served.http.stream("POST", "/v1/completions", json=body, headers={"X-Request-Id": "leaves"}) as response:
        next(response.iter_lines())
    assert re.search(r" 200 .* leaves prompt=\d+ out=\d+ finish=none client gone$", access_line(caplog, "leaves"))


def test_a_body_that_stops_coming(run_server: Callable[..., Any]) -> None:
    with run_server(ServerConfig(body_timeout=0.2)) as served, begin_post(served.port, "stops") as connection:
        answer = b"".join(iter(lambda: connection.recv(4096), b""))
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b'"code":"timeout"' in answer
        assert metric(served, "fptq_requests_rejected_total", reason="timeout") == 1
        assert metric(served, "fptq_http_responses_total", route="/v1/completions", status="4xx") == 1


def test_a_long_body_that_stops_coming(run_server: Callable[..., Any]) -> None:
    """The time that its length gives it is not for waiting."""
    long = b" " * (8 * BODY_RATE)
    with run_server(ServerConfig(body_timeout=0.5)) as served, begin_post(served.port, "long", long) as connection:
        connection.settimeout(6)
        assert connection.recv(4096).startswith(b"HTTP/1.1 408 ")


def test_a_body_that_comes_byte_by_byte(run_server: Callable[..., Any]) -> None:
    with run_server(ServerConfig(body_timeout=1)) as served, begin_post(served.port, "drips") as connection:
        connection.settimeout(0.05)
        answer = b""
        for _ in range(90):  # 4.5 s
            connection.sendall(b" ")
            with suppress(TimeoutError):
                answer = connection.recv(4096)
                break
        assert answer.startswith(b"HTTP/1.1 408 ")


def test_a_long_body_has_more_time(run_server: Callable[..., Any]) -> None:
    def body() -> Iterator[bytes]:
        for _ in range(4):
            yield b" " * BODY_RATE
            time.sleep(0.4)
        yield b'{"prompt": "x", "max_tokens": 1}'

    with run_server(ServerConfig(body_timeout=1)) as served:
        answer = served.http.post("/v1/completions", content=body(), headers={"Content-Type": "application/json"})
        assert answer.status_code == 200


@pytest.mark.parametrize(("path", "route"), [("/tokenize", "/tokenize"), ("/v1/models", "/v1/models"),
                                             ("/v1/models/some/one", "/v1/models/{model_id}")])
def test_responses_are_counted_by_route_where_middleware_refuses(small: Served, path: str, route: str) -> None:
    name, labels = "fptq_http_responses_total", {"route": route, "status": "4xx"}
    before = metric(small, name, **labels)
    assert small.http.post(path, content=b" " * 1001).status_code == 413
    wait_until(lambda: metric(small, name, **labels) == before + 1)
