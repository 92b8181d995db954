"""Streams that wait, fail, or lose their client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import openai
import pytest

from fptq_runtime.engine.output import RequestOutput, TokenLogprobs
from fptq_runtime.engine.request import FinishReason
from fptq_server.config import ServerConfig
from tests.server.conftest import Served, events, metric, wait_until

ENDLESS: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "x", "max_tokens": 1000, "ignore_eos": True, "n": 2},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1000, "ignore_eos": True},
    "/generate": {"inputs": "x", "parameters": {"max_new_tokens": 1000, "temperature": 1}},
    "/generate_stream": {"inputs": "x", "parameters": {"max_new_tokens": 1000, "temperature": 1}},
}


@pytest.mark.parametrize(("path", "stream"), [
    ("/v1/completions", True), ("/v1/completions", False), ("/v1/chat/completions", True),
    ("/v1/chat/completions", False), ("/generate", False), ("/generate_stream", True),
])
def test_a_client_that_leaves_stops_the_engine(served: Served, monkeypatch: pytest.MonkeyPatch, path: str,
                                               stream: bool) -> None:
    """The sequences end by abort, with more than enough left to generate."""
    monkeypatch.setattr(served.engine.engine, "_eos_token_ids", frozenset())
    before = metric(served, "fptq_requests_finished_total", reason="abort")
    body = ENDLESS[path] | ({"stream": stream} if path.startswith("/v1") else {})

    async def leave() -> None:
        async with httpx.AsyncClient(base_url=served.url, timeout=60) as client:
            request = asyncio.create_task(client.post(path, json=body))
            while served.engine.engine.num_running == 0:
                await asyncio.sleep(0.01)
            request.cancel()
            await asyncio.gather(request, return_exceptions=True)

    asyncio.run(leave())
    wait_until(lambda: served.engine.engine.num_running == 0)
    wait_until(lambda: metric(served, "fptq_requests_finished_total", reason="abort") > before)


class StubStream:
    """One token, then what a test wants."""

    def __init__(self, then: Callable[[], Any]) -> None:
        self._then = then
        self.aborted = False

    async def __aiter__(self) -> AsyncIterator[RequestOutput]:
        yield RequestOutput("r", 0, (5,), "one", (TokenLogprobs(5, -1.0, ()),))
        output = await self._then()
        if output is not None:
            yield output

    def abort(self) -> None:
        self.aborted = True


async def raises() -> None:
    raise RuntimeError("the secret cause")


async def engine_fails() -> RequestOutput:
    return RequestOutput("r", 0, (), "", (), FinishReason.ERROR)


async def is_aborted() -> RequestOutput:
    return RequestOutput("r", 0, (), "", (), FinishReason.ABORT)


@pytest.mark.parametrize(("then", "status", "code"), [
    (raises, 500, "internal"), (engine_fails, 500, "engine_error"), (is_aborted, 503, "aborted")])
@pytest.mark.parametrize("path", sorted(ENDLESS))
def test_failure_on_the_way(served: Served, monkeypatch: pytest.MonkeyPatch, then: Callable[[], Any], status: int,
                            code: str, path: str) -> None:
    """A status where it is not sent yet, else an event; never the cause."""
    stream = StubStream(then)
    monkeypatch.setattr(served.engine, "add_request", lambda *_: stream)
    body = ENDLESS[path]
    if path.startswith("/v1"):
        body = body | {"n": 1}
        response = served.http.post(path, json=body)
        assert response.status_code == status
        assert response.json()["error"]["code"] == code
        assert ("Retry-After" in response.headers) is (status == 503)  # another server, or this one again, has it
        assert stream.aborted
        body = body | {"stream": True}
    elif path == "/generate":
        assert served.http.post(path, json=body).status_code == status
        return
    response = served.http.post(path, json=body)
    assert response.status_code == 200
    assert "secret" not in response.text
    assert "[DONE]" not in response.text
    assert events(response.text)[-1]["error"]["code"] == code
    assert "error" not in events(response.text)[0]
    wait_until(lambda: stream.aborted)


def test_the_sdk_raises_on_failure_on_the_way(client: openai.OpenAI, served: Served, monkeypatch: pytest.MonkeyPatch
                                              ) -> None:
    monkeypatch.setattr(served.engine, "add_request", lambda *_: StubStream(engine_fails))
    with pytest.raises(openai.APIError, match="engine failed"):
        list(client.completions.create(model="demo", prompt="x", stream=True))


def test_keep_alive(run_server: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with run_server(ServerConfig(keep_alive_interval=0.01)) as served:
        async def waits() -> RequestOutput:
            await asyncio.sleep(0.2)
            return RequestOutput("r", 0, (6,), " two", (), FinishReason.STOP)

        monkeypatch.setattr(served.engine, "add_request", lambda *_: StubStream(waits))
        text = served.http.post("/v1/completions", json={"prompt": "x", "stream": True}).text
        assert text.count(": keep-alive\n\n") >= 2
        assert "".join(event["choices"][0]["text"] for event in events(text)) == "one two"
        with openai.OpenAI(base_url=served.url + "/v1", api_key="none") as client:
            chunks = client.completions.create(model="demo", prompt="x", stream=True)
            assert "".join(chunk.choices[0].text for chunk in chunks) == "one two"
