"""Checkpoints that GPTQModel and AutoAWQ write, read by ours and compared with what the libraries compute from them.

    python -m benchmarks.importers gptqmodel ../shared/models/tales-6m ../shared/data/eval/tales.txt
    python -m benchmarks.importers autoawq ../shared/models/tales-6m ../shared/data/eval/tales.txt

The first run installs the library (1 to 2 GB) into an environment of its own, --environment; on a machine without a GPU
name the index of PyTorch's CPU build to pip (`PIP_EXTRA_INDEX_URL`). Prints a Markdown table: perplexity by
transformers in float32 with the weights that the library dequantizes, and ours by backend, with a float32 KV cache;
then the difference of logits to these, by position and of its max |logit| (median, largest) and how many top tokens
are the same; and the same of the library's own inference, in float16.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.llm_compressor import install
from fptq_runtime.kernels.base import Float32Array
from fptq_runtime.kernels.select import select_backend
from fptq_runtime.models.golden import prompt_logits
from fptq_runtime.models.loader import Checkpoint, load_model
from fptq_runtime.models.tokenizer import Tokenizer
from fptq_runtime.quantizer.calibrate import packaged_text, read_text, sample_windows, sum_nll
from fptq_runtime.quantizer.evaluate import text_windows

WORKER = Path(__file__).parent / "workers" / "write_int4.py"
PACKAGES = {"gptqmodel": ("gptqmodel==7.6.0",), "autoawq": ("autoawq==0.2.9", "transformers==4.51.3")}


def variants(library: str, group: int) -> dict[str, dict[str, Any]]:
    """The library's settings by what to call them."""
    if library == "autoawq":
        return {f"gemm, groups of {group}": {"zero_point": True, "q_group_size": group, "w_bit": 4, "version": "GEMM"}}
    return {
        f"{layout}, groups of {group}{', act-order' * order}{', asymmetric' * (not symmetric)}":
            {"bits": 4, "group_size": group, "desc_act": order, "sym": symmetric, "format": layout}
        for layout in ("gptq", "gptq_v2") for order, symmetric in ((False, True), (True, True), (False, False))
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("library", choices=list(PACKAGES))
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--max-tokens", type=int, default=1024, help="of the text")
    parser.add_argument("--calibration", type=Path, help="a text file (what comes with fptq)")
    parser.add_argument("--num-samples", type=int, default=4)
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--environment", type=Path, help="default: ~/.cache/fptq/LIBRARY")
    options = parser.parse_args()
    python = install(options.environment or Path.home() / ".cache" / "fptq" / options.library,
                     PACKAGES[options.library], build=("setuptools>=77,<83", "wheel"))
    text = packaged_text("calibration") if options.calibration is None else read_text(options.calibration)
    tokenizer, context = Tokenizer(options.model), Checkpoint(options.model).model_config.max_position_embeddings
    windows = sample_windows(text, tokenizer, [min(512, context)] * options.num_samples, seed=0)
    prompts = text_windows(read_text(options.text), tokenizer, context, options.max_tokens)
    print("| library | checkpoint | perplexity | backend | perplexity | difference | to its own layers |")
    print("|---|---|---|---|---|---|---|")
    for name, settings in variants(options.library, options.group).items():
        with tempfile.TemporaryDirectory() as directory:
            job, out, logits = (Path(directory) / part for part in ("job.json", "model", "logits.npz"))
            job.write_text(json.dumps({"windows": windows, "prompts": prompts, "variants": [
                {"out": str(out), "logits": str(logits), "settings": settings}]}))
            subprocess.run([python, WORKER.resolve(), options.library, options.model.resolve(), job], check=True,
                           cwd=directory, stdout=subprocess.DEVNULL)
            row(f"{options.library} | {options.model.name}, {name}", out, prompts, np.load(logits))


def row(name: str, path: Path, prompts: list[list[int]], theirs: Any) -> None:
    """One line for each backend; theirs: `exact0`, `own0`, … of `WORKER`."""
    exact, own = (scored([theirs[f"{part}{i}"] for i in range(len(prompts))]) for part in ("exact", "own"))
    targets = np.concatenate([prompt[1:] for prompt in prompts])
    for backend in (select_backend("reference"), select_backend("native")):
        model = load_model(Checkpoint(path), backend)
        ours = scored([prompt_logits(model, backend, prompt) for prompt in prompts])
        print(f"| {name} | {perplexity(exact, targets):.4f} | {backend.name} | {perplexity(ours, targets):.4f} "
              f"| {compared(ours, exact)} | {compared(ours, own)} |", flush=True)


def scored(logits: list[Float32Array]) -> Float32Array:
    """Of each prompt's [T, V], the rows that have a next token, one prompt after the other. [R, V]"""
    return np.concatenate([rows[:-1] for rows in logits])


def perplexity(logits: Float32Array, targets: npt.NDArray[np.int64]) -> float:
    return math.exp(sum_nll(torch.from_numpy(logits), targets) / len(targets))


def compared(ours: Float32Array, theirs: Float32Array) -> str:
    difference = np.abs(ours - theirs).max(-1) / np.abs(theirs).max(-1)
    same = (ours.argmax(-1) == theirs.argmax(-1)).mean()
    return f"{np.median(difference):.1e}, {difference.max():.1e}, {same:.2%}"


if __name__ == "__main__":
    main()
