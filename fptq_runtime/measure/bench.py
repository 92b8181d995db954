"""Tokens per second of a model on this machine, through the engine that serves it, against the machine's roofs."""

from __future__ import annotations

import platform
import random
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from fptq_runtime import __version__
from fptq_runtime.config import Activations, EngineConfig, KVCacheDtype, ModelConfig
from fptq_runtime.engine.engine import Engine
from fptq_runtime.engine.llm import load_engine
from fptq_runtime.engine.request import SamplingParams
from fptq_runtime.errors import FptqError
from fptq_runtime.kernels.base import Backend, Roofs
from fptq_runtime.kernels.select import select_backend
from fptq_runtime.measure.shapes import SHAPES, NoText, random_decoder
from fptq_runtime.models.loader import Checkpoint
from fptq_runtime.progress import progress_bar

Phase = Literal["prefill", "decode"]
PHASES: tuple[Phase, ...] = ("prefill", "decode")
# The default: prompts of 32 · 2048 tokens would take minutes to compute.
BATCHES = {512: (1, 2, 4, 8, 16, 32), 2048: (1, 8)}


@dataclass(frozen=True)
class Row:
    """What to measure: `batch` sequences at once, with prompts of `context` tokens."""

    batch: int
    context: int

    def output_tokens(self, steps: int, budget: int) -> int:
        """Enough for those whose prompts are computed first to decode until the last one's is, and `steps` more."""
        return steps + 1 + self.batch + -(-self.batch * self.context // max(1, budget - self.batch))


@dataclass(frozen=True)
class Measurement:
    """prefill: the steps until every prompt is computed. decode: steps in which each of `batch` sequences gains a
    token and no prompt is computed. tokens_per_s counts all tokens that these steps compute.

    percent_of_roof: the time a roofline needs (the linears' multiply-adds at the integer peak, or the bytes of weights
    and, in decode, of keys and values at the read bandwidth, whichever is longer) over the time taken; `bound` says
    which. Both are None where the backend has no roofs. percent_outside_kernels: of the steps' time, what the
    executor's ops did not take.
    """

    phase: Phase
    batch: int
    context: int
    tokens_per_s: float
    step_ms: float
    percent_of_roof: float | None
    bound: Literal["compute", "memory"] | None
    percent_outside_kernels: float


@dataclass
class Steps:
    """Those of one phase, and what they had to do at least: multiply-adds and bytes to read."""

    phase: Phase
    row: Row
    seconds: list[float] = field(default_factory=list)
    tokens: int = 0
    kernel_seconds: float = 0.0
    multiply_adds: int = 0
    bytes_read: int = 0

    @property
    def total_seconds(self) -> float:
        """Steps of decoding are alike, so that the median tells of what disturbed none of them."""
        return sum(self.seconds) if self.phase == "prefill" else len(self.seconds) * statistics.median(self.seconds)

    def against(self, roofs: Roofs | None) -> Measurement:
        percent: float | None = None
        bound: Literal["compute", "memory"] | None = None
        if roofs is not None:
            compute, memory = 2e-9 * self.multiply_adds / roofs.gops, 1e-9 * self.bytes_read / roofs.read_gb_per_s
            percent = 100 * max(compute, memory) / self.total_seconds
            bound = "compute" if compute > memory else "memory"
        return Measurement(
            self.phase, self.row.batch, self.row.context, self.tokens / self.total_seconds,
            1000 * statistics.median(self.seconds), percent, bound,
            100 * (1 - self.kernel_seconds / sum(self.seconds)),
        )


@dataclass(frozen=True)
class Bench:
    """roofs: the best that was measured, None where the backend has none. kernels: what `Backend.describe` says.
    max_num_batched_tokens: of a step; max_model_len: the model's own; token_bytes: of a token's keys and values."""

    model: str
    machine: str
    kernels: Mapping[str, str]
    max_num_batched_tokens: int
    max_model_len: int
    token_bytes: int
    roofs: Roofs | None
    results: tuple[Measurement, ...]

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "version": __version__}

    def table(self) -> str:
        """What was measured on what, and a line for each result."""
        lines = [self.model, self.machine, *(f"{kind}: {kernel}" for kind, kernel in self.kernels.items())]
        if self.roofs is not None:
            lines.append(f"roofs: {self.roofs.gops:.0f} GOPS int8, {self.roofs.read_gb_per_s:.1f} GB/s read")
        lines.append(f"{'phase':>7} {'batch':>5} {'context':>7} {'tokens/s':>9} {'ms/step':>8} {'of the roof':>16} "
                     f"{'outside kernels':>15}")
        for r in self.results:
            roof = "" if r.percent_of_roof is None else f"{r.percent_of_roof:.0f} % ({r.bound})"
            lines.append(f"{r.phase:>7} {r.batch:5} {r.context:7} {r.tokens_per_s:9.1f} {r.step_ms:8.2f} {roof:>16} "
                         f"{r.percent_outside_kernels:13.1f} %")
        return "\n".join(lines)


def higher(before: Roofs | None, after: Roofs | None) -> Roofs | None:
    """A roof is what the machine reached at best: what else it does only ever lowers the measurement."""
    if before is None or after is None:
        return None
    return Roofs(max(before.gops, after.gops), max(before.read_gb_per_s, after.read_gb_per_s))


def rows(batches: Sequence[int], contexts: Sequence[int], model: ModelConfig, steps: int, budget: int) -> list[Row]:
    """Every batch at every context. Empty: the default of `BATCHES`, where it fits into the model's positions. Raises
    FptqError where what was asked for does not."""
    def fits(row: Row) -> bool:
        return row.context + row.output_tokens(steps, budget) <= model.max_position_embeddings

    by_default = [context for context in BATCHES if fits(Row(1, context))] or [model.max_position_embeddings // 2]
    chosen = [Row(batch, context) for context in contexts or by_default
              for batch in batches or BATCHES.get(context, BATCHES[512] if context < 512 else BATCHES[2048])]
    fitting = [row for row in chosen if fits(row)]
    if not fitting or (contexts and fitting != chosen):
        row = next(row for row in chosen if not fits(row))
        raise FptqError(
            f"{row.batch} prompts of {row.context} tokens and what they decode meanwhile exceed the model's "
            f"{model.max_position_embeddings} positions; lower context, batch or steps", "contexts")
    return fitting


def bench_config(model: ModelConfig, rows: Sequence[Row], steps: int, backend: Backend, *,
                 max_num_batched_tokens: int = 512, kv_cache_dtype: KVCacheDtype = "int8") -> EngineConfig:
    """An engine as large as the largest row: nothing is preempted, and no prompt is found in a cache."""
    lengths = [(row.batch, row.context + row.output_tokens(steps, max_num_batched_tokens)) for row in rows]
    config = EngineConfig(
        max_model_len=max(length for _, length in lengths), max_num_seqs=max(batch for batch, _ in lengths),
        max_num_batched_tokens=max_num_batched_tokens, kv_cache_dtype=kv_cache_dtype,
        enable_prefix_caching=False, speculation=False,
    )
    blocks = max(batch * (-(-length // config.block_size) + 1) for batch, length in lengths)
    return replace(config, kv_cache_memory=blocks * config.block_size * backend.token_bytes(model, kv_cache_dtype))


def shape_engine(name: str, head_bits: int, backend: Backend, config: EngineConfig) -> Engine[NoText]:
    """An engine for one of `SHAPES` with random weights and no text."""
    return Engine(random_decoder(SHAPES[name], backend, head_bits), backend, config, NoText())


def measure(engine: Engine[Any], row: Row, phases: Sequence[Phase] = PHASES, *, steps: int = 24, seconds: float = 3.0
            ) -> list[Steps]:
    """Greedy requests with random prompts, again and again until `seconds` have passed, with `steps` steps of decoding
    each time. For each phase the run with the median rate. Raises FptqError for less than one step."""
    if steps < 1:
        raise FptqError(f"decoding is measured on 1 step or more, not {steps}", "steps")
    runs: list[dict[Phase, Steps]] = []
    started = time.monotonic()
    while not runs or time.monotonic() - started < seconds:
        runs.append(_run(engine, row, steps if "decode" in phases else 0, seed=len(runs)))
    return [sorted((run[phase] for run in runs), key=lambda one: one.tokens / one.total_seconds)[len(runs) // 2]
            for phase in phases]


def bench(
    model: Path | str, *, name: str | None = None, head_bits: int = 4, phases: Sequence[Phase] = (),
    batches: Sequence[int] = (), contexts: Sequence[int] = (), steps: int = 24, seconds: float = 3.0,
    max_num_batched_tokens: int = 512, kv_cache_dtype: KVCacheDtype = "int8", activations: Activations = "checkpoint",
    backend: str = "auto", device: str = "auto", threads: int = 0, progress: bool = False,
) -> Bench:
    """`measure` every row of `rows`. model: an artifact's path; or a name in `SHAPES`, for random weights and a head of
    head_bits. phases: both unless given. Raises FptqError."""
    checkpoint = Checkpoint(model, activations) if isinstance(model, Path) else None
    shape = SHAPES[str(model)].config if checkpoint is None else checkpoint.model_config
    kernels = select_backend(backend, threads, None if checkpoint is None else checkpoint.linear_schemes, device)
    chosen = rows(batches, contexts, shape, steps, max_num_batched_tokens)
    config = bench_config(shape, chosen, steps, kernels, max_num_batched_tokens=max_num_batched_tokens,
                          kv_cache_dtype=kv_cache_dtype)
    if isinstance(model, Path):
        engine: Engine[Any] = load_engine(model, backend=kernels, activations=activations, **asdict(config))
        name = name or model.name
    else:
        engine = shape_engine(model, head_bits, kernels, config)
        name = name or f"{model}, random weights, {head_bits}-bit head"
    measure(engine, Row(1, chosen[0].context), steps=1, seconds=0)  # warms up
    measured, roofs = [], engine.backend.roofs()
    for row in progress_bar(chosen, desc="measuring", unit="row", shown=progress):
        measured += measure(engine, row, phases or PHASES, steps=steps, seconds=seconds)
        roofs = higher(roofs, engine.backend.roofs())
    return Bench(name, machine(), engine.backend.describe(), max_num_batched_tokens, shape.max_position_embeddings,
                 engine.backend.token_bytes(shape, kv_cache_dtype), roofs,
                 tuple(part.against(roofs) for part in measured))


def machine() -> str:
    """The processor's name and how many of it there are."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} × {names[0]}" if names else platform.processor() or platform.machine()


def _run(engine: Engine[Any], row: Row, steps: int, seed: int) -> dict[Phase, Steps]:
    """Until every prompt is computed and `steps` steps with all sequences have followed."""
    config, vocab_size = engine.config, engine.model_config.vocab_size
    generator = random.Random(f"{seed} {row.batch} {row.context}")
    output_tokens = row.output_tokens(steps, config.max_num_batched_tokens)
    params = SamplingParams(temperature=0, max_tokens=output_tokens, ignore_eos=True)
    for index in range(row.batch):
        engine.add_request(str(index), generator.choices(range(vocab_size), k=row.context), params)
    prefill, decode = Steps("prefill", row), Steps("decode", row)
    kv_bytes = engine.backend.token_bytes(engine.model_config, config.kv_cache_dtype)
    to_compute, cached = row.batch * row.context, 0
    while to_compute or len(decode.seconds) < steps:
        before = sum(engine.executor.seconds.values())
        _, stats = engine.step()
        to_compute -= stats.prompt_tokens
        cached += stats.batch_tokens
        part = prefill if stats.prompt_tokens else decode
        if part is decode and stats.generated_tokens < row.batch:
            raise RuntimeError("a sequence ended before it was measured")
        part.seconds.append(stats.step_seconds)
        part.tokens += stats.batch_tokens
        part.kernel_seconds += sum(engine.executor.seconds.values()) - before
        work = engine.executor.work(stats.batch_tokens, stats.generated_tokens)
        part.multiply_adds += work.multiply_adds
        part.bytes_read += work.weight_bytes + (cached * kv_bytes if part is decode else 0)
    for index in range(row.batch):
        engine.abort(str(index))
    while engine.has_unfinished_requests:
        engine.step()
    return {"prefill": prefill, "decode": decode}
