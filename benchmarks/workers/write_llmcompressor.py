"""Quantize with llm-compressor, in an environment of its own: python write_llmcompressor.py MODEL JOB_JSON OUT.

The job: windows (token ids, the calibration samples, all of one length), method (gptq or rtn), scheme (a preset of
compressed-tensors) and ignore (modules left in float).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, preset_name_to_scheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    source, job, out = sys.argv[1], json.loads(Path(sys.argv[2]).read_text()), sys.argv[3]
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    windows = job["windows"]
    data = Dataset.from_dict({"input_ids": windows, "attention_mask": [[1] * len(w) for w in windows]})
    modifier = {"gptq": GPTQModifier, "rtn": QuantizationModifier}[job["method"]]
    oneshot(
        model=model,
        dataset=data,
        recipe=[modifier(config_groups=_groups(model, job["scheme"]), ignore=job["ignore"])],
        max_seq_length=len(windows[0]),
        num_calibration_samples=len(windows),
        shuffle_calibration_samples=False,
    )
    model.save_pretrained(out, save_compressed=True)
    AutoTokenizer.from_pretrained(source).save_pretrained(out)


def _groups(model: Any, preset: str) -> dict[str, QuantizationScheme]:
    """The preset for every linear whose inputs are a multiple of its group, per channel for the others, which
    compressed-tensors does not divide."""
    scheme = preset_name_to_scheme(preset, ["Linear"])
    assert isinstance(scheme.weights, QuantizationArgs)
    group = scheme.weights.group_size
    if group is None:
        return {"group_0": scheme}
    uneven = [name for name, module in model.named_modules()
              if type(module).__name__ == "Linear" and module.in_features % group]
    groups = {"group_0": scheme}
    if uneven:
        channel = scheme.weights.model_copy(update={"strategy": "channel", "group_size": None})
        groups = {"group_1": scheme.model_copy(update={"targets": uneven, "weights": channel}), **groups}
    return groups


if __name__ == "__main__":
    main()
