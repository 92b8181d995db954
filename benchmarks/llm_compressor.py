"""A model quantized to W4A8 by what llm-compressor has, on the samples that `fptq quantize` draws.

    python -m benchmarks.llm_compressor ../shared/models/tales-6m tales-w4a8 \\
        --calibration ../shared/data/calibration/tales.txt
    python -m benchmarks.quality ../shared/models/tales-6m=../shared/data/eval/tales.txt \\
        --checkpoint tales-6m:llm-compressor=tales-w4a8

    python -m benchmarks.llm_compressor MODEL OUT --method awq --group 64 --head-bits 8 --calibration self
    fptq compare MODEL --checkpoint awq=OUT --text wikitext2-test.txt

The first run installs llm-compressor (1.5 GB) into an environment of its own, --environment; on a machine without a GPU
name the index of PyTorch's CPU build to pip (`PIP_EXTRA_INDEX_URL`). Each method has its own defaults. The scheme is
W4A8: int4 in groups of 128, int8 per-token inputs, lm_head in float. Linears whose inputs are no multiple of the group,
which compressed-tensors does not divide, are quantized per channel.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from fptq_runtime.models.loader import Checkpoint
from fptq_runtime.models.tokenizer import Tokenizer
from fptq_runtime.quantizer.samples import Calibration

TORCH = "torch==2.13.0"
PACKAGES = ("llmcompressor==0.14.0.1",)
METHODS = ("rtn", "gptq", "smoothquant-gptq", "spinquant-gptq", "awq", "autoround")
WORKER = Path(__file__).parent / "workers" / "write_llmcompressor.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--calibration", help="a text file, or as for `fptq quantize`: self, tales, random (tales)",
                        default="tales")
    parser.add_argument("--method", choices=METHODS, default="gptq")
    parser.add_argument("--scheme", default="W4A8", help="one of compressed-tensors' presets: W4A8, W4A16, W8A8, …")
    parser.add_argument("--group", type=int, help="of weights (the scheme's)")
    parser.add_argument("--head-bits", type=int, choices=[8, 16], default=16)
    parser.add_argument("--steps", type=int, help="of AutoRound, each on --batch-size samples (its own defaults)")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--num-samples", type=int, default=64)
    parser.add_argument("--environment", type=Path, default=Path.home() / ".cache" / "fptq" / "llm-compressor")
    options = parser.parse_args()
    calibration = Calibration(options.calibration, options.num_samples)
    windows = calibration.draw(Checkpoint(options.model), Tokenizer(options.model)).windows
    python = install(options.environment, PACKAGES)
    with tempfile.TemporaryDirectory() as directory:
        job = Path(directory) / "job.json"
        job.write_text(json.dumps({
            "windows": windows, "method": options.method, "scheme": options.scheme, "group": options.group,
            "head_bits": options.head_bits, "steps": options.steps, "batch_size": options.batch_size,
        }))
        subprocess.run([python, WORKER.resolve(), options.model.resolve(), job, options.out.resolve()], check=True,
                       cwd=directory)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"{options.method}: {used.ru_utime + used.ru_stime:.0f} CPU seconds")


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
