"""Several models behind one port: none of their requests is lost, whatever sleeps, wakes or is swapped."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from fptq_runtime.errors import FptqError
from fptq_server.pool import ModelPool, Plan, ServedModel
from tests.server.conftest import model_path

__all__ = ["model_path"]

PARAMS: dict[str, Any] = {"prompt": "Once upon a time", "max_tokens": 40, "temperature": 0}


class Fakes:
    """What a pool loads instead of models, and what is awake."""

    def __init__(self) -> None:
        self.awake: list[str] = []
        self.peak = 0
        self.broken: set[Path] = set()

    def load(self, model: ServedModel) -> Any:
        if model.path in self.broken:
            raise FptqError("no such model")

        @asynccontextmanager
        async def lifespan(_: Any) -> AsyncIterator[None]:
            self.awake.append(model.id)
            self.peak = max(self.peak, len(self.awake))
            yield
            self.awake.remove(model.id)

        return SimpleNamespace(app=SimpleNamespace(router=SimpleNamespace(lifespan_context=lifespan)), metrics=None,
                               path=model.path)

    def pool(self, names: str, budget: int) -> ModelPool:
        return ModelPool([((name,), Path(name)) for name in names], lambda _: Plan(1, 10), self.load, budget)


def test_the_one_used_longest_ago_makes_room() -> None:
    async def run() -> None:
        fakes = Fakes()
        pool = fakes.pool("abc", 2)
        await pool.start()
        assert fakes.awake == ["a", "b"]
        for name, awake in (("b", "ab"), ("a", "ab"), ("c", "ac"), ("a", "ac"), ("b", "ab")):
            pool.release(await pool.acquire(pool.find(name)))
            assert sorted(fakes.awake) == list(awake)
        busy = await pool.acquire(pool.find("a"))
        pool.release(await pool.acquire(pool.find("b")))
        pool.release(await pool.acquire(pool.find("c")))
        assert sorted(fakes.awake) == ["a", "c"], "one that has requests stays"
        pool.release(busy)
        await pool.stop()
        assert fakes.awake == []

    asyncio.run(run())


@pytest.mark.parametrize("seed", range(10))
def test_whatever_changes_no_request_is_lost(seed: int) -> None:
    """Requests, sleeps, wakes and reloads in any order, with room for two of four models."""
    async def run() -> None:
        draw, fakes = random.Random(seed), Fakes()
        pool = fakes.pool("abcd", 2)
        await pool.start()
        served: list[str] = []

        async def request(name: str) -> None:
            await asyncio.sleep(draw.random() * 0.05)
            instance = await pool.acquire(pool.find(name))
            for _ in range(draw.randrange(1, 4)):
                await asyncio.sleep(draw.random() * 0.002)
                assert name in fakes.awake
            pool.release(instance)
            served.append(name)

        async def change() -> None:
            await asyncio.sleep(draw.random() * 0.05)
            model = draw.choice(pool.models)
            await draw.choice([pool.sleep, pool.wake, lambda model: pool.reload(model, Path("new"))])(model)

        requests = [draw.choice("abcd") for _ in range(60)]
        await asyncio.wait_for(asyncio.gather(*map(request, requests), *(change() for _ in range(15))), 60)
        assert sorted(served) == sorted(requests)
        assert fakes.peak <= 2
        await pool.stop()
        assert fakes.awake == []

    asyncio.run(run())


def test_what_cannot_be_loaded_changes_nothing() -> None:
    async def run() -> None:
        fakes = Fakes()
        pool = fakes.pool("a", 2)
        await pool.start()
        fakes.broken.add(Path("bad"))
        before = pool.default.instance
        with pytest.raises(FptqError):
            await pool.reload(pool.default, Path("bad"))
        assert (pool.default.path, pool.default.instance) == (Path("a"), before)
        instance = await pool.acquire(pool.default)
        swap = asyncio.create_task(pool.reload(pool.default, Path("good")))
        await asyncio.sleep(0.05)
        assert fakes.awake == ["a", "a"], "the old one answers what it began"
        pool.release(instance)
        await swap
        assert fakes.awake == ["a"]

    asyncio.run(run())


def test_what_never_fits_is_refused() -> None:
    with pytest.raises(FptqError, match=r"a takes about 1 bytes .* more than the 0 bytes of models_memory"):
        Fakes().pool("a", 0)
    with pytest.raises(FptqError, match="NAME=ARTIFACT"):
        Fakes().pool("aa", 9)


@pytest.fixture(scope="module")
def two(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[httpx.Client, httpx.Client]]:
    """A server of two models with room for one, and its operator."""
    copy = tmp_path_factory.mktemp("models") / "copy"
    shutil.copytree(model_path, copy)
    log = tmp_path_factory.mktemp("log") / "log"
    with log.open("w") as out:
        process = subprocess.Popen([
            sys.executable, "-m", "fptq_runtime.cli", "serve", f"first={model_path}", str(copy), "--port", "0",
            "--admin-port", "0", "--admin-key", "operator", "--models-memory", "100MiB", "--kv-cache-memory", "60MiB",
            "--threads", "1"], stdout=out, stderr=out)
    ports: list[int] = []
    while len(ports) < 2:
        assert process.poll() is None, log.read_text()
        time.sleep(0.1)
        lines = [line for line in log.read_text().splitlines() if "swapped on" in line or "serving on" in line]
        lines.sort(key=lambda line: "swapped" in line)
        ports = [int(line.split("127.0.0.1:")[1].split()[0]) for line in lines]
    with httpx.Client(base_url=f"http://127.0.0.1:{ports[0]}", timeout=60) as clients, \
            httpx.Client(base_url=f"http://127.0.0.1:{ports[1]}", timeout=60,
                         headers={"Authorization": "Bearer operator"}) as operator:
        yield clients, operator
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0, log.read_text()


def test_two_models_take_turns_in_the_memory_of_one(two: tuple[httpx.Client, httpx.Client]) -> None:
    clients, operator = two
    client = openai.OpenAI(base_url=f"{clients.base_url}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == ["first", "copy"]
    assert client.models.retrieve("copy").id == "copy"
    answers = {}
    for name in ("first", "copy", "first"):
        answer = client.completions.create(model=name, **PARAMS)
        assert answer.model == name
        answers[name] = answer.choices[0].text
        states = {model["id"]: model["state"] for model in operator.get("/admin/models").json()["models"]}
        assert states == {"first": "asleep", "copy": "asleep"} | {name: "awake"}
    assert answers["first"] == answers["copy"]
    with pytest.raises(openai.NotFoundError, match="this server has first, copy"):
        client.completions.create(model="third", **PARAMS)
    families = {family.name: family for family in text_string_to_metric_families(clients.get("/metrics").text)}
    finished = {(sample.labels["model_name"], sample.value) for sample in families["fptq_requests_finished"].samples
                if sample.labels.get("reason") == "length"}
    assert finished == {("first", 2), ("copy", 1)}, "also of one that sleeps"
    assert clients.get("/readyz").status_code == 200
    assert clients.post("/v1/completions", content=b"{").status_code == 400
    assert clients.get("/v1/nothing").status_code == 404
    stored = client.responses.create(model="copy", input="Hello", max_output_tokens=3)
    assert client.responses.retrieve(stored.id).id == stored.id, "one store for all"


def test_an_artifact_is_swapped_under_load(two: tuple[httpx.Client, httpx.Client], model_path: Path) -> None:
    clients, operator = two
    expected = clients.post("/v1/completions", json={"model": "first", **PARAMS}).json()["choices"][0]["text"]
    done, failed = threading.Event(), []

    def ask() -> None:
        with httpx.Client(base_url=clients.base_url, timeout=60) as mine:
            while not done.is_set():
                answer = mine.post("/v1/completions", json={"model": "first", **PARAMS})
                if answer.status_code != 200 or answer.json()["choices"][0]["text"] != expected:
                    failed.append(answer.text)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for body in ({"model": "first"}, {"model": "first", "artifact": str(model_path)}):
        assert operator.post("/admin/reload", json=body).status_code == 200
    assert operator.post("/admin/sleep", json={"model": "first"}).status_code == 200
    time.sleep(0.5)
    done.set()
    for thread in threads:
        thread.join(60)
    assert failed == []


@pytest.mark.parametrize(("send", "status", "said"), [
    (lambda http: http.post("/admin/reload", json={"artifact": "/nowhere"}), 400, "/nowhere is not a directory"),
    (lambda http: http.post("/admin/reload", json={"model": "third"}), 404, "this server has first, copy"),
    (lambda http: http.post("/admin/reload", json={"artefact": "x"}), 400, "unknown field artefact"),
    (lambda http: http.get("/admin/models", headers={"Authorization": "Bearer guess"}), 401, "API key"),
    (lambda http: http.get("/v1/models"), 404, "no endpoint"),
])
def test_an_operator_is_told(two: tuple[httpx.Client, httpx.Client], send: Callable[[httpx.Client], httpx.Response],
                             status: int, said: str) -> None:
    answer = send(two[1])
    assert answer.status_code == status
    assert said in answer.json()["error"]["message"], json.dumps(answer.json())
    assert two[0].get("/admin/models", headers={"Authorization": "Bearer operator"}).status_code == 404
