"""Starting, stopping, too many clients and clients that leave."""

from __future__ import annotations

import asyncio
import http.client
import json
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.acceptance.harness import Fptq, Server, assert_fluent, events, wait_until

LONG: dict[str, Any] = {"prompt": "Once upon a time", "max_tokens": 1000, "temperature": 0.8, "seed": 4,
                        "ignore_eos": True}


def supported(isa: str) -> bool:
    flag = {"generic": "fpu", "avx2": "avx2", "avxvnni": "avx_vnni", "avx512vnni": "avx512_vnni"}[isa]
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and flag in cpuinfo.read_text().split()


@pytest.mark.parametrize("isa", ["generic", "avx2", "avxvnni", "avx512vnni"])
def test_forced_isa(fptq: Fptq, server: Server, demo_artifact: Path, tmp_path: Path, isa: str) -> None:
    """Where the machine has it, the server uses it, says so and writes fluently; where not, it says that."""
    if not supported(isa):
        fptq("serve", demo_artifact, env={"FPTQ_ISA": isa}).assert_error("FPTQ_ISA", isa)
        return
    with Server(fptq, tmp_path / "serve.log", demo_artifact, FPTQ_ISA=isa) as forced:
        assert isa in json.dumps(forced.http.get("/info").json())
        answer = forced.complete(prompt="Once upon a time there was a king who", max_tokens=60, temperature=0.7, seed=3,
                                 ignore_eos=True)
        assert_fluent(answer["choices"][0]["text"])


@pytest.mark.parametrize("isa", ["avx9", "AVX 2", "auto512"])
def test_bad_isa(fptq: Fptq, small_artifact: Path, isa: str) -> None:
    fptq("serve", small_artifact, env={"FPTQ_ISA": isa}).assert_error("FPTQ_ISA", isa, "generic", "avx2")
    fptq("generate", small_artifact, "x", env={"FPTQ_ISA": isa}).assert_error("FPTQ_ISA", isa)


def read(response: httpx.Response) -> tuple[str, str | None]:
    """The rest of a streamed completion: its text and why it ended."""
    text, reason = "", None
    for event in events(response.iter_lines()):
        assert "error" not in event, event
        text += event["choices"][0]["text"]
        reason = event["choices"][0]["finish_reason"] or reason
    return text, reason


def test_sigterm_drains(fptq: Fptq, server: Server, demo_artifact: Path, tmp_path: Path) -> None:
    """Running streams go on to their end, which is what it would have been; nobody new is let in; the process ends
    well. Plain C++ is slow enough that the streams outlive the signal."""
    with Server(fptq, tmp_path / "serve.log", demo_artifact, "--drain-timeout", 240, FPTQ_ISA="generic") as draining:
        bodies = [{**LONG, "max_tokens": 500, "seed": i} for i in range(3)]
        expected = [draining.complete(**body)["choices"][0]["text"] for body in bodies]

        def stream(body: dict[str, Any]) -> tuple[str, str | None]:
            with draining.http.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
                assert response.status_code == 200
                return read(response)

        with ThreadPoolExecutor(len(bodies)) as pool:
            running = [pool.submit(stream, body) for body in bodies]
            wait_until(lambda: draining.metrics().value("running") == len(bodies), "the streams run")
            kept = http.client.HTTPConnection("127.0.0.1", draining.port, timeout=20)
            kept.request("GET", "/livez")
            kept.getresponse().read()
            draining.process.send_signal(signal.SIGTERM)
            assert kept.sock.recv(1) == b"", "who keeps a connection is not told to ask elsewhere"

            def refuses() -> bool:
                try:
                    response = httpx.post(draining.url + "/v1/completions", json={"prompt": "x", "max_tokens": 1})
                    ready = httpx.get(draining.url + "/readyz")
                except httpx.TransportError:
                    return True
                assert response.status_code in (200, 429, 503)
                if response.status_code == 200:
                    return False
                assert float(response.headers["retry-after"]) > 0
                assert response.headers["connection"] == "close"
                assert ready.status_code == 503
                return True

            wait_until(refuses, "new requests are refused", 20)
            assert not all(future.done() for future in running), "refused before the streams were through"
            assert [future.result(240) for future in running] == [(text, "length") for text in expected]
        assert draining.process.wait(60) == 0
    assert "Traceback" not in (tmp_path / "serve.log").read_text()


def test_full_queue_answers_429(fptq: Fptq, server: Server, demo_artifact: Path, tmp_path: Path) -> None:
    """One sequence at a time, and far more clients than any queue should hold: some are told when to come back, and
    when all have left the server is idle and well."""
    clients = 400
    with Server(fptq, tmp_path / "serve.log", demo_artifact, "--max-num-seqs", 1) as busy:
        async def storm() -> list[httpx.Response]:
            limits = httpx.Limits(max_connections=None)
            async with httpx.AsyncClient(base_url=busy.url, timeout=120, limits=limits) as client:
                tasks = [asyncio.create_task(client.post("/v1/completions", json=LONG)) for _ in range(clients)]
                refused: list[httpx.Response] = []
                for task in asyncio.as_completed(tasks):
                    response = await task
                    if response.status_code != 200:
                        refused.append(response)
                    if len(refused) >= 20:
                        break
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                return refused

        refused = asyncio.run(storm())
        assert {response.status_code for response in refused} == {429}
        for response in refused:
            assert float(response.headers["retry-after"]) > 0
            assert response.json()["error"]["message"]
        wait_until(lambda: busy.metrics().value("running") + busy.metrics().value("waiting") == 0, "all are gone")
        assert busy.metrics().value("reject", "counter") >= len(refused)
        assert busy.serves()


@pytest.mark.parametrize(("path", "streaming"), [
    ("/v1/completions", True), ("/v1/completions", False), ("/v1/chat/completions", True),
    ("/v1/chat/completions", False), ("/generate", False), ("/generate_stream", True)])
def test_disconnect_cancels(server: Server, path: str, streaming: bool) -> None:
    """Clients that leave free the engine at once: their sequences end as aborted, not at their length."""
    body: dict[str, Any]
    if path.startswith("/generate"):
        body = {"inputs": "Once upon a time", "parameters": {"max_new_tokens": 1000, "temperature": 0.8}}
    else:
        prompt = {"prompt": "x"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "x"}]}
        body = {**prompt, "max_tokens": 1000, "ignore_eos": True, "n": 2, "stream": streaming}
    wait_until(lambda: server.metrics().value("running") == 0, "earlier requests are through")
    before = server.metrics().value("finish", "counter", reason="abort")

    async def send(client: httpx.AsyncClient, answered: asyncio.Event) -> None:
        async with client.stream("POST", path, json=body) as response:
            assert response.status_code == 200
            async for line in response.aiter_lines():
                if line.startswith("data:"):
                    answered.set()

    async def send_and_leave() -> None:
        answered = asyncio.Event()
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
            tasks = [asyncio.create_task(send(client, answered)) for _ in range(8)]
            if streaming:
                await asyncio.wait_for(answered.wait(), 60)
            while (await asyncio.to_thread(server.metrics)).value("running") == 0:
                assert not all(task.done() for task in tasks)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(send_and_leave())
    wait_until(lambda: server.metrics().value("running") == 0, "the running gauge falls to 0", 30)
    assert server.metrics().value("finish", "counter", reason="abort") > before
    assert server.serves()


def test_model_without_a_chat_template(fptq: Fptq, small_artifact: Path, tmp_path: Path) -> None:
    with Server(fptq, tmp_path / "serve.log", small_artifact, "--max-model-len", 64) as small:
        response = small.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]})
        assert response.status_code == 400
        assert "chat template" in response.json()["error"]["message"].lower()
        too_long = small.post("/v1/completions", {"prompt": "once upon a time " * 60, "max_tokens": 1})
        assert too_long.status_code == 400
        assert "64" in too_long.json()["error"]["message"]
        assert small.openai.models.list().data[0].id
        assert small.serves()


def test_interrupt_ends_the_server(fptq: Fptq, small_artifact: Path, tmp_path: Path) -> None:
    with Server(fptq, tmp_path / "serve.log", small_artifact) as small:
        small.process.send_signal(signal.SIGINT)
        assert small.process.wait(60) in (0, 130, -signal.SIGINT)
    assert "Traceback" not in (tmp_path / "serve.log").read_text()
