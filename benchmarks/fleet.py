"""Whether `fptq plan` is right: what it predicts for two replicas beside what two servers do.

    python -m benchmarks.fleet ARTIFACT TRACE [--shrink 8] [--load 1.0] [--seconds 60] [--out OUT.json]

Measures the profile with two `fptq bench` at once, each on one thread, since that is how the replicas will run; starts
two `fptq serve` on one thread each; measures what a token takes there beside its step, with streams that are as many at
both; and sends them the first --seconds of the trace in turn, with prompts of random tokens and every length divided by
--shrink, from this process. Then simulates the same requests. It all runs on one machine, so that two cores are needed,
and a third for the client would do no harm.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.load import Request, send
from fptq_runtime.measure.plan import Arrival, Objective, Simulator, StepCost, read_trace

COMMAND = [sys.executable, "-m", "fptq_runtime.cli"]
REPLICAS = 2
STREAMS, STREAMED = 16, 128  # at each replica at once, and tokens of each
PERCENTILES: dict[str, Objective] = {
    f"{metric}_p{percent}": Objective(metric, percent, 1e9)
    for metric in ("ttft", "itl") for percent in (50, 99)}


def profile(artifact: str) -> dict[str, Any]:
    """Of one replica while the others are as busy: each row's mean rate."""
    command = [*COMMAND, "bench", artifact, "--threads", "1", "--seconds", "0.5", "--json"]
    for option, values in (("--batch", (1, 4, 16)), ("--context", (16, 128, 512))):
        command += [word for value in values for word in (option, str(value))]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) for _ in range(REPLICAS)]
    profiles = [json.loads(process.communicate()[0]) for process in running]
    rows = [{**same[0], "tokens_per_s": statistics.harmonic_mean([row["tokens_per_s"] for row in same])}
            for same in zip(*(one["results"] for one in profiles), strict=True)]
    return {**profiles[0], "results": rows}


def serve(artifact: str) -> tuple[subprocess.Popen[bytes], str]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [*COMMAND, "serve", artifact, "--served-model-name", "model", "--port", str(port), "--threads", "1",
         "--no-speculation", "--max-wait", "3600"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return process, f"http://127.0.0.1:{port}"


def wait_until_ready(url: str) -> None:
    for _ in range(600):
        try:
            with urllib.request.urlopen(f"{url}/readyz", timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    raise SystemExit(f"{url} is not ready")


async def replay(urls: list[str], trace: list[Arrival], vocab: int) -> tuple[list[Request], float]:
    """Seconds: from the first request to the last token."""
    generator = random.Random(0)
    started = time.monotonic()

    async def one(number: int, arrival: Arrival) -> Request:
        body = {"model": "model", "prompt": generator.choices(range(8, vocab), k=arrival.prompt_tokens), "stream": True,
                "max_tokens": arrival.output_tokens, "ignore_eos": True, "temperature": 0}
        await asyncio.sleep(started + arrival.seconds - time.monotonic())
        return await send(urls[(number + 1) % len(urls)], {}, body)

    done = await asyncio.gather(*(one(number, arrival) for number, arrival in enumerate(trace)))
    return done, time.monotonic() - started


def delivery(urls: list[str], measured: dict[str, Any], vocab: int) -> float:
    """Seconds that a token takes beside its step: of streams that decode together, the median gap less the step."""
    together = [Arrival(0.0, 16, STREAMED)] * (STREAMS * REPLICAS)
    done, _ = asyncio.run(replay(urls, together, vocab))
    gap = statistics.median(gap for each in done for gap in each.between_tokens)
    cost = StepCost.fit(measured)
    step = float(np.interp(STREAMS, cost.rows, cost.seconds)) + cost.answer_pair * STREAMS * (16 + STREAMED / 2)
    return max(0.0, gap - step) / STREAMS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact")
    parser.add_argument("trace", type=Path)
    parser.add_argument("--profile", type=Path, help="what was measured before, instead of measuring it")
    parser.add_argument("--shrink", type=int, default=8, help="divides the trace's lengths")
    parser.add_argument("--load", type=float, default=1.0, help="times the trace's pace")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    shorter = [Arrival(each.seconds / options.load, max(1, each.prompt_tokens // options.shrink),
                       max(2, each.output_tokens // options.shrink)) for each in read_trace(options.trace)]
    trace = [each for each in shorter if each.seconds < options.seconds]
    measured = json.loads(options.profile.read_text()) if options.profile else profile(options.artifact)
    servers = [serve(options.artifact) for _ in range(REPLICAS)]
    try:
        urls = [url for _, url in servers]
        for url in urls:
            wait_until_ready(url)
        busy_before, started = os.getloadavg()[0], time.monotonic()
        asyncio.run(replay(urls, trace[:REPLICAS], options.vocab))  # warms up
        beside = delivery(urls, measured, options.vocab)
        done, seconds = asyncio.run(replay(urls, trace, options.vocab))
        real = {"tokens_per_s": sum(each.output_tokens for each in trace) / seconds}
        seen = {"ttft": [each.first_token for each in done],
                "itl": [gap for each in done for gap in each.between_tokens]}
        real |= {name: float(np.percentile(seen[each.metric], each.percent)) for name, each in PERCENTILES.items()}
        print(f"replayed in {time.monotonic() - started:.0f} s", file=sys.stderr)
    finally:
        for process, _ in servers:
            process.send_signal(signal.SIGTERM)
        for process, _ in servers:
            process.wait(60)
    simulator = Simulator(measured, trace, list(PERCENTILES.values()), delivery=beside)
    outcome = simulator.run(REPLICAS, "round-robin")
    said = {"tokens_per_s": outcome.tokens_per_s, **outcome.percentiles}
    result = {"artifact": Path(options.artifact).name, "machine": measured["machine"], "shrink": options.shrink,
              "load": options.load, "requests": len(trace), "load_average": [busy_before, os.getloadavg()[0]],
              "delivery": beside, "measured": real, "predicted": said,
              "ratio": {name: said[name] / real[name] for name in real}, "profile": measured}
    print(f"a token takes {1000 * beside:.2f} ms beside its step")
    for name in real:
        print(f"{name:>12}  measured {real[name]:8.3f}  predicted {said[name]:8.3f}  "
              f"{said[name] / real[name] - 1:+.0%}")
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
