"""Models, probes, version and info."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import openai
import pytest

from fptq_runtime import __version__
from fptq_server.config import ServerConfig
from tests.server.conftest import Served, wait_until


def test_models(client: openai.OpenAI) -> None:
    [model] = client.models.list().data
    assert (model.id, model.object, model.owned_by) == ("demo", "model", "fptq")
    assert client.models.retrieve("demo") == model
    with pytest.raises(openai.NotFoundError, match="gpt-4") as caught:
        client.models.retrieve("org/gpt-4")
    assert caught.value.code == "model_not_found"


def test_version_and_info(served: Served) -> None:
    assert served.http.get("/version").json() == {"version": __version__}
    info = served.http.get("/info").json()
    assert info["model"]["id"] == "demo"
    assert info["model"]["architecture"] == "LlamaForCausalLM"
    assert info["engine"]["kv_cache_dtype"] == "int8"
    backend = served.engine.engine.backend
    assert info["kernels"] == {"backend": backend.name, **backend.describe()}


def test_probes_when_well(served: Served) -> None:
    for path in ("/livez", "/readyz", "/health"):
        assert served.http.get(path).status_code == 200
        probe = served.http.head(path)
        assert (probe.status_code, probe.content) == (200, b"")


def test_draining_is_alive_and_not_ready(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served.engine, "draining", True)
    assert served.http.get("/livez").status_code == 200
    assert served.http.get("/readyz").status_code == 503
    assert served.http.get("/health").json() == {"status": "draining"}
    response = served.http.post("/v1/completions", json={"prompt": "x"})
    assert response.status_code == 503
    assert int(response.headers["Retry-After"]) >= 1


def test_wrong_kernels_are_alive_and_not_ready(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served.engine, "deviation", 1.0)
    assert served.http.get("/readyz").status_code == 200
    monkeypatch.setattr(served.engine, "deviation", 1.5)
    assert served.http.get("/livez").status_code == 200
    assert served.http.get("/readyz").json() == {"status": "the kernels do not compute what was recorded"}
    assert served.http.get("/readyz").status_code == 503


def test_a_dead_engine_is_not_alive(run_server: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with run_server() as served:
        monkeypatch.setattr(served.engine.engine, "step", None)  # what the thread calls next is no function
        response = served.http.post("/v1/completions", json={"prompt": "x"})
        assert response.status_code == 500
        assert "NoneType" not in response.text
        for path in ("/livez", "/readyz", "/health"):
            assert served.http.get(path).status_code == 503
        assert served.http.post("/v1/completions", json={"prompt": "x"}).status_code == 503


def test_a_stalled_engine_is_not_alive(run_server: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with run_server(ServerConfig(stall_timeout=0.05)) as served:
        step, blocked = served.engine.engine.step, [True]

        def stuck() -> Any:
            while blocked:
                time.sleep(0.01)
            return step()

        monkeypatch.setattr(served.engine.engine, "step", stuck)
        with served.http.stream("POST", "/v1/completions", json={"prompt": "x", "max_tokens": 1, "stream": True}):
            wait_until(lambda: served.http.get("/livez").status_code == 503)
            blocked.clear()
        wait_until(lambda: served.http.get("/livez").status_code == 200)
