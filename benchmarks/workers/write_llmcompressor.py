"""Quantize with llm-compressor, in an environment of its own: python write_llmcompressor.py MODEL JOB_JSON OUT.

The job: windows (token ids, the calibration samples, all of one length), method (one of METHODS), scheme (a preset of
compressed-tensors), group (of 4-bit weights, or null for the preset's), head_bits (8, per channel, or 16), steps
(AutoRound's, or null for its default) and batch_size (of such a step).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, preset_name_to_scheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.autoround import AutoRoundModifier
from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from llmcompressor.modifiers.transform.spinquant import SpinQuantModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from transformers import AutoModelForCausalLM, AutoTokenizer

HEAD = "lm_head"
METHODS: dict[str, Callable[[], tuple[list[Any], type[Any]]]] = {  # what goes before rounding, and what rounds
    "rtn": lambda: ([], QuantizationModifier),
    "gptq": lambda: ([], GPTQModifier),
    "smoothquant-gptq": lambda: ([SmoothQuantModifier()], GPTQModifier),
    # The default, a Hadamard matrix, is of powers of two alone.
    "spinquant-gptq": lambda: ([SpinQuantModifier(transform_type="random-hadamard")], GPTQModifier),
    "awq": lambda: ([AWQModifier()], QuantizationModifier),
    "autoround": lambda: ([], AutoRoundModifier),
}


def main() -> None:
    source, job, out = sys.argv[1], json.loads(Path(sys.argv[2]).read_text()), Path(sys.argv[3])
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    windows = job["windows"]
    data = Dataset.from_dict({"input_ids": windows, "attention_mask": [[1] * len(w) for w in windows]})
    if not torch.accelerator.is_available():  # AWQ would pin memory for one, which fails
        IntermediatesCache.pin_memory = lambda *_: None
    transforms, rounding = METHODS[job["method"]]()
    more = {"enable_torch_compile": False} if rounding is AutoRoundModifier else {}
    if job["steps"] is not None:
        more |= {"iters": job["steps"], "batch_size": job["batch_size"]}
    rounds = rounding(config_groups=_groups(model, job), ignore=[HEAD] * (job["head_bits"] == 16), **more)
    oneshot(
        model=model,
        dataset=data,
        recipe=[*transforms, rounds],
        max_seq_length=len(windows[0]),
        num_calibration_samples=len(windows),
        shuffle_calibration_samples=False,
    )
    model.save_pretrained(out, save_compressed=True)
    AutoTokenizer.from_pretrained(source).save_pretrained(out)
    _forget_transforms(out / "config.json")


def _groups(model: Any, job: dict[str, Any]) -> dict[str, QuantizationScheme]:
    """The scheme for every linear whose inputs are a multiple of its group, per channel for the others, which
    compressed-tensors does not divide, and 8 bits per channel for the head."""
    scheme = preset_name_to_scheme(job["scheme"], ["Linear"])
    assert isinstance(scheme.weights, QuantizationArgs)
    groups: dict[str, QuantizationScheme] = {}
    channel = scheme.weights.model_copy(update={"strategy": "channel", "group_size": None})
    if job["head_bits"] == 8:
        eight = channel.model_copy(update={"num_bits": 8})
        groups["head"] = scheme.model_copy(update={"targets": [HEAD], "weights": eight})
    if scheme.weights.group_size is not None:
        if job["group"] is not None:
            scheme.weights.group_size = job["group"]
        uneven = [name for name, module in model.named_modules() if name != HEAD
                  and type(module).__name__ == "Linear" and module.in_features % scheme.weights.group_size]
        if uneven:
            groups["uneven"] = scheme.model_copy(update={"targets": uneven, "weights": channel})
    return {**groups, "even": scheme}


def _forget_transforms(config: Path) -> None:
    """Rotations that are in the weights already, which is all that SpinQuant's default has, need none at run time."""
    data = json.loads(config.read_text())
    data["quantization_config"].pop("transform_config", None)
    config.write_text(json.dumps(data, indent=2) + "\n")


if __name__ == "__main__":
    main()
