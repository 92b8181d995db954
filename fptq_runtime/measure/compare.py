"""Recipes side by side on one model and one text: what each costs in quality, and what it gives in size and speed."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import torch

from fptq_runtime import __version__
from fptq_runtime.analysis import plots
from fptq_runtime.config import KVCacheDtype
from fptq_runtime.engine.engine import Engine
from fptq_runtime.engine.llm import LLM, Completion
from fptq_runtime.errors import FptqError
from fptq_runtime.kernels.base import Backend
from fptq_runtime.kernels.select import select_backend
from fptq_runtime.measure import bench, chat, tasks
from fptq_runtime.measure.published import ACCURACIES, PUBLISHED, SOURCE, Published, published
from fptq_runtime.measure.shapes import NoText
from fptq_runtime.models.decoder import Decoder
from fptq_runtime.models.loader import Checkpoint, load_model
from fptq_runtime.models.tensors import weight_files
from fptq_runtime.models.tokenizer import Tokenizer
from fptq_runtime.progress import progress_bar
from fptq_runtime.quantizer.calibrate import Text, sum_nll
from fptq_runtime.quantizer.evaluate import MAX_WINDOW, sum_kl, text_windows, wikitext2_windows, window_logits
from fptq_runtime.quantizer.pipeline import open_float, quantize
from fptq_runtime.quantizer.recipe import Recipe
from fptq_runtime.quantizer.samples import Calibration
from fptq_runtime.quantizer.steps.base import QuantizationError

Protocol = Literal["wikitext2"]

PROMPT = 512  # tokens of the prompts that speed is measured with, where the model's positions allow it
STEPS = 16
SECONDS = 1.0
BATCHES = (1, 8)
OWN_TEXT_TOKENS = 256  # that `quantize` measures perplexity on, which is done better here


@dataclass(frozen=True)
class Measured:
    """A model as served: perplexity, tokens per second, and the accuracy in each task. bytes: of its safetensors."""

    perplexity: float
    bytes: int
    backend: str
    prefill_tokens_per_s: float
    decode_tokens_per_s: float  # of one sequence
    decode_batch_8_tokens_per_s: float | None  # None where eight prompts exceed the model's positions
    tasks: dict[str, float] = field(default_factory=dict)
    chat: chat.Answers | None = None


@dataclass(frozen=True)
class Row:
    """kl: mean over tokens of KL(float ‖ quantized), in nats; top1: how often both rank the same token first. `error`
    says why nothing was measured. Of a checkpoint that was there already, no time is known."""

    recipe: str
    measured: Measured | None = None
    kl: float | None = None
    top1: float | None = None
    quantize_seconds: float | None = None
    quantize_cpu_seconds: float | None = None  # of all threads; writing the calibration text is not in it
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        flat = {**asdict(self), **(asdict(self.measured) if self.measured else {})}
        del flat["measured"]
        return flat


@dataclass(frozen=True)
class Comparison:
    model: str
    machine: str
    text: str
    text_sha256: str
    tokens: int
    window: int
    calibration: str | None  # where there are recipes
    original: Measured
    rows: tuple[Row, ...]
    calibration_cpu_seconds: float  # what drawing it took
    protocol: Protocol | None = None
    published: Published | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.model, "version": __version__, "machine": self.machine, "text": self.text,
            "text_sha256": self.text_sha256, "tokens": self.tokens, "window": self.window,
            "calibration": self.calibration,
            "calibration_cpu_seconds": self.calibration_cpu_seconds, "protocol": self.protocol,
            "float": asdict(self.original),
            "rows": [r.to_json() for r in self.rows],
            "published": None if self.published is None else {**asdict(self.published), "source": SOURCE},
        }


@dataclass(frozen=True)
class Tasks:
    """What is measured besides perplexity: accuracies, and how the model answers."""

    lm_eval: tuple[str, ...] = ()
    limit: int | None = None
    choices: Path | None = None
    last_word: Path | None = None
    chat: bool = False

    def run(self, path: Path, backend: str, threads: int, device: str, kv_dtype: KVCacheDtype) -> dict[str, float]:
        if not (self.lm_eval or self.choices or self.last_word):
            return {}
        scorer = tasks.Scorer(LLM(path, backend=backend, threads=threads, device=device, kv_cache_dtype=kv_dtype),
                              progress=True)
        accuracy = {}
        if self.choices is not None:
            accuracy[self.choices.stem] = tasks.choices(scorer, self.choices).accuracy
        if self.last_word is not None:
            accuracy[self.last_word.stem] = tasks.last_words(scorer, self.last_word).accuracy
        return accuracy | tasks.accuracies(tasks.lm_eval_tasks(scorer, self.lm_eval, self.limit)
                                           if self.lm_eval else {})


def compare(
    model: str | Path, recipes: Sequence[Recipe], text: Text, backend: str = "auto", *, name: str | None = None,
    calibration: Calibration = Calibration(), max_tokens: int | None = None, accuracy: Tasks | None = None,
    protocol: Protocol | None = None, checkpoints: Mapping[str, Path] = {}, threads: int = 0, device: str = "auto",
    progress: bool = False,
) -> Comparison:
    """Quantize a float model by every recipe, each into a directory that is gone afterwards, and measure it on the
    kernels and with the int8 KV cache that serve it; the float model runs once, with a float32 cache.

    A recipe that this model refuses becomes a row with the reason. Raises FptqError where the float model itself
    cannot be measured. protocol: windows as papers have them, with what they publish for this model. checkpoints: what
    others made of this model, by what their rows are called.
    """
    source, checkpoint = open_float(model, "compare recipes on the float model")
    config = checkpoint.model_config
    tokenizer = Tokenizer(source.path)
    cut = text_windows if protocol is None else wikitext2_windows
    windows = cut(text, tokenizer, config.max_position_embeddings, max_tokens)
    computed = time.process_time()
    calibrated = (calibration.draw(checkpoint, tokenizer, any(recipe.reads_inputs for recipe in recipes), progress)
                  if recipes else None)
    drawing = time.process_time() - computed
    accuracy = accuracy or Tasks()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="fptq-compare-") as directory, \
            progress_bar(total=1 + len(recipes) + len(checkpoints), unit="model", shown=progress) as bar:
        work = _Work(windows, Path(directory) / "logits", backend, threads, device, accuracy, progress)
        bar.set_description("float")
        original = work.original(source.path)
        bar.update()
        for recipe in recipes:
            assert calibrated is not None
            bar.set_description(recipe.name)
            out = Path(directory) / "artifact"
            started, computed = time.monotonic(), time.process_time()
            try:
                quantize(str(model), out, recipe, calibration=calibrated, text_tokens=OWN_TEXT_TOKENS,
                         overwrite=True)
                seconds, cpu_seconds = time.monotonic() - started, time.process_time() - computed
                measured, kl, top1 = work.quantized(out)
                rows.append(Row(recipe.name, measured, kl, top1, seconds, cpu_seconds))
            except FptqError as error:
                rows.append(Row(recipe.name, error=" ".join(str(error).split())))
            bar.update()
        for label, path in checkpoints.items():
            bar.set_description(label)
            try:
                if (vocabulary := Checkpoint(path).model_config.vocab_size) != config.vocab_size:
                    raise QuantizationError(f"it has {vocabulary} tokens, and {source.name} has {config.vocab_size}: "
                                            "it was made from another model")
                rows.append(Row(label, *work.quantized(path)))
            except FptqError as error:
                rows.append(Row(label, error=" ".join(str(error).split())))
            bar.update()
    return Comparison(
        name or source.name, bench.machine(), text.name, text.sha256, sum(len(window) - 1 for window in windows),
        min(config.max_position_embeddings, MAX_WINDOW),
        calibrated.tokens.name if calibrated else None, original, tuple(rows), drawing, protocol,
        None if protocol is None else published(config),
    )


class _Work:
    """The float model's logits lie in a file, chunk after chunk, while the quantized models run."""

    def __init__(self, windows: Sequence[Sequence[int]], logits: Path, backend: str, threads: int, device: str,
                 accuracy: Tasks, progress: bool) -> None:
        self._windows = windows
        self._logits = logits
        self._backend = backend
        self._threads = threads
        self._device = device
        self._accuracy = accuracy
        self._progress = progress
        self._answers: list[Completion] | None = None  # the float model's

    def original(self, path: Path) -> Measured:
        decoder, backend = self._load(path)
        total, count = 0.0, 0
        with self._logits.open("wb") as file:
            for logits, targets in window_logits(decoder, backend, self._windows, "float32", self._progress):
                logits.numpy().tofile(file)
                total += sum_nll(logits, targets)
                count += len(targets)
        return self._measured(path, decoder, backend, math.exp(total / count), "bf16")

    def quantized(self, path: Path) -> tuple[Measured, float, float]:
        """With KL and top-1 agreement."""
        decoder, backend = self._load(path)
        total, divergence, agreeing, count = 0.0, 0.0, 0, 0
        with self._logits.open("rb") as file:
            for logits, targets in window_logits(decoder, backend, self._windows, "int8", self._progress):
                exact = _read(file, logits)
                total += sum_nll(logits, targets)
                divergence += sum_kl(exact, logits)
                agreeing += int((exact.argmax(-1) == logits.argmax(-1)).sum())
                count += len(targets)
        measured = self._measured(path, decoder, backend, math.exp(total / count), "int8")
        return measured, divergence / count, agreeing / count

    def _load(self, path: Path) -> tuple[Decoder, Backend]:
        """On the kernels that will serve it."""
        checkpoint = Checkpoint(path)
        backend = select_backend(self._backend, self._threads, checkpoint.linear_schemes, self._device)
        return load_model(checkpoint, backend), backend

    def _measured(self, path: Path, decoder: Decoder, backend: Backend, perplexity: float, kv_dtype: KVCacheDtype
                  ) -> Measured:
        if not math.isfinite(perplexity):
            raise QuantizationError("its perplexity is not finite")
        prefill, decode = _speed(decoder, backend, kv_dtype)
        return Measured(
            perplexity, sum(file.stat().st_size for file in weight_files(path)), backend.name, prefill,
            decode[1], decode.get(8), self._accuracy.run(path, self._backend, self._threads, self._device, kv_dtype),
            self._chat(path, kv_dtype) if self._accuracy.chat else None,
        )

    def _chat(self, path: Path, kv_dtype: KVCacheDtype) -> chat.Answers:
        llm = LLM(path, backend=self._backend, threads=self._threads, device=self._device, kv_cache_dtype=kv_dtype)
        given, exact = chat.answer(llm, chat.PROMPTS), self._answers
        if exact is None:
            self._answers = given
        return chat.describe(given, exact)


def _read(file: IO[bytes], like: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.fromfile(file, np.float32, like.numel())).reshape(like.shape)


def _speed(decoder: Decoder, backend: Backend, kv_dtype: KVCacheDtype) -> tuple[float, dict[int, float]]:
    """Prefill tokens per second of one prompt, and decode tokens per second by batch size."""
    model = decoder.config
    context = min(PROMPT, model.max_position_embeddings // 2)
    wanted = [bench.Row(batch, context) for batch in BATCHES]
    rows = [row for row in wanted if context + row.output_tokens(STEPS, PROMPT) <= model.max_position_embeddings]
    config = bench.bench_config(model, rows or wanted[:1], STEPS, backend, kv_cache_dtype=kv_dtype)
    engine = Engine(decoder, backend, config, NoText())
    bench.measure(engine, rows[0], steps=1, seconds=0)  # warms up
    measured = [part.against(None) for row in rows
                for part in bench.measure(engine, row, steps=STEPS, seconds=SECONDS)]
    decode = {part.batch: part.tokens_per_s for part in measured if part.phase == "decode"}
    return next(part.tokens_per_s for part in measured if part.phase == "prefill"), decode


def markdown(comparison: Comparison) -> str:
    """The table, and what was measured on what."""
    original = comparison.original
    names = list(original.tasks)
    answered = original.chat
    more = [*names, *(["loops", "empty", "tokens alike"] if answered else [])]
    lines = [
        f"# {comparison.model}: recipes compared", "",
        f"fptq {__version__}, {comparison.machine}. Perplexity, KL to the float model (nats a token) and top-1 "
        f"agreement on {comparison.text}, {comparison.tokens} tokens, windows of {comparison.window}, with the "
        f"kernels and the int8 KV cache that serve{_calibrated(comparison)}. Speed is tokens per second: prefill of "
        "one prompt, decode of 1 and of 8 sequences.", "",
        "| recipe | perplexity | loss | KL | top-1 | " + "".join(f"{name} | " for name in more)
        + "MB | quantize | CPU | prefill | decode | decode × 8 |",
        "|---" * (11 + len(more)) + "|",
        _line("float", original, original, None, names),
    ]
    best = min((row.measured.perplexity for row in comparison.rows if row.measured), default=None)
    for row in comparison.rows:
        if row.measured is None:
            lines.append(f"| {row.recipe} " + "| " * (10 + len(more)) + "|")
        else:
            lines.append(_line(row.recipe, row.measured, original, row, names, row.measured.perplexity == best))
    if (known := comparison.published) is not None:
        said = {"float": known.original, **known.methods}
        lines += [f"| {method}, published | {value:.2f} | "
                  f"{'' if method == 'float' else f'{value / known.original - 1:+.2%}'} " + "| " * (8 + len(more)) + "|"
                  for method, value in said.items()]
    if answered:
        lines += ["", f"Of {answered.answers} greedy answers of {chat.MAX_TOKENS} tokens at most, how many loop (some "
                  f"run of {chat.RUN} tokens or words occurs {chat.TIMES} times) and are empty, and how many tokens "
                  "are the float model's before they go another way, on average."]
    if comparison.protocol:
        lines += ["", *_protocol(comparison)]
    slow = [row.recipe for row in comparison.rows if row.measured and row.measured.backend != original.backend]
    if slow:
        lines += ["", f"The {original.backend} backend has no kernel for {', '.join(slow)}: speeds of the reference "
                  "backend."]
    failed = [f"- {row.recipe}: {row.error}" for row in comparison.rows if row.error]
    return "\n".join([*lines, *(["", "Not measured:", "", *failed] if failed else [])]) + "\n"


def _calibrated(comparison: Comparison) -> str:
    if comparison.calibration is None:
        return ""
    return (f"; calibrated on {comparison.calibration}, which took {comparison.calibration_cpu_seconds:.0f} CPU "
            "seconds to draw, once")


def _protocol(comparison: Comparison) -> list[str]:
    known = comparison.published
    said = f"Published figures are of {known.model}, from {SOURCE}." if known else (
        f"Nothing is published here for a model of this shape; there is for {', '.join(p.model for p in PUBLISHED)}.")
    return ["The papers' protocol: the text tokenized whole, windows cut from it without a BOS of their own, the rest "
            f"left out. {said} {ACCURACIES}"]


def _line(name: str, measured: Measured, original: Measured, row: Row | None, tasks: Sequence[str],
          best: bool = False) -> str:
    perplexity = f"**{measured.perplexity:.3f}**" if best else f"{measured.perplexity:.3f}"
    eight = measured.decode_batch_8_tokens_per_s
    cells = [
        name, perplexity, "" if row is None else f"{measured.perplexity / original.perplexity - 1:+.2%}",
        "" if row is None else f"{row.kl:.4f}", "" if row is None else f"{row.top1:.1%}",
        *(f"{measured.tasks[task]:.1%}" for task in tasks), *_answered(measured.chat), f"{measured.bytes / 1e6:.2f}",
        *_seconds(row),
        f"{measured.prefill_tokens_per_s:.0f}",
        f"{measured.decode_tokens_per_s:.0f}", "" if eight is None else f"{eight:.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def _seconds(row: Row | None) -> tuple[str, str]:
    if row is None or row.quantize_seconds is None:
        return "", ""
    return f"{row.quantize_seconds:.0f} s", f"{row.quantize_cpu_seconds:.0f} s"


def _answered(answers: chat.Answers | None) -> list[str]:
    if answers is None:
        return []
    alike = "" if answers.common_prefix is None else f"{answers.common_prefix:.0f}"
    return [str(answers.looping), str(answers.empty), alike]


def plot(comparison: Comparison) -> str:
    """compare.svg"""
    original = comparison.original
    measured = [("float", original, None), *((row.recipe, row.measured, row) for row in comparison.rows)]

    def column(title: str, values: Sequence[float | None], form: str) -> Any:
        return title, values, ["–" if value is None else form.format(value) for value in values]

    return plots.panels([name for name, _, _ in measured], [
        column("perplexity loss, %", [None if m is None or row is None else 100 * (
            m.perplexity / original.perplexity - 1) for _, m, row in measured], "{:.2f}"),
        column("KL, nats a token", [None if row is None else row.kl for _, _, row in measured], "{:.4f}"),
        column("MB", [None if m is None else m.bytes / 1e6 for _, m, _ in measured], "{:.1f}"),
        column("prefill tokens/s", [None if m is None else m.prefill_tokens_per_s for _, m, _ in measured], "{:.0f}"),
        column("decode tokens/s", [None if m is None else m.decode_tokens_per_s for _, m, _ in measured], "{:.0f}"),
    ])
