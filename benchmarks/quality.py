"""Perplexity of models in float, quantized by each recipe, and of checkpoints that other tools quantized.

    python -m benchmarks.quality fptq_runtime/demo=../shared/data/eval/tales.txt \\
        ../shared/models/stories260k=../shared/data/eval/tinystories.txt --twins \\
        --checkpoint demo:llm-compressor=PATH > benchmarks/results/quality.md

Prints a Markdown table. Quantized models run on the kernels that serve them with the int8 KV cache that `fptq serve`
uses, the float one with float32. `--twins` adds each model's twin: the same function, with outlier channels.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from fptq_runtime import __version__
from fptq_runtime.kernels.base import Backend
from fptq_runtime.kernels.select import select_backend
from fptq_runtime.quantizer.calibrate import Text, read_text
from fptq_runtime.quantizer.evaluate import Perplexity, evaluate
from fptq_runtime.quantizer.pipeline import quantize
from fptq_runtime.quantizer.recipe import load_recipe
from fptq_runtime.quantizer.samples import Calibration
from tests.quantizer.models import transplant_outliers

BASELINES = ("rtn", "rtn-dynamic")
TWIN = "-outliers"


@dataclass(frozen=True)
class Options:
    models: dict[Path, Text]
    twins: bool
    recipes: tuple[str, ...]  # the baselines first
    checkpoints: dict[tuple[str, str], Path]  # by the model's name and their own
    calibration: dict[str, str]  # a file by the model's name
    max_tokens: int | None


def parse() -> Options:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", nargs="+", metavar="MODEL=TEXT")
    parser.add_argument("--twins", action="store_true", help="and their outlier-transplanted twins, MODEL-outliers")
    parser.add_argument("--recipes", default="fptq,fptq-best", help="presets or files; the baselines are always there")
    parser.add_argument("--checkpoint", action="append", default=[], metavar="MODEL:NAME=DIR",
                        help="an artifact or compressed-tensors checkpoint made from MODEL, as a row NAME")
    parser.add_argument("--calibration", action="append", default=[], metavar="MODEL=FILE",
                        help="what MODEL and its twin are calibrated on (the packaged text)")
    parser.add_argument("--max-tokens", type=int, default=None)
    given = parser.parse_args()
    models = {Path(model): read_text(text) for model, _, text in (pair.rpartition("=") for pair in given.models)}
    recipes = dict.fromkeys([*BASELINES, *filter(None, given.recipes.split(","))])
    checkpoints = {}
    for pair in given.checkpoint:
        name, _, directory = pair.partition("=")
        model, _, label = name.partition(":")
        checkpoints[model, label] = Path(directory)
        if not Path(directory).is_dir():
            parser.error(f"{pair}: {directory!r} is not a directory")
        if model.removesuffix(TWIN * given.twins) not in {path.name for path in models}:
            parser.error(f"{pair}: there is no model {model!r}")
    calibration = dict(pair.split("=", 1) for pair in given.calibration)
    return Options(models, given.twins, tuple(recipes), checkpoints, calibration, given.max_tokens)


@contextmanager
def variants(options: Options) -> Iterator[list[tuple[str, Path, Text]]]:
    """Every model's name, directory and text; each is followed by its twin."""
    with tempfile.TemporaryDirectory() as directory:
        found = []
        for model, text in options.models.items():
            found.append((model.name, model, text))
            if options.twins:
                twin = model.name + TWIN
                found.append((twin, transplant_outliers(model, Path(directory) / twin), text))
        yield found


class Table:
    """Prints rows as they come."""

    def __init__(self, options: Options, backend: Backend) -> None:
        self._options = options
        self._backend = backend
        print("| model | recipe | perplexity | loss | of the better rtn's loss | MB | seconds to make |")
        print("|---|---|---|---|---|---|---|")

    def model(self, name: str, model: Path, text: Text) -> None:
        original = self._perplexity(model, text, quantized=False)
        self._row(name, f"float, {original.tokens} tokens", original, "", "", model, "")
        losses: dict[str, float] = {}
        for recipe in self._options.recipes:
            with tempfile.TemporaryDirectory() as directory:
                out, started = Path(directory) / "out", time.monotonic()
                quantize(model, out, load_recipe(recipe), text_tokens=1024,
                         calibration=Calibration(self._options.calibration.get(name.removesuffix(TWIN))))
                seconds = time.monotonic() - started
                self._quantized(name, load_recipe(recipe).name, out, text, original, losses, f"{seconds:.0f}")
        for (of, label), checkpoint in self._options.checkpoints.items():
            if of == name:
                self._quantized(name, label, checkpoint, text, original, losses, "")

    def _quantized(self, name: str, label: str, path: Path, text: Text, original: Perplexity,
                   losses: dict[str, float], seconds: str) -> None:
        result = self._perplexity(path, text, quantized=True)
        loss = losses[label] = result.perplexity / original.perplexity - 1
        baseline = min((losses[b] for b in BASELINES if b in losses), default=loss)
        share = f"{loss / baseline:.2f}" if all(b in losses for b in BASELINES) else ""
        self._row(name, label, result, f"{100 * loss:+.2f} %", share, path, seconds)

    def _row(self, name: str, label: str, result: Perplexity, loss: str, share: str, path: Path, seconds: str) -> None:
        size = sum(file.stat().st_size for file in path.glob("*.safetensors")) / 1e6
        print(f"| {name} | {label} | {result.perplexity:.3f} | {loss} | {share} | {size:.2f} | {seconds} |", flush=True)

    def _perplexity(self, path: Path, text: Text, quantized: bool) -> Perplexity:
        return evaluate(path, text, self._backend, max_tokens=self._options.max_tokens,
                        kv_dtype="int8" if quantized else "float32")


def main() -> None:
    options, backend = parse(), select_backend("auto")
    print(f"fptq {__version__}, {date.today()}, {platform.machine()}, {backend.describe()}\n")
    for text in options.models.values():
        print(f"{text.name}, sha256 {text.sha256}\n")
    with variants(options) as models:
        table = Table(options, backend)
        for name, model, text in models:
            table.model(name, model, text)


if __name__ == "__main__":
    main()
