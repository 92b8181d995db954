"""Keys, and that no endpoint was forgotten."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest

from fptq_server.auth import PUBLIC_PATHS
from fptq_server.config import ServerConfig
from tests.server.conftest import Served

KEYS = ("first-key", "second key")


@pytest.fixture(scope="module")
def closed(run_server: Callable[..., Any]) -> Iterator[Served]:
    with run_server(ServerConfig(api_keys=KEYS)) as served:
        yield served


def test_every_route_denies_by_default(closed: Served) -> None:
    paths = {path: set(methods) for path, methods in closed.app.openapi()["paths"].items()}
    paths |= {route.path: {"get"} for route in closed.app.routes if hasattr(route, "path") and route.path not in paths}
    assert {"/v1/completions", "/metrics", "/docs", "/openapi.json", "/info"} <= set(paths)
    for path, methods in paths.items():
        for method in methods:
            status = httpx.request(method, closed.url + path, json={} if method == "post" else None).status_code
            assert status == (200 if path in PUBLIC_PATHS else 401), path
    for path in ("/nowhere", "//livez", "/livez/", "/LIVEZ", "/livez/../metrics", "/%6Divez"):
        assert httpx.get(closed.url + path).status_code == 401


@pytest.mark.parametrize("header", [
    None, "", "Bearer", "Bearer wrong", "Bearer first-keyx", "Bearer first-ke", f"Basic {KEYS[0]}", KEYS[0],
    "Bearer first-key second key", b"Bearer \xc3\xa9",
])
def test_wrong_keys(closed: Served, header: str | bytes | None) -> None:
    headers: Any = {} if header is None else {"Authorization": header}
    response = httpx.get(closed.url + "/v1/models", headers=headers)
    assert response.status_code == 401
    assert response.headers["WWW-Authenticate"] == "Bearer"
    assert response.json()["error"]["code"] == "invalid_api_key"
    assert not any(key in response.text for key in KEYS)


@pytest.mark.parametrize("key", KEYS)
def test_each_key_opens(closed: Served, key: str) -> None:
    assert openai.OpenAI(base_url=closed.url + "/v1", api_key=key).models.list().data[0].id == "demo"
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=closed.url + "/v1", api_key=key + "!").models.list()


def test_public_metrics(run_server: Callable[..., Any]) -> None:
    with run_server(ServerConfig(api_keys=KEYS, public_metrics=True)) as served:
        assert httpx.get(served.url + "/metrics").status_code == 200
        assert httpx.get(served.url + "/info").status_code == 401


@pytest.mark.parametrize("key", ["", " ", "a ", "é", "a\n"])
def test_unusable_keys_are_refused(key: str) -> None:
    with pytest.raises(ValueError, match="api key"):
        ServerConfig(api_keys=(key,))
