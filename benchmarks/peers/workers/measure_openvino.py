"""Measures one OpenVINO model: python measure_openvino.py MODEL THREADS, rows as JSON lines on stdin."""

from __future__ import annotations

import json
import random
import statistics
import sys
import time
from typing import Any

import numpy as np
import openvino
import openvino_genai as genai

VOCAB = 32000  # ids are drawn below it
CACHE_GIB = 2
TOKENS_PER_STEP = 512


def main() -> None:
    model, threads = sys.argv[1], int(sys.argv[2])
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size = CACHE_GIB
    scheduler.enable_prefix_caching = False
    scheduler.max_num_batched_tokens = TOKENS_PER_STEP
    scheduler.max_num_seqs = 64
    pipeline = genai.ContinuousBatchingPipeline(model, scheduler, "CPU", {
        "INFERENCE_NUM_THREADS": threads, "DYNAMIC_QUANTIZATION_GROUP_SIZE": "128",
    })
    measure(pipeline, "decode", 1, 512, 4)  # warms up
    print(json.dumps({"ready": genai.__version__}), flush=True)
    for line in sys.stdin:
        row = json.loads(line)
        rates = [measure(pipeline, row["phase"], row["batch"], row["context"], row["steps"])
                 for _ in range(3 if row["batch"] * row["context"] <= 1024 else 1)]
        print(json.dumps({"tokens_per_s": statistics.median(rates)}), flush=True)


def measure(pipeline: Any, phase: str, batch: int, context: int, steps: int) -> float:
    """Prompt tokens per second until every sequence has its first token, or tokens per second of the `steps` steps
    with all of them that follow, by the median step."""
    last = steps + batch + batch * context // (TOKENS_PER_STEP - batch) + 2
    config = genai.GenerationConfig(max_new_tokens=last, ignore_eos=True)
    generator = random.Random(batch * context)
    handles = []
    started = time.perf_counter()
    for index in range(batch):
        ids = np.array([generator.choices(range(2, VOCAB), k=context)], np.int64)
        handles.append(pipeline.add_request(index, openvino.Tensor(ids), config))
    waiting = set(range(batch))
    while waiting:
        pipeline.step()
        waiting -= {index for index in waiting if handles[index].can_read()}
    rate = batch * context / (time.perf_counter() - started)
    if phase == "decode":
        seconds = []
        for _ in range(steps):
            started = time.perf_counter()
            pipeline.step()
            seconds.append(time.perf_counter() - started)
        rate = batch / statistics.median(seconds)
    for handle in handles:
        handle.stop()
    while pipeline.has_non_finished_requests():
        pipeline.step()
    return rate


if __name__ == "__main__":
    main()
