"""Replicas on Ray: what Serve is told, what its proxy does with requests, and, where it is slow, a real one of two."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import psutil
import pytest
from prometheus_client import CollectorRegistry, Gauge, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from starlette.requests import Request
from starlette.types import Message, Receive, Scope, Send

from fptq_runtime.errors import FptqError
from fptq_server.config import ServerConfig
from tests.server.conftest import decoder, model_path, run_server, tokenizer

pytest.importorskip("ray", reason="fptq-serve[ray] is not installed")

from fptq_server.ray_serve import (
    SLACK,
    Door,
    app,
    application,
    by_queued_tokens,
    by_replica,
    in_order,
    parse_replicas,
    prefix_key,
)

__all__ = ["decoder", "model_path", "run_server", "tokenizer"]

PARAMS: dict[str, Any] = {"prompt": "Once upon a time", "max_tokens": 30, "temperature": 0}
SYSTEM = {"role": "system", "content": "You are a bear."}


def key(**request: Any) -> str | None:
    return prefix_key(json.dumps({"model": "demo", **request}).encode())


def test_a_conversation_keeps_its_key() -> None:
    turn = [SYSTEM, {"role": "user", "content": "Hello"}]
    later = [*turn, {"role": "assistant", "content": "Hi"}, {"role": "user", "content": "Who are you?"}]
    assert key(messages=turn) == key(messages=later) is not None
    assert key(messages=turn) != key(messages=[SYSTEM, {"role": "user", "content": "Bye"}])
    assert key(messages=turn) != key(messages=turn, model="other")
    assert key(messages=turn, system="a") != key(messages=turn, system="b")


def test_prompts_that_begin_alike_have_one_key() -> None:
    begins = "There was a king. " * 100
    assert key(prompt=begins + "a") == key(prompt=begins + "b") != key(prompt="There was a queen.")
    assert key(prompt="a", prompt_cache_key="k") == key(prompt="b", prompt_cache_key="k")
    assert key(input=[1, 2]) is not None


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"{}", b'{"messages": null}', b"\xff", b"[" * 100_000])
def test_what_is_no_prompt_has_none(body: bytes) -> None:
    assert prefix_key(body) is None


@pytest.mark.parametrize("request_", [{"messages": [1, None]}, {"prompt": "\ud800"}, {"prompt_cache_key": {"a": 1}}])
def test_a_key_of_what_the_replica_will_refuse(request_: dict[str, Any]) -> None:
    assert key(**request_) is not None




class Identity(str):
    @property
    def unique_id(self) -> str:
        return str(self)


def replicas(count: int) -> list[Any]:
    return [SimpleNamespace(replica_id=Identity(f"r{number}")) for number in range(count)]


def test_a_replica_that_comes_moves_only_its_share() -> None:
    idle = Counter[Any]()
    four, five = replicas(4), replicas(5)
    before = [in_order(f"{n}", four, idle)[0].replica_id for n in range(1000)]
    after = [in_order(f"{n}", five, idle)[0].replica_id for n in range(1000)]
    moved = [new for old, new in zip(before, after, strict=True) if old != new]
    assert set(moved) == {"r4"}
    assert all(150 < count < 350 for count in Counter(before).values())


def test_a_replica_with_too_much_is_tried_last() -> None:
    two = replicas(2)
    first, second = (each.replica_id for each in in_order("k", two, Counter()))
    assert in_order("k", two, Counter({first: SLACK}))[0].replica_id == first
    assert in_order("k", two, Counter({first: 4 * SLACK}))[0].replica_id == second


def context(requests: float, queued: float) -> Any:
    return SimpleNamespace(aggregated_metrics={"queued_tokens": {"a": queued / 2, "b": queued / 2}},
                           total_num_requests=requests, config=SimpleNamespace(target_ongoing_requests=10))


def test_requests_or_tokens_that_wait_want_replicas() -> None:
    assert by_queued_tokens(context(0, 0))[0] == 0
    assert by_queued_tokens(context(25, 0))[0] == 3
    assert by_queued_tokens(context(1, 20_000))[0] == 5


def ask(inner: Any, *bodies: bytes, path: str = "/v1/completions") -> tuple[list[Message], Scope]:
    """What the door lets out, and what it lets in."""
    came: list[Message] = [{"type": "http.request", "body": body, "more_body": n < len(bodies) - 1}
                           for n, body in enumerate(bodies)]
    sent: list[Message] = []
    seen: list[Scope] = []

    async def receive() -> Message:
        return came.pop(0)

    async def send(message: Message) -> None:
        sent.append(message)

    async def note(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope)
        await inner(scope, receive, send)

    scope = {"type": "http", "method": "POST", "path": path, "headers": [], "query_string": b"", "root_path": ""}
    asyncio.run(Door(note)(scope, receive, send))
    return sent, seen[0]


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    body = await Request(scope, receive).body()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


def test_the_body_is_given_again_with_the_session() -> None:
    body = json.dumps({"model": "demo", **PARAMS}).encode()
    sent, scope = ask(echo, body[:5], body[5:])
    assert sent[-1]["body"] == body
    assert dict(scope["headers"])[b"x-session-id"].decode() == prefix_key(body)


def test_a_long_body_goes_on_as_it_comes() -> None:
    parts = [b'{"prompt": "', *([b"a" * (1 << 19)] * 6), b'"}']
    sent, scope = ask(echo, *parts)
    assert sent[-1]["body"] == b"".join(parts)
    assert scope["headers"] == []


def test_an_answer_that_never_began_is_refused() -> None:
    async def dies(scope: Scope, receive: Receive, send: Send) -> None:
        pass

    sent, _ = ask(dies, b"{}")
    assert sent[0]["status"] == 503
    assert dict(sent[0]["headers"])[b"retry-after"] == b"1"
    assert json.loads(sent[1]["body"])["error"]["code"] == "replica_died"


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/messages", "/v1/responses"])
def test_a_stream_that_breaks_off_ends_with_an_error(path: str) -> None:
    async def dies(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [
            (b"content-type", b"text/event-stream; charset=utf-8")]})
        await send({"type": "http.response.body", "body": b'data: {"half', "more_body": True})

    sent, _ = ask(dies, b"{}", path=path)
    assert not sent[-1].get("more_body", False)
    [data] = [line for line in sent[-1]["body"].decode().splitlines() if line.startswith("data: ")]
    assert "has died" in data
    assert ("event: error" in sent[-1]["body"].decode()) == (path != "/v1/completions")


def test_metrics_of_all_have_the_replica() -> None:
    def of(value: float) -> bytes:
        registry = CollectorRegistry()
        Gauge("fptq_requests_running", "Running.", ("model_name",), registry=registry).labels("demo").set(value)
        return generate_latest(registry)

    [family] = text_string_to_metric_families(by_replica({"a": of(1), "b": of(2)}).decode())
    assert [(each.labels, each.value) for each in family.samples] == [
        ({"replica": "a", "model_name": "demo"}, 1), ({"replica": "b", "model_name": "demo"}, 2)]


def test_an_application_has_a_cpu_for_each_thread() -> None:
    bound = application([(("demo",), Path())], ServerConfig(drain_timeout=7), (1, 3), threads=2)._bound_deployment
    assert bound.ray_actor_options["num_cpus"] == 2
    config = bound._deployment_config
    assert (config.autoscaling_config.min_replicas, config.autoscaling_config.max_replicas) == (1, 3)
    assert config.graceful_shutdown_timeout_s == 7
    assert config.autoscaling_config.policy.policy_function == "fptq_server.ray_serve:by_queued_tokens"


def test_the_application_of_a_config_file(tmp_path: Path) -> None:
    args = {"artifact": {"a": str(tmp_path), "b": str(tmp_path)}, "replicas": 2, "threads": 1, "api_keys": ["secret"],
            "max_num_seqs": 8}
    bound = app(args)._bound_deployment
    models, config, _, options = bound.init_args
    assert models == [(("a",), tmp_path), (("b",), tmp_path)]
    assert config.api_keys == ("secret",)
    assert options["max_num_seqs"] == 8
    assert bound.num_replicas == 2


@pytest.mark.parametrize(("args", "message"), [
    ({}, "artifact must be"),
    ({"artifact": "x", "max_model_length": 3}, "max_model_length is no option"),
    ({"artifact": "x", "replicas": "3:1"}, "MAX no less"),
    ({"artifact": "x", "replicas": "many"}, "must be like 2 or 1:4"),
    ({"artifact": "x", "batch_dir": "/x"}, "batch_dir is of a server in one process"),
])
def test_what_is_wrong_is_said(args: dict[str, Any], message: str) -> None:
    with pytest.raises(FptqError, match=message):
        app(args)


def test_replicas() -> None:
    assert parse_replicas("1:3") == (1, 3)
    assert parse_replicas(2) == (2, 2)


class Serving:
    """`fptq serve demo --ray`, of two replicas, and all processes that it started."""

    def __init__(self, artifact: Path, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        command = [sys.executable, "-m", "fptq_runtime.cli", "serve", f"demo={artifact}", "--ray", "--replicas", "2",
                   "--threads", "1", "--port", str(port)]
        self.process = psutil.Popen(command, env=environment)
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="x", timeout=60)
        self.started: set[psutil.Process] = set()

    def wait(self) -> None:
        deadline = time.monotonic() + 240
        while len(self.replicas()) < 2:
            assert self.process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.5)

    def replicas(self) -> dict[str, float]:
        """Requests that each has finished, where the server answers."""
        try:
            text = httpx.get(f"{self.url}/metrics", timeout=10).raise_for_status().text
        except httpx.HTTPError:
            return {}
        counts: Counter[str] = Counter()
        for family in text_string_to_metric_families(text):
            if family.name == "fptq_requests_finished":
                for sample in family.samples:
                    counts[sample.labels["replica"]] += int(sample.value)
        return counts

    def processes(self) -> list[psutil.Process]:
        """Of the replicas."""
        self.started.update(found := self.process.children(recursive=True))
        return [each for each in found if each.is_running() and "ServeReplica" in " ".join(each.cmdline())]

    def answer(self, prompt: str, stream: bool, size: int = 40) -> str:
        sampled: dict[str, Any] = {"model": "demo", "prompt": prompt, "max_tokens": size, "seed": 5, "temperature": 1}
        if not stream:
            return self.client.completions.create(**sampled).choices[0].text
        return "".join(chunk.choices[0].text for chunk in self.client.completions.create(**sampled, stream=True))


@pytest.fixture(scope="module")
def serving(model_path: Path) -> Iterator[Serving]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    served = Serving(model_path, port)
    try:
        served.wait()
        yield served
    finally:
        if served.process.poll() is None:
            served.process.send_signal(signal.SIGTERM)
            try:
                served.process.wait(60)
            except psutil.TimeoutExpired:
                served.process.kill()


PROMPTS = [f"{number} bears lived in a wood" for number in range(12)]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_answers_are_one_process_s(serving: Serving, run_server: Any) -> None:
    with run_server() as one, ThreadPoolExecutor(12) as pool:
        alone = openai.OpenAI(base_url=f"{one.url}/v1", api_key="x")
        expected = [alone.completions.create(model="demo", prompt=prompt, max_tokens=40, seed=5, temperature=1)
                    .choices[0].text for prompt in PROMPTS]
        assert list(pool.map(lambda prompt: serving.answer(prompt, False), PROMPTS)) == expected
        assert list(pool.map(lambda prompt: serving.answer(prompt, True), PROMPTS)) == expected
    assert all(serving.replicas().values())


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_replica_ends_its_own_answers(serving: Serving) -> None:
    def outcome(prompt: str) -> str:
        try:
            serving.answer(prompt, True, 900)
        except openai.APIError as error:
            return str(error)
        return "whole"

    [victim, _] = serving.processes()
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        outcomes = [pool.submit(outcome, prompt) for prompt in PROMPTS]
        time.sleep(0.5)
        victim.kill()
        ended = Counter(each.result(timeout=120) for each in outcomes)
    assert ended.keys() <= {"whole", "the replica that answered has died; send the request again"}
    assert ended["whole"] and len(ended) == 2
    serving.wait()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_replicas_are_replaced_and_no_request_is_lost(serving: Serving) -> None:
    before = set(serving.processes())
    done = False

    def ask_on(prompt: str) -> int:
        count = 0
        while not done:
            assert serving.answer(prompt, count % 2 == 0)
            count += 1
        return count

    with ThreadPoolExecutor(4) as pool:
        answered = [pool.submit(ask_on, prompt) for prompt in PROMPTS[:4]]
        try:
            serving.process.send_signal(signal.SIGHUP)
            deadline = time.monotonic() + 240
            while before & set(serving.processes()) or len(serving.replicas()) < 2:
                assert time.monotonic() < deadline
                time.sleep(0.5)
        finally:
            done = True
        assert all(each.result(timeout=60) for each in answered)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_nothing_stays_behind(serving: Serving) -> None:
    serving.processes()
    serving.process.send_signal(signal.SIGTERM)
    assert serving.process.wait(120) == 0
    assert not [each for each in serving.started if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]
