"""Clients that behave badly; whoever comes after them is served."""

from __future__ import annotations

import json
import os
import random
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import psutil

from fptq_server.config import ServerConfig
from tests.server.conftest import Served, wait_until

DROPS = int(os.environ.get("FPTQ_CHAOS_DROPS", 200))


def request(body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    return (b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: "
            + str(len(data)).encode() + b"\r\n\r\n" + data)


def is_idle(served: Served) -> bool:
    return not served.engine.engine.has_unfinished_requests


def test_connections_that_drop_anywhere_leave_nothing_behind(served: Served) -> None:
    place = random.Random(0)
    whole = request({"prompt": "Once upon a time", "max_tokens": 400, "ignore_eos": True, "stream": True})
    before = psutil.Process().num_fds()
    for _ in range(DROPS):
        with socket.create_connection(("127.0.0.1", served.port)) as connection:
            connection.sendall(whole[: place.randrange(len(whole) + 1)] if place.random() < 0.7 else whole)
            if place.random() < 0.3:
                connection.shutdown(socket.SHUT_WR)  # half open
            if place.random() < 0.3:
                connection.settimeout(0.02)
                with suppress(TimeoutError):
                    connection.recv(place.choice((1, 100)))
    wait_until(lambda: is_idle(served))
    assert served.engine.engine._scheduler.blocks.usage == 0
    assert served.http.post("/v1/completions", json={"prompt": "x", "max_tokens": 2}).status_code == 200
    wait_until(lambda: psutil.Process().num_fds() <= before + 2)


def test_a_client_that_never_reads_is_given_up(run_server: Callable[..., Any]) -> None:
    """Its answer is larger than what the system's buffers take."""
    body = {"prompt": [[7] * 900] * 24, "max_tokens": 1, "echo": True, "logprobs": 20}
    with run_server(ServerConfig(write_timeout=0.3)) as served, socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect(("127.0.0.1", served.port))
        deaf.sendall(request(body))
        mine = deaf.getsockname()[1]
        process = psutil.Process()

        def is_connected() -> bool:
            return any(each.raddr and each.raddr.port == mine and each.laddr.port == served.port
                       and each.status == psutil.CONN_ESTABLISHED for each in process.net_connections())

        assert is_connected()
        wait_until(lambda: not is_connected())
        assert is_idle(served)
        assert served.http.get("/livez").status_code == 200
