"""Request ids, size limits, and what a client sees of a failure."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from server.config import ModelCard, ServerConfig
from server.metrics import Metrics
from server.middleware import RequestContext
from tests.server.conftest import Served, metric


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
    asyncio.run(RequestContext(stalled, metrics)({"type": "http", "method": "POST", "path": "/", "headers": []},
                                                 receive, send))
    assert [message["status"] for message in sent if "status" in message] == [200 if started else 503]
