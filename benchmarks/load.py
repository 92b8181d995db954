"""Load a server that speaks OpenAI's API and measure what its users would see.

    python benchmarks/load.py --model demo --concurrency 1 8 32

Prompts are random token ids, so that nothing is cached; output length is fixed with ignore_eos, so that servers are
compared at equal work. One JSON object per concurrency.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from dataclasses import dataclass, field

import httpx


@dataclass
class Request:
    """Seconds."""

    first_token: float = 0.0
    between_tokens: list[float] = field(default_factory=list)


async def send(client: httpx.AsyncClient, body: dict[str, object]) -> Request:
    """Stream one completion; a chunk is a token."""
    request = Request()
    last = started = time.perf_counter()
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            raise SystemExit(f"{response.status_code}: {(await response.aread()).decode()}")
        async for line in response.aiter_lines():
            if not line.startswith("data: {") or not json.loads(line[6:])["choices"]:
                continue
            now = time.perf_counter()
            if request.first_token:
                request.between_tokens.append(now - last)
            else:
                request.first_token = now - started
            last = now
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
    async with httpx.AsyncClient(base_url=options.url, headers=headers, timeout=600) as client:

        async def worker() -> list[Request]:
            return [await send(client, body) for body in bodies]

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
