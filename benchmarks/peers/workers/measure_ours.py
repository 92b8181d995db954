"""Measures one of our shapes: python -m benchmarks.peers.workers.measure_ours SHAPE THREADS.

Rows come as JSON lines on stdin.
"""

from __future__ import annotations

import json
import random
import sys
import time
from typing import Any

from benchmarks.peers.base import STEPS
from fptq_runtime.engine.engine import Engine
from fptq_runtime.engine.request import SamplingParams
from fptq_runtime.kernels.select import select_backend
from fptq_runtime.measure.bench import Row, bench_config, measure, shape_engine
from fptq_runtime.measure.shapes import SHAPES

LARGEST = {"llama-2-7b": (Row(8, 512), Row(1, 2048))}
LARGEST_OF_SMALL = (Row(32, 512), Row(8, 2048))


def main() -> None:
    shape, threads = sys.argv[1], int(sys.argv[2])
    backend = select_backend("native", threads)
    config = bench_config(SHAPES[shape].config, LARGEST.get(shape, LARGEST_OF_SMALL), STEPS, backend)
    engine = shape_engine(shape, 4, backend, config)
    measure(engine, Row(1, 512), steps=1, seconds=0)  # warms up
    print(json.dumps({"ready": engine.backend.describe()["isa"]}), flush=True)
    for line in sys.stdin:
        question = json.loads(line)
        if "clients" in question:
            rate = without_http(engine, **question)
        else:
            row = Row(question["batch"], question["context"])
            [steps] = measure(engine, row, [question["phase"]], steps=question["steps"])
            rate = steps.tokens / steps.total_seconds
        print(json.dumps({"tokens_per_s": rate}), flush=True)


def without_http(engine: Engine[Any], clients: int, prompt_tokens: int, output_tokens: int) -> float:
    generator = random.Random(clients)
    params = SamplingParams(temperature=0, max_tokens=output_tokens, ignore_eos=True)
    started = time.perf_counter()
    for index in range(clients):
        engine.add_request(str(index), generator.choices(range(engine.model_config.vocab_size), k=prompt_tokens),
                           params)
    while engine.has_unfinished_requests:
        engine.step()
    return clients * output_tokens / (time.perf_counter() - started)


if __name__ == "__main__":
    main()
