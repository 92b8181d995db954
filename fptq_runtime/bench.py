"""Tokens per second of a model on this machine, through the engine that serves it."""

from __future__ import annotations

import random
import statistics
from dataclasses import dataclass

from fptq_runtime.engine.engine import Engine
from fptq_runtime.engine.request import SamplingParams
from fptq_runtime.engine.stats import StepStats


@dataclass(frozen=True)
class Measurement:
    """Medians over the runs. prefill: tokens per second of steps that compute prompts; decode: of the others, over all
    sequences; step_ms: milliseconds of one decode step, which is each sequence's time per token."""

    batch: int
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    step_ms: float


def measure(engine: Engine, batch: int, prompt_tokens: int, output_tokens: int, runs: int) -> Measurement:
    """Run `batch` requests of random prompts at once, greedily, after one run that is not counted. output_tokens must
    be at least 2: the first token comes out of the prefill."""
    if output_tokens < 2:
        raise ValueError(f"decoding is measured on 2 output tokens or more, not {output_tokens}")
    measured = [_run(engine, batch, prompt_tokens, output_tokens, seed) for seed in range(runs + 1)][1:]
    prefill, decode, step_ms = (statistics.median(values) for values in zip(*measured, strict=True))
    return Measurement(batch, prefill, decode, step_ms)


def _run(engine: Engine, batch: int, prompt_tokens: int, output_tokens: int, seed: int) -> tuple[float, float, float]:
    generator = random.Random(seed)
    params = SamplingParams(temperature=0, max_tokens=output_tokens, ignore_eos=True)
    vocab = range(engine.model_config.vocab_size)
    for i in range(batch):
        engine.add_request(f"{seed}.{i}", generator.choices(vocab, k=prompt_tokens), params)
    steps: list[StepStats] = []
    while engine.has_unfinished_requests:
        steps.append(engine.step()[1])
    prefill = [step for step in steps if step.prompt_tokens]
    decode = [step for step in steps if step.generated_tokens and not step.prompt_tokens]
    return (
        sum(step.batch_tokens for step in prefill) / sum(step.step_seconds for step in prefill),
        sum(step.generated_tokens for step in decode) / sum(step.step_seconds for step in decode),
        1000 * statistics.median(step.step_seconds for step in decode),
    )
