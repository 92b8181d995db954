"""A model quantized by llm-compressor's GPTQ to W4A8, with its own defaults, on the samples that `fptq quantize` draws.

    python -m benchmarks.llm_compressor ../shared/models/tales-6m tales-w4a8 \\
        --calibration ../shared/data/calibration/tales.txt
    python -m benchmarks.quality ../shared/models/tales-6m=../shared/data/eval/tales.txt \\
        --checkpoint tales-6m:llm-compressor=tales-w4a8

The first run installs llm-compressor (1.5 GB) into an environment of its own, --environment; on a machine without a GPU
name the index of PyTorch's CPU build to pip (`PIP_EXTRA_INDEX_URL`). The scheme is W4A8: int4 in groups of 128, int8
per-token inputs, lm_head in float. Linears whose inputs are no multiple of 128, which compressed-tensors does not
divide, are quantized per channel.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from fptq_runtime.models.loader import Checkpoint
from fptq_runtime.models.tokenizer import Tokenizer
from fptq_runtime.quantizer.calibrate import packaged_text, read_text, sample_windows

TORCH = "torch==2.13.0"
PACKAGES = ("llmcompressor==0.14.0.1",)
WORKER = Path(__file__).parent / "workers" / "write_llmcompressor.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--calibration", type=Path, help="a text file (what comes with fptq)")
    parser.add_argument("--method", choices=["gptq", "rtn"], default="gptq")
    parser.add_argument("--scheme", default="W4A8", help="one of compressed-tensors' presets: W4A8, W4A16, W8A8, …")
    parser.add_argument("--num-samples", type=int, default=64)
    parser.add_argument("--environment", type=Path, default=Path.home() / ".cache" / "fptq" / "llm-compressor")
    options = parser.parse_args()
    text = packaged_text("calibration") if options.calibration is None else read_text(options.calibration)
    length = min(512, Checkpoint(options.model).model_config.max_position_embeddings)
    windows = sample_windows(text, Tokenizer(options.model), [length] * options.num_samples, seed=0)
    python = install(options.environment, PACKAGES)
    with tempfile.TemporaryDirectory() as directory:
        job = Path(directory) / "job.json"
        job.write_text(json.dumps({"windows": windows, "method": options.method, "scheme": options.scheme,
                                   "ignore": ["lm_head"]}))
        subprocess.run([python, WORKER.resolve(), options.model.resolve(), job, options.out.resolve()], check=True,
                       cwd=directory)


def install(environment: Path, packages: Sequence[str], build: Sequence[str] = ()) -> Path:
    """The Python of a virtual environment with these packages, all with one torch. `build`: what those that compile
    need beside it; pip would otherwise build each with a torch of its own."""
    python = environment / "bin" / "python"
    if not (environment / "installed").exists():
        subprocess.run([sys.executable, "-m", "venv", environment], check=True)
        if build:
            subprocess.run([python, "-m", "pip", "install", TORCH, *build], check=True)
        subprocess.run([python, "-m", "pip", "install", *["--no-build-isolation"] * bool(build), TORCH, *packages],
                       check=True)
        (environment / "installed").touch()
    return python


if __name__ == "__main__":
    main()
