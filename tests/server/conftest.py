"""The real engine with the demo model, behind a real uvicorn server on the loopback interface."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families

from fptq_runtime import __version__
from fptq_runtime.config import EngineConfig
from fptq_runtime.engine.adapters import Adapters
from fptq_runtime.engine.async_engine import AsyncEngine, RequestStream
from fptq_runtime.engine.engine import Engine
from fptq_runtime.engine.output import RequestOutput
from fptq_runtime.engine.request import FinishReason, Origin, SamplingParams
from fptq_runtime.kernels.base import Backend
from fptq_runtime.kernels.select import select_backend
from fptq_runtime.locate import find_artifact
from fptq_runtime.models.decoder import Decoder
from fptq_runtime.models.loader import Checkpoint, load_model
from fptq_runtime.models.tokenizer import Tokenizer
from fptq_server.app import create_app
from fptq_server.config import ServerConfig
from fptq_server.main import Server, bind, model_card
from fptq_server.metrics import Metrics
from fptq_server.tracing import Tracing

EOS = 1  # the demo model's


@dataclass
class Served:
    """One running server."""

    url: str
    app: FastAPI
    engine: AsyncEngine
    http: httpx.Client
    port: int


@pytest.fixture(scope="session")
def model_path() -> Path:
    return find_artifact("demo")


@pytest.fixture(scope="session")
def decoder(model_path: Path) -> tuple[Decoder, Backend]:
    backend = select_backend()
    return load_model(Checkpoint(model_path), backend), backend


@pytest.fixture(scope="session")
def tokenizer(model_path: Path) -> Tokenizer:
    return Tokenizer(model_path)


@pytest.fixture(scope="session")
def run_server(decoder: tuple[Decoder, Backend], tokenizer: Tokenizer) -> Callable[..., Any]:
    """run_server(config, sampling=…, aliases=…, engine options…): a context manager that yields a Served."""

    @contextmanager
    def run(config: ServerConfig | None = None, tokenizer: Tokenizer = tokenizer,
            sampling: Mapping[str, Any] | None = None, aliases: tuple[str, ...] = (),
            tracing: Tracing | None = None, decoder: tuple[Decoder, Backend] = decoder, **options: Any
            ) -> Iterator[Served]:
        config = replace(config or ServerConfig(), port=0)
        model, backend = decoder
        limits = EngineConfig(**{"max_model_len": 1024, "max_num_seqs": 32} | options)
        adapters = Adapters(Checkpoint(find_artifact("demo")).model, model, backend, limits.max_loras) \
            if limits.max_loras else None
        engine = Engine(model, backend, limits, tokenizer, adapters=adapters)
        card = model_card(["demo", *aliases], engine, sampling)
        metrics = Metrics(__version__, card, config.metrics_aliases)
        async_engine = AsyncEngine(engine, metrics.record_step)
        app = create_app(async_engine, tokenizer, config, card, metrics, tracing)
        server = Server(app, async_engine, config, metrics)
        listener = bind(config.host, 0)
        port = listener.getsockname()[1]
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        url = f"http://127.0.0.1:{port}"
        headers = {"Authorization": f"Bearer {config.api_keys[0]}"} if config.api_keys else {}
        with httpx.Client(base_url=url, headers=headers, timeout=60) as http:
            yield Served(url, app, async_engine, http, port)
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()

    return run


@pytest.fixture(scope="session")
def served(run_server: Callable[..., Any]) -> Iterator[Served]:
    with run_server() as server:
        yield server


@pytest.fixture(scope="session")
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=served.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


@contextmanager
def scripted(served: Served, text: str, reason: FinishReason = FinishReason.STOP, size: int = 3
             ) -> Iterator[list[tuple[Sequence[int], SamplingParams]]]:
    """The model answers every request with this text, so many characters a token. Yields what was asked of it."""
    asked: list[tuple[Sequence[int], SamplingParams]] = []
    pieces = [text[i : i + size] for i in range(0, len(text), size)]

    def add_request(request_id: str, prompt: Sequence[int], params: SamplingParams, origin: Origin,
                    adapter: str) -> RequestStream:
        asked.append((prompt, params))
        stream = RequestStream(request_id, params.n, lambda _: None)
        for index in range(params.n):
            for piece in pieces:
                stream.put(RequestOutput(request_id, index, (5,), piece, ()))
            stream.put(RequestOutput(request_id, index, (EOS,), "", (), reason))
        return stream

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(served.engine, "add_request", add_request)
        yield asked


def refuse_first(served: Served, monkeypatch: pytest.MonkeyPatch, answers: list[Exception]) -> None:
    """The engine's answers to its next requests, from the last on; those after them are taken."""
    take = served.engine.add_request

    def add_request(*args: Any) -> Any:
        if answers:
            raise answers.pop()
        return take(*args)

    monkeypatch.setattr(served.engine, "add_request", add_request)


def events(text: str) -> list[dict[str, Any]]:
    """The JSON of a stream's events, up to [DONE]."""
    data = [line.removeprefix("data: ") for line in text.split("\n") if line.startswith("data: ")]
    return [json.loads(line) for line in data if line != "[DONE]"]


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def metric(served: Served, name: str, **labels: str) -> float:
    """The value of one sample of /metrics."""
    families = text_string_to_metric_families(served.http.get("/metrics").text)
    [value] = [s.value for family in families for s in family.samples if s.name == name and s.labels == labels]
    return float(value)
