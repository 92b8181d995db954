"""What `fptq eval` measures: perplexity on a text, by the quantizer's measure, and accuracy in tasks, by the engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fptq_runtime.config import Activations, KVCacheDtype
from fptq_runtime.engine.llm import LLM
from fptq_runtime.kernels.select import select_backend
from fptq_runtime.measure import tasks as task
from fptq_runtime.models.loader import Checkpoint
from fptq_runtime.quantizer.calibrate import read_text
from fptq_runtime.quantizer.evaluate import Perplexity
from fptq_runtime.quantizer.evaluate import evaluate as evaluate_text


@dataclass(frozen=True)
class Evaluation:
    """What was asked for; the rest is None, or empty. tasks: lm-eval's metrics by task and name."""

    perplexity: Perplexity | None = None
    choices: task.Choices | None = None
    last_word: task.LastWords | None = None
    tasks: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Perplexity's fields lie beside the others."""
        rest = {name: value for name, value in asdict(self).items() if name != "perplexity" and value}
        return {**(asdict(self.perplexity) if self.perplexity else {}), **rest}

    def summary(self) -> str:
        """A line for each."""
        lines = []
        if (p := self.perplexity) is not None:
            lines.append(f"perplexity {p.perplexity:.4f} on {p.text}: {p.tokens} tokens, windows of {p.window}")
        if (c := self.choices) is not None:
            lines.append(f"accuracy {c.accuracy:.2%}, length-normalized {c.accuracy_normalized:.2%} on {c.file}: "
                         f"{c.questions} questions")
        if (w := self.last_word) is not None:
            lines.append(f"last-word accuracy {w.accuracy:.2%}, perplexity {w.perplexity:.4f} on {w.file}: "
                         f"{w.texts} texts")
        lines += [f"{name}: {', '.join(f'{key} {value:.4f}' for key, value in metrics.items())}"
                  for name, metrics in self.tasks.items()]
        return "\n".join(lines)


def evaluate(
    path: Path, text: Path | None = None, choices: Path | None = None, last_word: Path | None = None,
    tasks: Sequence[str] = (), *, max_tokens: int | None = None, limit: int | None = None,
    kv_cache_dtype: KVCacheDtype = "bf16", activations: Activations = "checkpoint", backend: str = "auto",
    device: str = "auto", threads: int = 0, progress: bool = False,
) -> Evaluation:
    """Measure the model at `path`, in float or quantized. max_tokens: of the text; limit: documents of each lm-eval
    task. Raises FptqError."""
    measured = None
    if text is not None:
        kernels = select_backend(backend, threads, Checkpoint(path, activations).linear_schemes, device)
        measured = evaluate_text(path, read_text(text), kernels, max_tokens=max_tokens, kv_dtype=kv_cache_dtype,
                                 activations=activations, progress=progress)
    if not (choices or last_word or tasks):
        return Evaluation(measured)
    scorer = task.Scorer(LLM(path, backend=backend, device=device, threads=threads, kv_cache_dtype=kv_cache_dtype,
                             activations=activations), progress=progress)
    return Evaluation(
        measured,
        None if choices is None else task.choices(scorer, choices),
        None if last_word is None else task.last_words(scorer, last_word),
        task.lm_eval_tasks(scorer, tasks, limit) if tasks else {},
    )
