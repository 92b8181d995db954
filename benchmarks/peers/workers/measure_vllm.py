"""Measures one model in vLLM: python measure_vllm.py MODEL, rows as JSON lines on stdin."""

from __future__ import annotations

import json
import random
import statistics
import sys
import time
from typing import Any

import vllm

VOCAB = 32000  # ids are drawn below it
LONGEST = 4096
TOKENS_PER_STEP = 512


def main() -> None:
    llm = vllm.LLM(sys.argv[1], max_model_len=LONGEST, max_num_seqs=32, max_num_batched_tokens=TOKENS_PER_STEP,
                   enable_prefix_caching=False, skip_tokenizer_init=True, dtype="bfloat16")
    measure(llm.llm_engine, "decode", 1, 512, 4)  # warms up
    print(json.dumps({"ready": vllm.__version__}), flush=True)
    for line in sys.stdin:
        row = json.loads(line)
        rates = [measure(llm.llm_engine, row["phase"], row["batch"], row["context"], row["steps"])
                 for _ in range(3 if row["batch"] * row["context"] <= 1024 else 1)]
        print(json.dumps({"tokens_per_s": statistics.median(rates)}), flush=True)


def measure(engine: Any, phase: str, batch: int, context: int, steps: int) -> float:
    """Prompt tokens per second until every sequence has its first token, or tokens per second of the `steps` steps
    with all of them that follow."""
    last = steps + batch + batch * context // (TOKENS_PER_STEP - batch) + 2
    params = vllm.SamplingParams(temperature=0, max_tokens=last, ignore_eos=True, detokenize=False)
    generator = random.Random(batch * context)
    names = [f"{time.monotonic()} {index}" for index in range(batch)]
    started = time.perf_counter()
    for name in names:
        engine.add_request(name, {"prompt_token_ids": generator.choices(range(2, VOCAB), k=context)}, params)
    waiting = set(names)
    while waiting:
        waiting -= {output.request_id for output in engine.step() if output.outputs[0].token_ids}
    rate = batch * context / (time.perf_counter() - started)
    if phase == "decode":
        started = time.perf_counter()
        for _ in range(steps):
            engine.step()
        rate = batch * steps / (time.perf_counter() - started)
    engine.abort_request(names)
    while engine.has_unfinished_requests():
        engine.step()
    return rate


if __name__ == "__main__":
    main()
