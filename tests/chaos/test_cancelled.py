"""Requests that nobody waits for any more, at any moment of their lives. FPTQ_CHAOS_CANCELLED says how many."""

from __future__ import annotations

import asyncio
import json
import os
import random
import socket
import struct
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import psutil
import pytest

from tests.chaos.test_server import is_idle
from tests.server.conftest import Served, wait_until

CANCELLED = int(os.environ.get("FPTQ_CHAOS_CANCELLED", 300))
CLIENTS = 24
WAYS = ("close", "close", "reset", "shutdown", "body", "deadline", "timeout", "stop", "end")
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: what closes sends RST


def body_of(place: random.Random) -> tuple[str, dict[str, Any]]:
    """A route and what it is asked: long answers, so that few end before their clients go."""
    words = " ".join(place.choice(("once", "upon", "a", "time")) for _ in range(place.choice((1, 9, 60))))
    text = place.choice(("", "There was a king who had three sons. " * 4)) + words
    size, stream = place.choice((1, 30, 150)), place.random() < 0.5
    messages = [{"role": "user", "content": text}]
    match place.randrange(6):
        case 0:
            return "/v1/chat/completions", {"messages": messages, "max_tokens": size, "stream": stream}
        case 1:
            return "/v1/messages", {"model": "demo", "messages": messages, "max_tokens": size, "stream": stream}
        case 2:
            return "/v1/responses", {"input": text, "max_output_tokens": size, "stream": stream}
        case 3:
            return "/v1/embeddings", {"input": [text, words]}
        case 4:
            return "/v1/completions", {"prompt": [text, words], "max_tokens": size, "stream": stream, "echo": True,
                                       "logprobs": 2, "ignore_eos": True}
    return "/v1/completions", {"prompt": text, "max_tokens": size, "stream": stream, "n": place.choice((1, 1, 3)),
                               **place.choice(({}, {"guided_regex": "[a-z ]+"}, {"ignore_eos": True}))}


async def cancel(place: random.Random, port: int) -> str:
    """One request, and its way to end."""
    way = place.choice(WAYS)
    path, body = body_of(place)
    if way == "stop" and path in ("/v1/completions", "/v1/chat/completions"):
        body["stop"] = ["e", "the"]
    data = json.dumps(body).encode()
    deadline = f"X-Max-Wait: {place.choice((0.001, 0.05))}\r\n" if way == "deadline" else ""
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\n{deadline}Content-Type: application/json\r\n" \
           f"Content-Length: {len(data)}\r\nConnection: close\r\n\r\n"
    whole = head.encode() + data
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(whole[: place.randrange(len(whole))] if way == "body" else whole)
        with suppress(ConnectionError, asyncio.TimeoutError):
            await writer.drain()
            if way in ("stop", "end", "deadline"):
                await reader.read()
            elif way == "timeout":
                await asyncio.wait_for(reader.read(), place.choice((0.01, 0.1, 0.5)))
            elif place.random() < 0.5:
                await asyncio.wait_for(reader.read(place.choice((1, 300, 3000))), 1)
            else:
                await asyncio.sleep(place.choice((0, 0, 0.001, 0.02, 0.2)))
            if way == "shutdown":
                writer.write_eof()
                await asyncio.sleep(place.choice((0, 0.01)))
        if way == "reset":
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    finally:
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()
    return way


async def cancel_all(port: int, count: int, seed: int) -> Counter[str]:
    place = random.Random(seed)
    ways: Counter[str] = Counter()
    left = iter([random.Random(place.getrandbits(64)) for _ in range(count)])

    async def client() -> None:
        for own in left:
            ways[await cancel(own, port)] += 1

    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return ways


@pytest.mark.timeout(7200)
def test_every_block_comes_back(run_server: Callable[..., Any]) -> None:
    """With a cache so small that they push each other out, and a queue that refuses some."""
    ask = {"prompt": "Once upon a time", "max_tokens": 40, "temperature": 0, "seed": 1, "ignore_eos": True}
    served: Served
    with run_server(max_model_len=512, max_num_seqs=8, kv_cache_memory=4 << 20) as served:
        answer = served.http.post("/v1/completions", json=ask).json()["choices"]
        before = psutil.Process().num_fds()
        ways = asyncio.run(cancel_all(served.port, CANCELLED, 0))
        assert ways.total() == CANCELLED
        assert set(ways) == set(WAYS)
        wait_until(lambda: is_idle(served))
        engine = served.engine.engine
        engine.check_integrity()
        assert engine._scheduler.blocks.usage == 0
        wait_until(lambda: not served.engine._streams)
        wait_until(lambda: psutil.Process().num_fds() <= before + 2)
        again = served.http.post("/v1/completions", json=ask)
        assert again.json()["choices"] == answer, "as before"
        assert served.engine.error is None
