"""Tokens per second of a model on this machine, through the engine that serves it."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

from fptq_runtime.config import EngineConfig
from fptq_runtime.engine.engine import Engine
from fptq_runtime.engine.request import SamplingParams
from fptq_runtime.engine.stats import StepStats
from fptq_runtime.kernels.select import select_backend
from fptq_runtime.models.tokenizer import Tokenizer
from fptq_runtime.shapes import SHAPES, random_decoder


@dataclass(frozen=True)
class Measurement:
    """Medians over the runs, of the steps that compute prompts (prefill) or of the others (decode). context: tokens of
    each prompt; tokens_per_s: over all sequences; step_ms: milliseconds of one step."""

    phase: Literal["prefill", "decode"]
    batch: int
    context: int
    tokens_per_s: float
    step_ms: float


def measure(engine: Engine, batch: int, context: int, output_tokens: int, runs: int) -> tuple[Measurement, Measurement]:
    """Prefill and decode of `batch` requests with random prompts at once, greedy, after one run that is not counted.
    output_tokens must be at least 2: the first token comes out of the prefill."""
    if output_tokens < 2:
        raise ValueError(f"decoding is measured on 2 output tokens or more, not {output_tokens}")
    measured = [_run(engine, batch, context, output_tokens, seed) for seed in range(runs + 1)][1:]
    prefill, prefill_ms, decode, decode_ms = (statistics.median(values) for values in zip(*measured, strict=True))
    return (
        Measurement("prefill", batch, context, prefill, prefill_ms),
        Measurement("decode", batch, context, decode, decode_ms),
    )


def shape_engine(name: str, head_bits: int, backend: str, config: EngineConfig) -> Engine:
    """An engine for one of `SHAPES` with random weights and no text."""
    kernels = select_backend(backend, config.threads)
    decoder = random_decoder(SHAPES[name], kernels, head_bits)
    return Engine(decoder, kernels, config, cast(Tokenizer, NoText()))


class NoText:
    """What the engine asks of a tokenizer, for a model without a vocabulary."""

    def stream(self, skip_special_tokens: bool = True, prompt_token_ids: Sequence[int] = ()) -> NoText:
        return self

    def step(self, token_id: int) -> str | None:
        return ""

    def flush(self) -> str:
        return ""


def _run(engine: Engine, batch: int, context: int, output_tokens: int, seed: int) -> tuple[float, ...]:
    generator = random.Random(seed)
    params = SamplingParams(temperature=0, max_tokens=output_tokens, ignore_eos=True)
    vocab = range(engine.model_config.vocab_size)
    for i in range(batch):
        engine.add_request(f"{seed}.{i}", generator.choices(vocab, k=context), params)
    steps: list[StepStats] = []
    while engine.has_unfinished_requests:
        steps.append(engine.step()[1])
    prefill = [step for step in steps if step.prompt_tokens]
    decode = [step for step in steps if step.generated_tokens and not step.prompt_tokens]
    return (
        sum(step.batch_tokens for step in prefill) / sum(step.step_seconds for step in prefill),
        1000 * statistics.median(step.step_seconds for step in prefill),
        sum(step.generated_tokens for step in decode) / sum(step.step_seconds for step in decode),
        1000 * statistics.median(step.step_seconds for step in decode),
    )
