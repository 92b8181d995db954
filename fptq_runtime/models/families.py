"""Every family that runs: an explicit list."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any

from fptq_runtime.models.block import Model
from fptq_runtime.models.bloom import bloom
from fptq_runtime.models.fields import Fields, ModelError
from fptq_runtime.models.gemma2 import gemma2
from fptq_runtime.models.gemma3 import gemma3
from fptq_runtime.models.gpt2 import gpt2
from fptq_runtime.models.gpt_neox import gpt_neox
from fptq_runtime.models.granite import granite
from fptq_runtime.models.llama import llama
from fptq_runtime.models.mistral import mistral
from fptq_runtime.models.olmo2 import olmo2
from fptq_runtime.models.opt import opt
from fptq_runtime.models.phi3 import phi3
from fptq_runtime.models.qwen2 import qwen2
from fptq_runtime.models.qwen3 import qwen3
from fptq_runtime.models.smollm3 import smollm3
from fptq_runtime.models.stablelm import stablelm

FAMILIES: Mapping[str, Callable[[Fields], Model]] = {
    "LlamaForCausalLM": llama,
    "MistralForCausalLM": mistral,
    "Qwen2ForCausalLM": qwen2,
    "Qwen3ForCausalLM": qwen3,
    "Gemma2ForCausalLM": gemma2,
    "Gemma3ForCausalLM": gemma3,
    "Phi3ForCausalLM": phi3,
    "Olmo2ForCausalLM": olmo2,
    "GraniteForCausalLM": granite,
    "SmolLM3ForCausalLM": smollm3,
    "StableLmForCausalLM": stablelm,
    "GPTNeoXForCausalLM": gpt_neox,
    "OPTForCausalLM": opt,
    "GPT2LMHeadModel": gpt2,
    "BloomForCausalLM": bloom,
}  # by the architecture that config.json names


def parse_config(config: Mapping[str, Any]) -> Model:
    """The model that a config.json describes. Raises ModelError."""
    names = config.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise ModelError(f"config.json: architectures must name one architecture, not {names!r}")
    if names[0] in FAMILIES:
        return FAMILIES[names[0]](Fields(config))
    close = difflib.get_close_matches(names[0], FAMILIES, 1, 0.8)
    meant = f"; did you mean {close[0]}?" if close else "."
    raise ModelError(f"architecture {names[0]!r} is not supported{meant} Supported: {', '.join(FAMILIES)}")
