"""A full queue."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest

from fptq_runtime.engine.async_engine import EngineDeadError
from fptq_runtime.engine.engine import QueueFullError
from fptq_runtime.engine.request import Origin
from fptq_server.config import ServerConfig
from fptq_server.keys import ApiKeys
from fptq_server.middleware import Admission
from tests.server.conftest import Served, metric, refuse_first, wait_until


def test_full_queue(run_server: Callable[..., Any]) -> None:
    """Two sequences are taken, the third request is told when to come back; of a list of prompts all are or none is."""
    with run_server(max_num_seqs=1, max_waiting_requests=1) as served:
        async def run() -> None:
            async with httpx.AsyncClient(base_url=served.url, timeout=60) as client:
                body = {"prompt": "x", "max_tokens": 1000, "ignore_eos": True}
                tasks = []
                for count in (1, 2):
                    tasks.append(asyncio.create_task(client.post("/v1/completions", json=body)))
                    while served.engine.engine.num_running + served.engine.engine.num_waiting != count:
                        await asyncio.sleep(0.01)
                    response = await client.post("/v1/completions", json=body | {"prompt": ["a", "b"]})
                    assert response.status_code == 429
                    while served.engine.engine.num_running + served.engine.engine.num_waiting != count:
                        await asyncio.sleep(0.01)
                for path, more in (("/v1/completions", {}), ("/v1/completions", {"stream": True}),
                                   ("/generate_stream", None)):
                    response = await client.post(path, json={"inputs": "x"} if more is None else body | more)
                    assert response.status_code == 429
                    assert int(response.headers["Retry-After"]) >= 1
                    assert int(response.headers["retry-after-ms"]) >= 1
                    assert response.json()["error"]["code"] == "queue_full"
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run(run())
        wait_until(lambda: served.engine.engine.num_running + served.engine.engine.num_waiting == 0)
        assert metric(served, "fptq_requests_rejected_total", reason="queue_full") == 5
        response = served.http.post("/v1/completions", json={"prompt": ["a", "b", "c"], "max_tokens": 1})
        assert response.status_code == 400  # to come back later would not help
        assert "at most 2 at a time" in response.json()["error"]["message"]
        wait_until(lambda: metric(served, "fptq_requests_waiting") + metric(served, "fptq_requests_running") == 0)
        assert served.http.post("/v1/completions", json={"prompt": "x", "max_tokens": 1}).status_code == 200


def test_a_refusal_reads_no_body_and_who_is_read_holds_a_place(run_server: Callable[..., Any]) -> None:
    """Of two places one is a request's whose body has not come; so is the other's, until its client goes."""
    def begin(served: Served) -> socket.socket:
        client = socket.create_connection(("127.0.0.1", served.port), timeout=60)
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
                       b"content-length: 1000000\r\n\r\n")
        return client

    with run_server(max_num_seqs=1, max_waiting_requests=1) as served:
        entering = served.engine.engine._entering
        with begin(served), begin(served) as second:
            wait_until(lambda: entering.total() == 2)
            with begin(served) as third:
                answer = third.recv(1 << 16)
            assert answer.startswith(b"HTTP/1.1 429 ")
            assert b"\r\nretry-after: 1\r\n" in answer.lower()
            assert served.http.get("/readyz").status_code == 200
            for wish in ("close", "TE, close"):
                closing = served.http.post("/v1/completions", content=b" " * 5_000_000, headers={"Connection": wish})
                assert closing.status_code == 429, "no reset"
            assert served.http.post("/tokenize", json={"prompt": "x"}).status_code == 200
            second.close()
            wait_until(lambda: entering.total() == 1)
            assert served.http.post("/v1/completions", json={"prompt": "x", "max_tokens": 1}).status_code == 200
        wait_until(lambda: not entering)


@pytest.mark.parametrize(("path", "headers", "far"), [
    ("/v1/completions", {}, False), ("/completions?x=1", {}, False), ("/llm/v1/completions", {}, False),
    ("/v1/messages", {}, False), ("/v1/c%6fmpletions", {}, True), ("/v1/messages", {"Origin": "https://x.com"}, True),
    ("/v1/completions", {"X-Forwarded-For": "192.0.2.7"}, True)])
def test_a_refusal_is_the_same_whoever_tells_it(run_server: Callable[..., Any], caplog: pytest.LogCaptureFixture,
                                                monkeypatch: pytest.MonkeyPatch, path: str, headers: dict[str, str],
                                                far: bool) -> None:
    """The door, or from far within the middleware: one key's flood, on one connection, and then another key's request,
    which is served."""
    reached, admit = [], Admission.__call__

    async def spy(self: Admission, *scope: Any) -> None:
        reached.extend(part for part in scope if isinstance(part, dict) and part["type"] == "http")
        await admit(self, *scope)

    monkeypatch.setattr(Admission, "__call__", spy)
    config = ServerConfig(api_keys=("mine", "other"), root_path="/llm", cors_origins=("https://x.com",))
    mine = ApiKeys(("mine",)).names[0]
    with run_server(config, max_num_seqs=1, max_waiting_requests=1) as served:
        places = [served.engine.enter(Origin(mine)) for _ in range(2)]
        with caplog.at_level("INFO", "fptq.access"):
            caplog.clear()
            for name in ("first", "second"):
                answer = served.http.post(path, content=b"[", headers={"X-Request-Id": name, **headers})
                assert answer.status_code == 429
                assert answer.headers["x-request-id"] == name
                assert answer.headers["content-type"] == "application/json"
                assert int(answer.headers["retry-after"]) >= 1
                assert answer.headers.get("access-control-allow-origin") == headers.get("Origin")
                error = answer.json()["error"]
                assert error["type"] == "rate_limit_error"
                assert error.get("code") == (None if path == "/v1/messages" else "queue_full")
        assert len(reached) == (2 if far else 0)
        wait_until(lambda: len(caplog.records) == 2)
        lines = [record.message for record in caplog.records]
        assert [" 429 " in line and "code=queue_full" in line for line in lines] == [True, True]
        assert [" second " in line for line in lines] == [False, True]
        assert all(line.startswith(headers.get("X-Forwarded-For", "127.0.0.1")) for line in lines)
        assert metric(served, "fptq_key_requests_total", key=mine) == 2
        assert metric(served, "fptq_requests_rejected_total", reason="queue_full") == 2
        assert served.http.post(path, headers={"Authorization": "Bearer wrong"}).status_code == 401
        other = served.http.post("/v1/completions", json={"prompt": "x", "max_tokens": 1},
                                 headers={"Authorization": "Bearer other"})
        assert other.status_code == 200
        for place in places:
            place.leave()
        assert served.http.post("/v1/completions", json={"prompt": "x", "max_tokens": 1}).status_code == 200


def test_a_connection_goes_on_after_a_refusal(run_server: Callable[..., Any]) -> None:
    """However the bodies come; and what waits behind an answer that is under way is answered after it."""
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    body = b'{"prompt": "x", "max_tokens": 1}'
    request, lives = head % len(body) + body, b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n"
    with run_server(max_num_seqs=1, max_waiting_requests=1) as served:
        places = [served.engine.enter() for _ in range(2)]
        with socket.create_connection(("127.0.0.1", served.port), timeout=60) as client, client.makefile("rb") as file:
            def answer() -> int:
                status = int(file.readline().split()[1])
                fields = dict(line.lower().strip().split(b": ", 1) for line in iter(file.readline, b"\r\n"))
                file.read(int(fields[b"content-length"]))
                return status

            for data, statuses in ((request, [429]), (request * 3, [429] * 3),
                                   (lives + request + lives, [200, 429, 200])):
                client.sendall(data)
                assert [answer() for _ in statuses] == statuses
            for byte in request:
                client.sendall(bytes([byte]))
            assert answer() == 429
            for place in places:
                place.leave()
            client.sendall(request)
            assert answer() == 200
            served.engine.draining = True
            client.sendall(request)
            assert answer() == 503
            assert file.read() == b"", "whoever asks again finds another server"
            served.engine.draining = False


def test_the_sdk_retries(client: openai.OpenAI, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """openai's client waits as long as retry-after-ms says, and gets through."""
    answers: list[Exception] = [QueueFullError(0.01), QueueFullError(0.01, "draining")]
    refuse_first(served, monkeypatch, answers)
    answer = client.with_options(max_retries=2).completions.create(model="demo", prompt="x", max_tokens=1)
    assert answer.usage is not None
    assert not answers


def test_prompts_are_taken_together(served: Served) -> None:
    """One bad prompt among good ones: none of them runs."""
    before = metric(served, "fptq_generated_tokens_total")
    body = {"prompt": [[5], [99999]], "max_tokens": 50, "ignore_eos": True}
    response = served.http.post("/v1/completions", json=body)
    assert response.status_code == 400
    wait_until(lambda: served.engine.engine.num_running + served.engine.engine.num_waiting == 0)
    assert metric(served, "fptq_generated_tokens_total") - before < 50


def test_a_dead_engine_is_not_counted_as_draining(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def dead(*_: Any) -> None:
        raise EngineDeadError

    monkeypatch.setattr(served.engine, "add_request", dead)
    before = {reason: metric(served, "fptq_requests_rejected_total", reason=reason)
              for reason in ("engine_stopped", "draining")}
    assert served.http.post("/v1/completions", json={"prompt": "x"}).status_code == 503
    after = {reason: metric(served, "fptq_requests_rejected_total", reason=reason) for reason in before}
    assert after == {"engine_stopped": before["engine_stopped"] + 1, "draining": before["draining"]}


@pytest.mark.parametrize(("sent", "status"), [("0.000001", 429), ("60", 200), ("0", 400), ("-1", 400), ("x", 400),
                                              ("nan", 400), ("inf", 200)])
def test_how_long_a_request_may_wait(run_server: Callable[..., Any], sent: str, status: int) -> None:
    """Behind others: one slot, taken by an answer that goes on."""
    with run_server(max_num_seqs=1) as served:
        endless = {"prompt": "x", "max_tokens": 900, "ignore_eos": True, "stream": True}
        with served.http.stream("POST", "/v1/completions", json=endless) as running:
            lines = running.iter_lines()
            for _ in range(20):
                next(lines)
            answer = served.http.post("/v1/completions", json={"prompt": "y", "max_tokens": 1},
                                      headers={"X-Max-Wait": sent})
        assert answer.status_code == status, answer.text
        if status == 429:
            assert int(answer.headers["Retry-After"]) >= 1
            assert answer.json()["error"]["type"] == "rate_limit_error"
        if status == 400:
            assert answer.json()["error"]["param"] == "X-Max-Wait"
