"""Binding, the bounded header parser, and the drain of a real process."""

from __future__ import annotations

import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from fptq_server.config import ModelCard, ServerConfig
from fptq_server.main import AddressError, bind, describe, raise_open_files
from tests.server.conftest import Served, events, metric, wait_until


def test_port_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(AddressError, match=f"port {port} on 127.0.0.1 is already in use"):
            bind("127.0.0.1", port)


@pytest.mark.parametrize("host", ["203.0.113.1", "no such host", "é" * 100])
def test_not_our_address(host: str) -> None:
    with pytest.raises(AddressError, match="is not an address of this machine"):
        bind(host, 0)


def test_the_log_says_what_is_served() -> None:
    model = ModelCard("tales", 0, 1024, 4096, {"architecture": "A"},
                      {"kv_cache_memory": 3 << 29, "kv_cache_dtype": "int8"},
                      {"backend": "native", "isa": "avx2", "threads": "2", "attention": "paged"})
    for keys, access in (((), "no API key"), (("secret",), "API key required")):
        line = describe(model, ServerConfig(api_keys=keys))
        assert line.endswith("model tales (A), backend native, isa avx2, threads 2, context 1024 tokens, "
                             f"KV cache 1.5 GiB int8, {access}")
        assert "secret" not in line


@pytest.mark.parametrize("options", [{"port": -1}, {"port": 65536}, {"drain_timeout": -1.0},
                                     {"drain_timeout": float("nan")}, {"max_body_bytes": 0}], ids=str)
def test_config(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        ServerConfig(**options)


def test_headers_without_an_end(run_server: Callable[..., Any]) -> None:
    """The connection is closed long before memory is; a request with a large body is not."""
    with run_server(ServerConfig(max_header_bytes=10_000)) as served:
        with socket.create_connection(("127.0.0.1", served.port), 30) as connection:
            connection.sendall(b"GET /livez HTTP/1.1\r\nX-Long: ")
            with pytest.raises(OSError):
                connection.sendall(b"x" * 100_000_000)
        assert served.http.post("/tokenize", json={"prompt": "x" * 60_000}).status_code == 200
        assert served.http.get("/livez").status_code == 200


@pytest.mark.parametrize(("sent", "answer"), [
    (b"", b""), (b"GET /livez HTTP/1.1\r\nHost", b"HTTP/1.1 408 "), (b"\r\n", b""),
    (b"POST /nowhere HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nx", b"HTTP/1.1 404 "),
    (b"no HTTP\r\n\r\n", b"HTTP/1.1 400 "),
], ids=repr)
def test_connections_that_finish_no_request_are_closed(run_server: Callable[..., Any], sent: bytes, answer: bytes
                                                       ) -> None:
    with run_server(ServerConfig(head_timeout=0.3, body_timeout=0.3)) as served, \
            socket.create_connection(("127.0.0.1", served.port), 30) as connection:
        connection.sendall(sent)
        received = b"".join(iter(lambda: connection.recv(4096), b""))
        assert received[:len(answer) or None] == answer


def test_line_ends_between_requests_keep_no_connection(run_server: Callable[..., Any]) -> None:
    with run_server(ServerConfig(head_timeout=0.3)) as served, \
            socket.create_connection(("127.0.0.1", served.port), 30) as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
        assert connection.recv(4096).startswith(b"HTTP/1.1 200 ")
        connection.sendall(b"\r\n")
        assert connection.recv(4096) == b""


def test_an_answer_outlives_the_heads_deadline(run_server: Callable[..., Any]) -> None:
    """The beginning of a second request, sent meanwhile, does not cut it."""
    with run_server(ServerConfig(head_timeout=0.05)) as served:
        body = b'{"prompt": "x", "max_tokens": 300, "ignore_eos": true, "stream": true}'
        with socket.create_connection(("127.0.0.1", served.port), 30) as connection:
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                               b"Content-Length: %d\r\n\r\n%sGET /" % (len(body), body))
            received = b"".join(iter(lambda: connection.recv(65536), b""))
        assert b"data: [DONE]" in received


def test_what_is_no_http_names_its_peer(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    before = metric(served, "fptq_http_responses_total", route="other", status="4xx")
    with socket.create_connection(("127.0.0.1", served.port), 30) as connection:
        port = connection.getsockname()[1]
        connection.sendall(b"\x16\x03\x01")  # TLS
        assert connection.recv(4096).startswith(b"HTTP/1.1 400 ")
    assert f"127.0.0.1:{port} 400 not an HTTP request" in caplog.text
    assert metric(served, "fptq_http_responses_total", route="other", status="4xx") == before + 1


def test_open_files() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, before[1]), before[1]))
        raise_open_files()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (before[1], before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize("keys", [(), ("secret",)])
def test_documentation_is_offered_where_it_opens(run_server: Callable[..., Any], caplog: pytest.LogCaptureFixture,
                                                 keys: tuple[str, ...]) -> None:
    caplog.set_level("INFO", "fptq.server")
    with run_server(ServerConfig(api_keys=keys)):
        assert "OpenAI API under /v1" in caplog.text
        assert ("/docs" in caplog.text) is (not keys)


def test_a_native_server_needs_neither_torch_nor_transformers(model_path: Path) -> None:
    """Nor a hub client: each would take longer to import than a small model to load. Up to the open port, and through a
    request."""
    program = f"""
import sys
import fptq_server.main
from fptq_runtime import cli, load
fptq_server.main.Server.run = lambda self, sockets: None
try:
    cli.main(["serve", {str(model_path)!r}, "--port", "0", "--backend", "native"])
except SystemExit as exit:
    assert not exit.code
load({str(model_path)!r}, backend="native").generate(["Once upon a time"])
print([name for name in ("torch", "transformers", "huggingface_hub") if name in sys.modules])
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert run.stdout == "[]\n", run.stderr


@contextmanager
def serving(model_path: Path, drain_timeout: float) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server process on a free port, and its URL."""
    program = ("from fptq_server.config import ServerConfig\nfrom fptq_server.main import serve\n"
               f"serve({str(model_path)!r}, ServerConfig(port=0, drain_timeout={drain_timeout}), model_id='demo')\n")
    process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        url = ""
        for line in process.stderr:
            if "serving on " in line:
                url = line.split("serving on ")[1].split()[0]
                break
        assert url, "the server did not start"
        yield process, url
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def stream(url: str, max_tokens: int) -> list[dict[str, Any]]:
    body = {"prompt": "Once upon a time", "max_tokens": max_tokens, "ignore_eos": True, "stream": True}
    return events(httpx.post(url + "/v1/completions", json=body, timeout=120).text)


def running(url: str) -> bool:
    return "fptq_requests_running 2.0" in httpx.get(url + "/metrics").text


def test_sigterm_lets_running_requests_end(model_path: Path) -> None:
    with serving(model_path, drain_timeout=120) as (process, url), ThreadPoolExecutor(2) as pool:
        streams = [pool.submit(stream, url, 1000) for _ in range(2)]
        wait_until(lambda: running(url))
        process.send_signal(signal.SIGTERM)

        def refused() -> bool:
            if all(future.done() for future in streams):
                return True  # too quick a machine to see it
            response = httpx.post(url + "/v1/completions", json={"prompt": "x", "max_tokens": 1})
            assert response.status_code in (200, 503)
            if response.status_code == 503:
                assert int(response.headers["Retry-After"]) >= 1
                assert response.json()["error"]["code"] == "draining"
                assert httpx.get(url + "/readyz").status_code == 503
                assert httpx.get(url + "/livez").status_code == 200
            return response.status_code == 503

        wait_until(refused)
        assert [len(future.result()) for future in streams] == [1000, 1000]
        assert streams[0].result()[-1]["choices"][0]["finish_reason"] == "length"
        assert process.wait(60) == 0


@pytest.mark.parametrize(("drain_timeout", "signals"), [(0.2, 1), (120.0, 2)], ids=["timeout", "second signal"])
def test_the_rest_is_aborted(model_path: Path, drain_timeout: float, signals: int) -> None:
    """After the drain's time, or at once when told twice; the clients learn it from an event."""
    with serving(model_path, drain_timeout) as (process, url), ThreadPoolExecutor(2) as pool:
        streams = [pool.submit(stream, url, 1000) for _ in range(2)]
        wait_until(lambda: running(url))
        process.send_signal(signal.SIGTERM)
        if signals == 2:
            wait_until(lambda: httpx.get(url + "/readyz").status_code == 503)
            process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        for future in streams:
            chunks = future.result()
            assert chunks[-1].get("error", {}).get("code") == "aborted" or len(chunks) == 1000
        assert process.stderr is not None
        last = process.stderr.read().splitlines()[-1]
        aborted = sum("error" in future.result()[-1] for future in streams)
        assert last.endswith(f"INFO stopped ({'SIGTERM' if signals == 1 else 'SIGINT'}, {aborted} aborted)")
