"""Keys, and that no endpoint was forgotten."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from fptq_runtime.errors import FptqError
from fptq_server.auth import PUBLIC_PATHS
from fptq_server.config import ServerConfig
from fptq_server.keys import ApiKey, ApiKeys
from tests.server.conftest import Served, metric, wait_until

KEYS = ("first-key", "second key")


@pytest.fixture(scope="module")
def closed(run_server: Callable[..., Any]) -> Iterator[Served]:
    with run_server(ServerConfig(api_keys=KEYS)) as served:
        yield served


def test_every_route_denies_by_default(closed: Served) -> None:
    paths = {path: set(methods) for path, methods in closed.app.openapi()["paths"].items()}
    paths |= {route.path: {"get"} for route in closed.app.routes if hasattr(route, "path") and route.path not in paths}
    paths |= {"/docs": {"get"}, "/openapi.json": {"get"}, "/": paths["/"] | {"get"}}  # included routers'
    assert {"/v1/completions", "/metrics", "/docs", "/openapi.json", "/info"} <= set(paths)
    for path, methods in paths.items():
        for method in methods:
            status = httpx.request(method, closed.url + path, json={} if method == "post" else None).status_code
            open_to_all = method == "get" and path in PUBLIC_PATHS | {"/"}
            assert status == (200 if open_to_all else 401), (method, path)
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


def hashed(key: str) -> str:
    return "sha256:" + hashlib.sha256(key.encode()).hexdigest()


def test_named_and_hashed_keys_are_read_again(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# who\n\nalice={hashed('a secret')} priority=-2 max_requests=3\n{hashed('b')}\nplain key\n")
    keys = ApiKeys(("first",), file)
    unnamed = [f"key-{hashlib.sha256(key).hexdigest()[:8]}" for key in (b"first", b"b", b"plain key")]
    assert keys.names == [unnamed[0], "alice", *unnamed[1:]], "a name is the key's own, wherever it stands"
    assert keys.find("a secret") == ApiKey("alice", hashlib.sha256(b"a secret").digest(), -2, 3)
    for key in ("first", "b", "plain key"):
        assert keys.find(key) is not None
    for key in ("", "alice", hashed("b"), "a secret "):
        assert keys.find(key) is None
    file.write_text(f"bob={hashed('c')}\n")
    assert keys.find("c") is None
    keys.load()
    assert keys.names == [unnamed[0], "bob"]
    for wrong in ("", "#\n", "é\n", b"\xff\n"):
        file.write_bytes(wrong if isinstance(wrong, bytes) else wrong.encode())
        if wrong in ("", "#\n"):
            continue  # beside the first key
        with pytest.raises(FptqError):
            keys.load()
        assert keys.names == [unnamed[0], "bob"]
    file.write_text("# none\n")
    with pytest.raises(FptqError, match="has no key"):
        ApiKeys((), file)
    with pytest.raises(FptqError, match="there is no file"):
        ApiKeys((), tmp_path / "none")


@pytest.mark.parametrize(("entry", "message"), [
    ("alice={} prio=3", "prio is no option"),
    ("alice={} priority=high", "priority of a hashed key must be a whole number, not 'high'"),
    ("alice={} max_requests=0", "max_requests of a hashed key must be a whole number from 1"),
    ("alice={} max_requests=-3", "max_requests"),
    ("alice={} priority=1 priority=2", "given twice"),
    ("alice = {}", "without a space"),
    ("alice: {}", "NAME=sha256:"),
    ("alice=sha256:zz", "64 hexadecimal digits"),
    ("al ice={}", "NAME=sha256:"),
    ("alice={} and more", "and is no option"),
])
def test_a_hashed_key_that_is_misspelt_opens_nothing(tmp_path: Path, entry: str, message: str) -> None:
    """Were it taken for a key, whoever reads the file could come in."""
    file = tmp_path / "keys"
    file.write_text(f"bob={hashed('b')}\n")
    keys = ApiKeys((), file)
    file.write_text(f"bob={hashed('b')}\n# a comment\n{entry.format(hashed('a'))}\n")
    with pytest.raises(FptqError, match=f"keys, line 3: .*{message}"):
        keys.load()
    assert keys.names == ["bob"] and keys.find("b") is not None
    with pytest.raises(FptqError, match=message):
        ApiKeys((entry.format(hashed("a")),))


def test_a_hashed_key_may_be_in_capitals_and_have_a_comment(tmp_path: Path) -> None:
    keys = ApiKeys((f"alice={hashed('a').upper()} max_requests=2 priority=1 # theirs",))
    assert keys.find("a") == ApiKey("alice", hashlib.sha256(b"a").digest(), 1, 2)


def test_keys_have_limits_metrics_and_no_part_in_each_others_prompts(run_server: Callable[..., Any], tmp_path: Path
                                                                      ) -> None:
    file = tmp_path / "keys"
    file.write_text(f"alice={hashed('a')} max_requests=1\nbob={hashed('b')}\n")
    body = {"prompt": "Once upon a time, " * 20, "max_tokens": 2}
    with run_server(ServerConfig(api_keys=("admin",), api_keys_file=file)) as served:
        def post(key: str, **more: Any) -> httpx.Response:
            return httpx.post(served.url + "/v1/completions", json={**body, **more}, timeout=60,
                              headers={"Authorization": f"Bearer {key}"})

        def cached(key: str) -> int:
            return int(post(key).json()["usage"]["prompt_tokens_details"]["cached_tokens"])

        assert cached("a") == 0
        assert cached("a") > 0
        assert cached("b") == 0
        prompt_tokens = post("b").json()["usage"]["prompt_tokens"]
        assert metric(served, "fptq_key_requests_total", key="alice") == 2
        assert metric(served, "fptq_key_tokens_total", key="alice", kind="prompt") == 2 * prompt_tokens
        assert metric(served, "fptq_key_tokens_total", key="alice", kind="generated") == 4
        with served.http.stream("POST", "/v1/completions", headers={"Authorization": "Bearer a"},
                                json={**body, "max_tokens": 800, "n": 24, "ignore_eos": True, "stream": True}
                                ) as running:
            lines = running.iter_lines()  # dropped, it would end the request
            assert next(lines)
            refused = post("a")
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
            assert int(refused.headers["Retry-After"]) >= 1
            assert post("b").status_code == 200
        wait_until(lambda: post("a").status_code == 200)
        file.write_text(f"bob={hashed('b')}\n")
        served.app.state.reload()
        assert (post("a").status_code, post("b").status_code) == (401, 200)
