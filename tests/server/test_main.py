"""Binding, the bounded header parser, and the drain of a real process."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from fptq_runtime.errors import FptqError
from fptq_server.config import ModelCard, ServerConfig
from fptq_server.main import AddressError, bind, bind_unix, describe, listen, raise_open_files, serve_several
from tests.server.conftest import Served, events, metric, wait_until


def test_port_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(AddressError, match=f"port {port} on 127.0.0.1 is already in use"):
            bind("127.0.0.1", port)


def test_an_admin_port_in_use(model_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, socket.socket() as listener:
        config = ServerConfig(admin_port=taken.getsockname()[1], admin_key="k")
        with pytest.raises(AddressError, match="choose another --admin-port"):
            serve_several([(["demo"], model_path)], config, listener, None)


@pytest.mark.parametrize("host", ["203.0.113.1", "no such host", "é" * 100])
def test_not_our_address(host: str) -> None:
    with pytest.raises(AddressError, match="is not an address of this machine"):
        bind(host, 0)


@pytest.mark.parametrize("abstract", [False, True])
def test_systemd_hears_when_it_serves_and_when_it_stops(model_path: Path, tmp_path: Path, abstract: bool) -> None:
    """By sd_notify(3)."""
    address = f"fptq-{tmp_path}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(f"\0{address}" if abstract else address)
        manager.settimeout(60)
        environment = {**os.environ, "NOTIFY_SOCKET": f"@{address}" if abstract else address}
        with subprocess.Popen([sys.executable, "-m", "fptq_runtime.cli", "serve", model_path, "--port", "0"],
                              env=environment, stderr=subprocess.PIPE, text=True) as process:
            assert manager.recv(100) == b"READY=1"
            process.send_signal(signal.SIGTERM)
            assert manager.recv(100) == b"STOPPING=1"
            _, log = process.communicate()
    assert "serving on" in log and process.returncode == 0


def test_the_log_says_what_is_served() -> None:
    model = ModelCard("tales", 0, 1024, 4096, {"architecture": "A"},
                      {"kv_cache_memory": 3 << 29, "kv_cache_dtype": "int8", "num_blocks": 100, "block_size": 32},
                      {"backend": "native", "isa": "avx2", "threads": "2", "attention": "paged"})
    for keys, access in (((), "no API key"), (("secret",), "API key required")):
        line = describe(model, ServerConfig(api_keys=keys))
        assert line.endswith("model tales (A), backend native, isa avx2, threads 2, context 1024 tokens, "
                             f"KV cache 1.5 GiB int8 that fits 3 sequences of that length, {access}")
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
        while connection.recv(4096):  # what is left of the answer, then the end; a timeout where it is kept
            pass


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
def serving(model_path: Path, drain_timeout: float, address: str = "port=0"
            ) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server process on a free port, and its URL."""
    program = ("from fptq_server.config import ServerConfig\nfrom fptq_server.main import serve\n"
               f"serve({str(model_path)!r}, ServerConfig({address}, drain_timeout={drain_timeout}), "
               "model_names=['demo'])\n")
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


def test_sighup_waits_for_the_server(model_path: Path) -> None:
    """Sent before anything was loaded, it is remembered; a manager that reloads early ends nothing."""
    program = f"""
import os, signal
from fptq_runtime import cli, locate
find_model = locate.find_model
def hang_up(name, **words):
    os.kill(os.getpid(), signal.SIGHUP)
    return find_model(name, **words)
locate.find_model = hang_up
cli.main(["serve", {str(model_path)!r}, "--port", "0"])
"""
    with subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        log = ""
        for line in process.stderr:
            log += line
            if "TLS files were read again" in line:
                process.send_signal(signal.SIGHUP)  # the next one comes at once
                break
        assert "read again" in next(process.stderr) + next(process.stderr), log
        process.send_signal(signal.SIGTERM)
        process.communicate()
    assert process.returncode == 0


BODY = b'{"prompt": "The old king", "max_tokens": 4}'
POST = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
JDK = (b"Connection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA\r\n"
       b"Upgrade: h2c\r\n")  # what Java's own client sends


def answers(port: int, sent: bytes, number: int, pause_after: int | None = None) -> list[bytes]:
    """The status lines of what one connection answers. pause_after: bytes after which the rest comes a little later."""
    with socket.create_connection(("127.0.0.1", port), 30) as connection:
        connection.sendall(sent[:pause_after])
        if pause_after is not None:
            time.sleep(0.05)
            connection.sendall(sent[pause_after:])
        received = b""
        while received.count(b"HTTP/1.1 ") < number:
            received += connection.recv(65536)
    return re.findall(rb"HTTP/1.1 (\d+)", received)


@pytest.mark.parametrize("upgrade", [JDK, b"Upgrade: websocket\r\nConnection: keep-alive, Upgrade\r\n",
                                     b"Connection: upgrade\r\nUpgrade: a\r\nUpgrade: b\r\n"], ids=repr)
def test_an_upgrade_loses_no_body(served: Served, upgrade: bytes) -> None:
    """However it is cut on its way, with Content-Length or chunks, and with a request behind it."""
    length = POST + upgrade + b"Content-Length: %d\r\n\r\n%s" % (len(BODY), BODY)
    chunked = POST + upgrade + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)
    for request in (length, chunked):
        for cut in (None, 10, len(POST) + 5, request.index(b"\r\n\r\n") + 2, request.index(b"\r\n\r\n") + 4,
                    len(request) - 3):
            assert answers(served.port, request * 2 + b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n", 3, cut) == [b"200"] * 3
    assert answers(served.port, b"GET /livez HTTP/1.1\r\nHost: x\r\n" + upgrade + b"\r\n", 1) == [b"200"]


def test_many_upgrades_at_once(served: Served) -> None:
    request = b"GET /livez HTTP/1.1\r\nHost: x\r\n" + JDK + b"\r\n"
    assert answers(served.port, request * 1500, 1500) == [b"200"] * 1500


@pytest.mark.parametrize("target", [b"CONNECT example.com:443", b"OPTIONS *", b"GET http://x/nowhere", b"GET //v1",
                                    b"POST /v1/"])
def test_targets_that_are_no_endpoint(served: Served, target: bytes) -> None:
    with socket.create_connection(("127.0.0.1", served.port), 30) as connection:
        connection.sendall(target + b" HTTP/1.1\r\nHost: x\r\n\r\n")
        assert connection.recv(4096).startswith(b"HTTP/1.1 4")
    assert served.http.get("/livez").status_code == 200


@pytest.mark.parametrize("stream", [b"true", b"false"])
def test_http_1_0(served: Served, stream: bytes) -> None:
    """It knows no chunks: what comes is the body, up to the end of the connection."""
    body = b'{"prompt": "The old king", "max_tokens": 4, "ignore_eos": true, "stream": %s}' % stream
    with socket.create_connection(("127.0.0.1", served.port), 30) as connection:
        connection.sendall(POST.replace(b"1.1", b"1.0") + b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
        head, _, answer = b"".join(iter(lambda: connection.recv(65536), b"")).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ")
    assert b"transfer-encoding" not in head.lower()
    assert b"connection: close" in head.lower()
    if stream == b"true":
        assert answer.startswith(b"data: {")
        assert answer.endswith(b"data: [DONE]\n\n")
        assert len(events(answer.decode())) == 4
    else:
        assert json.loads(answer)["usage"]["completion_tokens"] == 4


def test_unix_socket(model_path: Path, tmp_path: Path) -> None:
    """In place of a file that a server which was killed left; afterwards there is none."""
    path = tmp_path / "fptq.sock"
    bind_unix(str(path)).close()
    assert path.is_socket()
    with serving(model_path, 1, f"uds={str(path)!r}") as (process, url):
        assert url == f"unix:{path}"
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://localhost") as http:
            assert http.post("/v1/completions", json={"prompt": "x", "max_tokens": 1}).status_code == 200
        with pytest.raises(AddressError, match="already in use"):
            bind_unix(str(path))
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    assert not path.exists()


def test_what_is_no_unix_socket(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, why in (("file", "exists and is no socket"), ("none/x.sock", "No such file"), ("x" * 120, "too long")):
        with pytest.raises(AddressError, match=why):
            bind_unix(str(tmp_path / path))
    assert (tmp_path / "file").is_file()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A self-signed certificate of localhost and its key."""
    if (openssl := shutil.which("openssl")) is None:
        pytest.skip("openssl is not installed")
    path = tmp_path_factory.mktemp("tls")
    subprocess.run([openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
                    "-keyout", path / "key.pem", "-out", path / "cert.pem", "-days", "2", "-subj", "/CN=localhost",
                    "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"], check=True, capture_output=True)
    return path / "cert.pem", path / "key.pem"


def test_tls(run_server: Callable[..., Any], certificate: tuple[Path, Path], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "fptq.server")
    cert, key = map(str, certificate)
    with run_server(ServerConfig(ssl_certfile=cert, ssl_keyfile=key)) as served:
        assert f"serving on https://127.0.0.1:{served.port}" in caplog.text
        trusted = ssl.create_default_context(cafile=cert)
        with httpx.Client(verify=trusted, base_url=f"https://127.0.0.1:{served.port}") as http:
            body = {"prompt": "x", "max_tokens": 3, "stream": True}
            assert len(events(http.post("/v1/completions", json=body).text)) == 3
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"http://127.0.0.1:{served.port}/livez")


def test_unusable_tls_files_are_named(certificate: tuple[Path, Path], tmp_path: Path) -> None:
    cert, key = map(str, certificate)
    (tmp_path / "nonsense").write_text("nonsense")
    for files in ((str(tmp_path / "none"), key), (cert, str(tmp_path / "nonsense")), (cert, None), (key, cert)):
        with pytest.raises(FptqError, match=r"ssl_certfile .* cannot be used: ."):
            listen(ServerConfig(port=0, ssl_certfile=files[0], ssl_keyfile=files[1]))
    with pytest.raises(FptqError, match="ssl_keyfile needs ssl_certfile"):
        ServerConfig(ssl_keyfile=key)
