"""Load a server that speaks OpenAI's API and measure what its users would see.

    python benchmarks/load.py --model demo --concurrency 1 8 32

Prompts are random token ids, so that nothing is cached; output length is fixed with ignore_eos, so that servers are
compared at equal work. One JSON object per concurrency. The client shares the server's cores, so it reads the stream's
lines and parses nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from dataclasses import dataclass, field
from urllib.parse import urlsplit


@dataclass
class Request:
    """Seconds."""

    first_token: float = 0.0
    between_tokens: list[float] = field(default_factory=list)


async def send(url: str, headers: dict[str, str], body: dict[str, object]) -> Request:
    """Stream one completion over a connection of its own; a chunk is a token."""
    host, content = urlsplit(url), json.dumps(body).encode()
    fields = {"host": host.netloc, "content-type": "application/json", "content-length": str(len(content)),
              "connection": "close", **headers}
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    request = Request()
    last = started = time.perf_counter()
    reader, writer = await asyncio.open_connection(host.hostname, host.port or 80)
    writer.write(f"POST /v1/completions HTTP/1.1\r\n{head}\r\n".encode() + content)
    status = await reader.readline()
    if b" 200 " not in status:
        raise SystemExit(f"{status.decode().strip()}: {(await reader.read()).decode()}")
    async for line in reader:
        if not line.startswith(b"data: {") or b'"choices":[]' in line:
            continue
        now = time.perf_counter()
        if request.first_token:
            request.between_tokens.append(now - last)
        else:
            request.first_token = now - started
        last = now
    writer.close()
    return request


async def load(options: argparse.Namespace, concurrency: int) -> dict[str, float]:
    """Keep `concurrency` requests in flight until all have been sent."""
    generator = random.Random(concurrency)
    count = options.requests * concurrency
    bodies = iter([{
        "model": options.model, "prompt": generator.choices(range(options.vocab), k=options.prompt_tokens),
        "max_tokens": options.output_tokens, "ignore_eos": True, "temperature": 0, "stream": True,
    } for _ in range(count)])
    headers = {"Authorization": f"Bearer {options.api_key}"} if options.api_key else {}

    async def worker() -> list[Request]:
        return [await send(options.url, headers, body) for body in bodies]

    started = time.perf_counter()
    done = [request for part in await asyncio.gather(*(worker() for _ in range(concurrency))) for request in part]
    seconds = time.perf_counter() - started
    first = [1000 * request.first_token for request in done]
    between = [1000 * gap for request in done for gap in request.between_tokens]
    return {
        "concurrency": concurrency,
        "requests_per_second": count / seconds,
        "output_tokens_per_second": count * options.output_tokens / seconds,
        "ttft_ms_p50": statistics.median(first),
        "ttft_ms_p99": percentile(first, 99),
        "itl_ms_p50": statistics.median(between),
        "itl_ms_p99": percentile(between, 99),
    }


def percentile(values: list[float], percent: float) -> float:
    """The smallest value that is not exceeded by `percent` % of all."""
    return sorted(values)[min(len(values) - 1, int(len(values) * percent / 100))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--api-key")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--requests", type=int, default=4, help="per concurrent client")
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--vocab", type=int, default=4096, help="token ids are drawn below this")
    options = parser.parse_args()
    for concurrency in options.concurrency:
        result = asyncio.run(load(options, concurrency))
        print(json.dumps({key: round(value, 2) for key, value in result.items()}))


if __name__ == "__main__":
    main()
