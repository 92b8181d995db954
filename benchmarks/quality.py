"""Perplexity of a model in float and quantized by each recipe, on one text, with the kernels that serve it.

    python benchmarks/quality.py fptq_runtime/demo --text ../shared/data/eval/tales.txt > benchmarks/results/quality.md

Prints a Markdown table. Quantized models run with the int8 KV cache that `fptq serve` uses, the float one with float32.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
from datetime import date
from pathlib import Path

from fptq_runtime import __version__
from fptq_runtime.kernels.select import select_backend
from fptq_runtime.quantizer.calibrate import read_text
from fptq_runtime.quantizer.evaluate import evaluate
from fptq_runtime.quantizer.pipeline import quantize
from fptq_runtime.quantizer.recipe import PRESETS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path, nargs="+")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--max-tokens", type=int, default=None)
    options = parser.parse_args()
    text = read_text(options.text)
    backend = select_backend("auto")
    print(f"fptq {__version__}, {date.today()}, {platform.machine()}, {backend.describe()}\n")
    print(f"{text.name}, sha256 {text.sha256}\n")
    print("| model | recipe | tokens | perplexity | loss | MB |\n|---|---|---|---|---|---|")
    for model in options.model:
        original = evaluate(model, text, backend, max_tokens=options.max_tokens, kv_dtype="float32")
        size = (model / "model.safetensors").stat().st_size / 1e6
        print(f"| {model.name} | float | {original.tokens} | {original.perplexity:.3f} | | {size:.1f} |", flush=True)
        for preset in PRESETS:
            with tempfile.TemporaryDirectory() as directory:
                out = Path(directory) / "out"
                quantize(model, out, preset)
                result = evaluate(out, text, backend, max_tokens=options.max_tokens, kv_dtype="int8")
                size = (out / "model.safetensors").stat().st_size / 1e6
            loss = 100 * (result.perplexity / original.perplexity - 1)
            print(f"| {model.name} | {preset.name} | {result.tokens} | {result.perplexity:.3f} | {loss:+.1f} % | "
                  f"{size:.1f} |", flush=True)


if __name__ == "__main__":
    main()
