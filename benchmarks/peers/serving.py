"""Our server against llama-server: streaming clients that start at once, each with a prompt of its own."""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.load import load
from benchmarks.peers.base import resident_mib

PROMPT_TOKENS, OUTPUT_TOKENS = 128, 64
CONTEXT = 256
VOCAB = 32000  # ids are drawn below it


@dataclass(frozen=True)
class Served:
    """start_s: from exec to the first 200 of the readiness probe. resident_mib: when the last client was done."""

    output_tokens_per_s: float
    ttft_ms_p50: float
    start_s: float
    resident_mib: float


def serve_and_load(command: Sequence[str], port: int, probe: str, model: str, clients: int) -> Served:
    """A fresh server, so that nothing is cached; one short request before, for what is allocated when first used."""
    started = time.perf_counter()
    with subprocess.Popen(command, env=os.environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            url = f"http://127.0.0.1:{port}"
            while not _ready(url + probe):
                if process.poll() is not None:
                    raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
                time.sleep(0.005)
            seconds = time.perf_counter() - started
            options = argparse.Namespace(url=url, model=model, api_key=None, requests=1, prompt_tokens=16,
                                         output_tokens=4, vocab=VOCAB)
            asyncio.run(load(options, 1))
            options.prompt_tokens, options.output_tokens = PROMPT_TOKENS, OUTPUT_TOKENS
            result = asyncio.run(load(options, clients))
            return Served(result["output_tokens_per_second"], result["ttft_ms_p50"], seconds,
                          resident_mib(process.pid))
        finally:
            process.kill()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def _ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=1) as response:
            return bool(response.status == 200)
    except OSError:
        return False
