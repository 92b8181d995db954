"""docs/models.md's tables: what each architecture does here, found by doing it, and which of vLLM's are covered.

    python -m benchmarks.models [ARCHITECTURE ...] [--write docs/models.md]

A small random model of each, from the tests, is loaded in float and compared with transformers' logits, quantized to
W4A8 and W8A8 and taken through the gate by the native kernels, compared on Triton's interpreter with the reference
backend, and given a prompt twice, whose second time must come from the prefix cache. A cell that fails says why. Rows
of architectures that were not asked for stay.
"""

from __future__ import annotations

import argparse
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # read where a kernel is defined

import numpy as np
import torch

from fptq_runtime import SamplingParams, quantize
from fptq_runtime.artifact.io import read_manifest
from fptq_runtime.engine.llm import load_engine
from fptq_runtime.engine.output import RequestOutput
from fptq_runtime.kernels.base import Backend
from fptq_runtime.kernels.cpu import CpuBackend
from fptq_runtime.kernels.reference import ReferenceBackend
from fptq_runtime.kernels.triton import interpreter
from fptq_runtime.kernels.triton.backend import TritonBackend
from fptq_runtime.models.families import FAMILIES
from fptq_runtime.models.gguf import FORMS
from fptq_runtime.models.golden import prompt_logits
from fptq_runtime.models.loader import Checkpoint, load_model
from fptq_runtime.quantizer.samples import Calibration
from tests.models.hf import FAMILIES as MODELS
from tests.quantizer.models import save_model, through_the_gate

PROMPT = list(range(3, 43))
COLUMNS = ("float", "W4A8", "W8A8", "experts", "prefix cache", "GPU (interpreter)", "GGUF", "quantized imports")
SOURCE = ("vLLM's `_TEXT_GENERATION_MODELS` (vllm/model_executor/models/registry.py at 0002bff), without other "
          "spellings of the same code")
VLLM = (
    "Afmoe", "Apertus", "Arcee", "Arctic", "BaiChuan", "BailingMoe", "BailingMoeV2", "Bamba", "Bloom",
    "ChatGLMModel", "Cohere", "Cohere2", "Dbrx", "DeciLM", "Deepseek", "DeepseekV2", "DeepseekV3", "DeepseekV32",
    "Dots1", "Ernie4_5", "Ernie4_5_Moe", "Exaone", "Exaone4", "Falcon", "FalconMamba", "FalconH1", "FlexOlmo",
    "Gemma", "Gemma2", "Gemma3", "Gemma3n", "Qwen3Next", "Glm", "Glm4", "Glm4Moe", "GptOss", "GPT2LMHeadModel",
    "GPTBigCode", "GPTJ", "GPTNeoX", "Granite", "GraniteMoe", "GraniteMoeHybrid", "GraniteMoeShared", "GritLM",
    "Grok1Model", "HunYuanMoEV1", "HunYuanDenseV1", "InternLM2", "InternLM3", "JAISLMHeadModel", "Jais2", "Jamba",
    "KimiLinear", "Lfm2", "Lfm2Moe", "Llama", "Llama4", "LongcatFlash", "Mamba", "Mamba2", "MiniCPM", "MiniCPM3",
    "MiniMaxText01", "MiniMaxM2", "Mistral", "MistralLarge3", "Mixtral", "Mpt", "MiMo", "MiMoV2Flash", "Nemotron",
    "NemotronH", "Olmo", "Olmo2", "Olmo3", "Olmoe", "OPT", "Orion", "Ouro", "PanguEmbedded", "PanguProMoEV2",
    "PanguUltraMoE", "Persimmon", "Phi", "Phi3", "PhiMoE", "Plamo2", "Plamo3", "QWenLMHeadModel", "Qwen2",
    "Qwen2Moe", "Qwen3", "Qwen3Moe", "SeedOss", "Step3Text", "StableLm", "Starcoder2", "Solar", "TeleChat2",
    "TeleFLM", "Zamba2",
)
POPULAR = (
    "Llama", "Qwen2", "Qwen3", "Mistral", "Gemma", "Gemma2", "Gemma3", "Gemma3n", "Phi", "Phi3", "PhiMoE",
    "Qwen2Moe", "Qwen3Moe", "Qwen3Next", "Mixtral", "DeepseekV2", "DeepseekV3", "DeepseekV32", "GptOss", "Glm",
    "Glm4", "Glm4Moe", "ChatGLMModel", "GPT2LMHeadModel", "GPTNeoX", "GPTJ", "GPTBigCode", "OPT", "Bloom", "Falcon",
    "FalconMamba", "FalconH1", "Mpt", "StableLm", "Starcoder2", "Olmo", "Olmo2", "Olmo3", "Olmoe", "Granite",
    "GraniteMoe", "GraniteMoeHybrid", "Cohere", "Cohere2", "InternLM2", "InternLM3", "Exaone", "Exaone4",
    "BaiChuan", "MiniCPM", "Lfm2", "Ernie4_5", "SeedOss", "HunYuanDenseV1", "Nemotron", "NemotronH", "DeciLM",
    "Mamba", "Llama4", "QWenLMHeadModel",
)


def full_name(short: str) -> str:
    return short if short.endswith("Model") and short != "Grok1Model" else f"{short}ForCausalLM"


def logits(path: Path, backend: Backend) -> np.ndarray:
    return prompt_logits(load_model(Checkpoint(path), backend), backend, PROMPT)


def agree(actual: np.ndarray, expected: np.ndarray, tolerance: float) -> str:
    """Half of the rows: in others the last bit of a float sum may tip an int8 code, or a router."""
    error = float(np.median(np.abs(actual - expected).max(-1) / np.abs(expected).max(-1)))
    return "yes" if error <= tolerance else f"no: {error:.1g} off"


def tried(work: Callable[[], str]) -> str:
    try:
        return work()
    except Exception as error:  # a cell of a table, whatever it is
        return f"no: {(str(error).splitlines() or [type(error).__name__])[0][:90]}"


def row(family: str, path: Path) -> dict[str, str]:
    model = save_model(family, path / "float")
    text = path / "text.txt"
    text.write_text("It was a bright cold day in the wood, and the clock was striking thirteen. " * 20)
    small: dict[str, Any] = {"calibration": Calibration("random", 4, 32), "text_tokens": 400, "text": text}

    def in_float() -> str:
        with torch.no_grad():
            expected = model(torch.tensor([PROMPT])).logits[0].numpy()
        return agree(logits(path / "float", ReferenceBackend()), expected, 1e-4)

    def gated(recipe: str, backend: Backend) -> str:
        if not (path / recipe).exists():
            quantize(path / "float", path / recipe, recipe, **small)
        through_the_gate(path / recipe, read_manifest(path / recipe), backend)
        return "yes"

    def gpu() -> str:
        return agree(logits(path / "rtn", TritonBackend()), logits(path / "rtn", ReferenceBackend()), 1e-2)

    def cached() -> str:
        engine = load_engine(path / "rtn", backend="native", max_model_len=96)
        outputs: list[list[RequestOutput]] = []
        for request in ("first", "second"):
            engine.add_request(request, 2 * PROMPT, SamplingParams(max_tokens=4, temperature=0.0))
            outputs.append([])
            while engine.has_unfinished_requests:
                outputs[-1] += engine.step()[0]
        first, second = ([token for output in each for token in output.token_ids] for each in outputs)
        hits = outputs[1][-1].num_cached_tokens
        return "yes" if hits and first == second else f"no: {hits} tokens were cached"

    cells = {"float": tried(in_float), "W4A8": tried(lambda: gated("rtn", CpuBackend(1))),
             "W8A8": tried(lambda: gated("w8a8-dynamic", CpuBackend(1)))}
    spec = Checkpoint(path / "float").model
    experts = any("experts" in name for name in spec.linear_names())
    cells["experts"] = cells["W4A8"] if experts else "—"
    cells["prefix cache"], cells["GPU (interpreter)"] = tried(cached), tried(gpu)
    forms = {form.architecture for form in FORMS.values()} | {"MistralForCausalLM"}  # which llama.cpp calls llama
    cells["GGUF"] = "yes" if spec.config.architecture in forms else "no"
    cells["quantized imports"] = cells["W8A8"]  # whose artifact is a compressed-tensors checkpoint like any other
    return cells


def coverage() -> list[str]:
    def covered(names: Sequence[str]) -> list[str]:
        return [name for name in names if full_name(name) in FAMILIES]

    return [
        f"Of {len(VLLM)} text-generation architectures of vLLM {len(covered(VLLM))} are here "
        f"({100 * len(covered(VLLM)) / len(VLLM):.0f} %), and of the {len(POPULAR)} that we take to be downloaded "
        f"most {len(covered(POPULAR))} ({100 * len(covered(POPULAR)) / len(POPULAR):.0f} %).",
        "",
        f"The list is {SOURCE}. No public page that we found ranks architectures by downloads; the {len(POPULAR)} are "
        "our reading of the hub's lists of models, in no order: "
        + ", ".join(name if full_name(name) in FAMILIES else f"**{name}**" for name in POPULAR) + ".",
        "",
        "Missing among those are the bold ones; InternLM2, Exaone, MiniCPM, QWen, BaiChuan, ChatGLM and DeciLM, which "
        "transformers does not have, are compared with it under other names, and not in the table.",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("architectures", nargs="*")
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    interpreter.mend()
    rows: dict[str, str] = {}
    done: set[str] = set()
    for family in MODELS:
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch)
            save_model(family, path / "named")
            architecture = Checkpoint(path / "named").model.config.architecture
            if architecture in done or (options.architectures and architecture not in options.architectures):
                continue
            done.add(architecture)
            cells = row(family, path)
            rows[architecture] = f"| {architecture} | {' | '.join(cells[column] for column in COLUMNS)} |"
            print(rows[architecture], flush=True)
    if options.write is not None:
        page = options.write.read_text()
        marks = "<!-- python -m benchmarks.models -->", "<!-- end -->"
        before = {line[2:].partition(" ")[0]: line for line in page.partition(marks[0])[2].splitlines()}
        rows = {**before, **rows}  # those that were not asked for stay
        lines = [f"| architecture | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|",
                 *(rows[name] for name in FAMILIES if name in rows), "", *coverage()]
        table = "\n".join((marks[0], "", *lines, "", marks[1]))
        options.write.write_text(re.sub(f"{marks[0]}.*{marks[1]}", lambda _: table, page, flags=re.DOTALL))


if __name__ == "__main__":
    main()
