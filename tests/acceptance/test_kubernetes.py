"""What a kubelet, an endpoints controller and kube-proxy do to the pods of docker/kubernetes/fptq.yaml, done to real
processes under load, with the manifest's own probes, preStop, drain and grace period."""

from __future__ import annotations

import asyncio
import random
import re
import signal
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import yaml

from tests.acceptance.harness import Fptq, free_port

MANIFEST = Path(__file__).parents[2] / "docker/kubernetes/fptq.yaml"
DEPLOYMENT: dict[str, Any] = next(iter(yaml.safe_load_all(MANIFEST.read_text())))
POD: dict[str, Any] = DEPLOYMENT["spec"]["template"]["spec"]
[CONTAINER] = POD["containers"]
SPEED = 5  # the manifest's seconds pass so much faster
PRE_STOP = CONTAINER["lifecycle"]["preStop"]["sleep"]["seconds"] / SPEED
GRACE = POD["terminationGracePeriodSeconds"] / SPEED
PROPAGATION = PRE_STOP / 2  # until kube-proxy has what the controller knows
REPLICAS = 2
ASKED: dict[str, Any] = {"model": "demo", "prompt": "Once upon a time", "max_tokens": 100, "temperature": 0,
                         "extra_body": {"ignore_eos": True}}


def arguments(artifact: Path, port: int) -> list[str]:
    """The manifest's, of this pod."""
    command, _, *options = CONTAINER["args"]
    changed = {"--host": "127.0.0.1", "--port": str(port)}
    drain = options.index("--drain-timeout") + 1
    options[drain] = str(float(options[drain]) / SPEED)
    for name, value in changed.items():
        options[options.index(name) + 1] = value
    return [command, str(artifact), *options, "--served-model-name", ASKED["model"], "--threads", "1"]


class Pod:
    """A process, and what a kubelet does to it. on_change: is called where whether it is ready has changed."""

    def __init__(self, fptq: Fptq, artifact: Path, log: Path, on_change: Callable[[], None]) -> None:
        self.port = free_port()
        self.log = log
        self.is_ready = self.is_terminating = False
        self.restarts = self.kills = 0
        self._run = lambda: fptq.start(*arguments(artifact, self.port), output=log.open("ab"))
        self._on_change = on_change
        self.process = self._run()
        self._probes = [asyncio.create_task(self._watch())]

    async def _probe(self, name: str) -> bool:
        probe = CONTAINER[f"{name}Probe"]

        async def get() -> bool:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
            try:
                path = probe["httpGet"]["path"]
                writer.write(f"GET {path} HTTP/1.1\r\nHost: pod\r\nConnection: close\r\n\r\n".encode())
                return 200 <= int((await reader.readline()).split()[1]) < 400
            finally:
                writer.close()

        try:
            return await asyncio.wait_for(get(), max(2.0, probe["timeoutSeconds"] / SPEED))  # the machine may be busy
        except (OSError, asyncio.TimeoutError, IndexError):
            return False

    async def _watch(self) -> None:
        probe = CONTAINER["startupProbe"]
        for _ in range(probe["failureThreshold"]):
            if await self._probe("startup"):
                break
            assert self.process.poll() is None, self.log.read_text()
            await asyncio.sleep(probe["periodSeconds"] / SPEED)
        else:
            raise AssertionError(f"a pod did not start:\n{self.log.read_text()}")
        await asyncio.gather(self._watch_readiness(), self._watch_liveness())

    async def _watch_readiness(self) -> None:
        probe = CONTAINER["readinessProbe"]
        assert probe["failureThreshold"] == 1
        while True:
            is_ready = await self._probe("readiness")
            if is_ready != self.is_ready:
                self.is_ready = is_ready
                self._on_change()
            await asyncio.sleep(probe["periodSeconds"] / SPEED)

    async def _watch_liveness(self) -> None:
        probe, failures = CONTAINER["livenessProbe"], 0
        while failures < probe.get("failureThreshold", 3):
            await asyncio.sleep(probe["periodSeconds"] / SPEED)
            failures = 0 if await self._probe("liveness") else failures + 1
        await self._end()
        self.restarts += 1
        self.process = self._run()
        self._probes.append(asyncio.create_task(self._watch()))

    async def _end(self) -> None:
        """preStop, SIGTERM, and SIGKILL where the grace period, which began before, is over."""
        deadline = time.monotonic() + GRACE
        await asyncio.sleep(PRE_STOP)
        self.process.send_signal(signal.SIGTERM)
        while self.process.poll() is None and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        if self.process.poll() is None:
            self.kills += 1
            self.process.kill()
            self.process.wait(10)

    async def delete(self) -> None:
        self.is_terminating = True
        self._on_change()
        self._forget()
        await self._end()

    def _forget(self) -> None:
        for task in self._probes:
            task.cancel()

    def clear(self) -> None:
        self._forget()
        self.process.kill()
        self.process.wait(10)


class Cluster:
    """A Deployment's pods, and a Service before them: each connection goes to one pod that was ready a moment ago and
    stays there."""

    def __init__(self, fptq: Fptq, artifact: Path, directory: Path) -> None:
        self.pods: list[Pod] = []
        self.all: list[Pod] = []
        self.endpoints: list[int] = []
        self._make = lambda: Pod(fptq, artifact, directory / f"pod{len(self.all)}.log", self._change)

    def _change(self) -> None:
        ready = [pod.port for pod in self.pods if pod.is_ready and not pod.is_terminating]
        asyncio.get_running_loop().call_later(PROPAGATION, setattr, self, "endpoints", ready)

    async def __aenter__(self) -> Cluster:
        self._server = await asyncio.start_server(self._connect, "127.0.0.1", 0)
        self.url = "http://{}:{}/v1".format(*self._server.sockets[0].getsockname())
        for _ in range(REPLICAS):
            await self.grow()
        while len(self.endpoints) < REPLICAS:
            await asyncio.sleep(0.05)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for pod in self.all:
            pod.clear()

    async def grow(self) -> None:
        """One more pod, which is ready."""
        pod = self._make()
        self.all.append(pod)
        self.pods.append(pod)
        while not pod.is_ready:
            for task in pod._probes:
                if task.done():
                    task.result()
            await asyncio.sleep(0.05)

    async def roll(self) -> None:
        """Another process for each, as the manifest's strategy has it: one more than there should be, none less."""
        assert DEPLOYMENT["spec"]["strategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}
        deletions = []
        for old in list(self.pods):
            await self.grow()
            deletions.append(asyncio.create_task(old.delete()))
            self.pods.remove(old)
        await asyncio.gather(*deletions)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            pod_reader, pod_writer = await asyncio.open_connection("127.0.0.1", random.choice(self.endpoints))
        except (OSError, IndexError):  # refused, or there is none
            writer.transport.abort()
            return
        with suppress(asyncio.CancelledError):  # the test ends
            await asyncio.gather(_pipe(reader, pod_writer), _pipe(pod_reader, writer))


async def _pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    with suppress(OSError):
        writer.close()


class Load:
    """Clients that ask one thing after another."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.texts: list[str] = []
        self.failures: list[tuple[float, str]] = []  # and when it was asked
        self.ended = asyncio.Event()

    async def client(self, streams: bool, keeps: bool) -> None:
        """keeps: its connections, as OpenAI's client does unless told otherwise, which then needs its retries, for
        nobody can tell whether a connection that ends has taken a request. Else nothing is tried twice."""
        options: dict[str, Any] = {} if keeps else {"max_retries": 0, "default_headers": {"Connection": "close"}}
        async with openai.AsyncOpenAI(base_url=self._url, api_key="none", timeout=120, **options) as client:
            while not self.ended.is_set():
                asked = time.monotonic()
                try:
                    self.texts.append(await self._ask(client, streams))
                except (openai.OpenAIError, httpx.TransportError) as error:  # a stream's are not wrapped
                    self.failures.append((asked, f"{error!r} {error.__cause__!r}"))

    @staticmethod
    async def _ask(client: openai.AsyncOpenAI, streams: bool) -> str:
        if not streams:
            return (await client.completions.create(**ASKED)).choices[0].text
        text, reason = "", None
        async for chunk in await client.completions.create(**ASKED, stream=True):
            text += chunk.choices[0].text
            reason = chunk.choices[0].finish_reason or reason
        assert reason == "length"
        return text

    async def during(self, event: Awaitable[None], keeps: tuple[bool, ...] = (True, False)) -> None:
        clients = [asyncio.create_task(self.client(*kind)) for kind in 8 // (2 * len(keeps)) * [
            (streams, keep) for streams in (True, False) for keep in keeps]]
        while len(self.texts) < len(clients):
            await asyncio.sleep(0.05)
        await event
        answered = len(self.texts)
        while len(self.texts) < answered + len(clients):  # goes on after it
            await asyncio.sleep(0.05)
        self.ended.set()
        await asyncio.gather(*clients)


@pytest.mark.slow
def test_a_rolling_update_fails_no_request(fptq: Fptq, demo_artifact: Path, tmp_path: Path) -> None:
    async def run() -> None:
        async with Cluster(fptq, demo_artifact, tmp_path) as cluster:
            old = list(cluster.pods)
            load = Load(cluster.url)
            await load.during(cluster.roll())
            assert not load.failures, load.failures
            assert len(set(load.texts)) == 1, set(load.texts)
            assert [pod.process.returncode for pod in old] == [0, 0]
            assert len(cluster.pods) == REPLICAS and not set(cluster.pods) & set(old)
            assert not any(pod.kills or pod.restarts for pod in cluster.all)

    asyncio.run(run())
    for log in tmp_path.glob("*.log"):
        assert not re.search("Traceback", log.read_text())


@pytest.mark.slow
def test_a_pod_that_hangs_is_killed_and_replaced(fptq: Fptq, demo_artifact: Path, tmp_path: Path) -> None:
    """Liveness fails, SIGTERM is not heard, the grace period ends. What was asked of it before it was left out
    ends with an error; nobody else notices."""
    async def run() -> None:
        async with Cluster(fptq, demo_artifact, tmp_path) as cluster:
            load = Load(cluster.url)
            hanging, other = cluster.pods

            async def hang() -> None:
                hanging.process.send_signal(signal.SIGSTOP)
                while cluster.endpoints != [other.port]:
                    await asyncio.sleep(0.05)
                left_out = time.monotonic()
                while hanging.restarts == 0:
                    await asyncio.sleep(0.05)
                while sorted(cluster.endpoints) != sorted([hanging.port, other.port]):
                    await asyncio.sleep(0.05)
                assert all(asked < left_out for asked, _ in load.failures), load.failures

            await load.during(hang(), keeps=(False,))
            assert load.failures
            assert len(set(load.texts)) == 1
            assert (hanging.kills, hanging.restarts, other.kills, other.restarts) == (1, 1, 0, 0)

    asyncio.run(run())
