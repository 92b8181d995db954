"""The decoder that a checkpoint of another class carries: a model without its head, or a text tower beside a vision
tower."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fptq_runtime.models.families import FAMILIES

TOWERS: Mapping[str, tuple[str, str]] = {
    "cohere": ("CohereForCausalLM", "cohere"),
    "cohere2": ("Cohere2ForCausalLM", "cohere2"),
    "gemma": ("GemmaForCausalLM", "gemma"),
    "gemma2": ("Gemma2ForCausalLM", "gemma2"),
    "gemma3_text": ("Gemma3ForCausalLM", "gemma3_text"),
    "granite": ("GraniteForCausalLM", "granite"),
    "llama": ("LlamaForCausalLM", "llama"),
    "ministral3": ("Ministral3ForCausalLM", "ministral3"),
    "mistral": ("MistralForCausalLM", "mistral"),
    "phi3": ("Phi3ForCausalLM", "phi3"),
    "qwen2": ("Qwen2ForCausalLM", "qwen2"),
    "qwen2_vl_text": ("Qwen2ForCausalLM", "qwen2"),
    "qwen2_5_vl_text": ("Qwen2ForCausalLM", "qwen2"),
    "qwen3": ("Qwen3ForCausalLM", "qwen3"),
    "qwen3_vl_text": ("Qwen3ForCausalLM", "qwen3"),
    "qwen3_5_text": ("Qwen3_5ForCausalLM", "qwen3_5_text"),
    "qwen3_5_moe_text": ("Qwen3_5MoeForCausalLM", "qwen3_5_moe_text"),
    "smollm3": ("SmolLM3ForCausalLM", "smollm3"),
}  # architecture and model_type of a text tower alone, by the model_type of `text_config`
FLAT = {"Qwen2VLForConditionalGeneration": "qwen2_vl_text", "Qwen2_5_VLForConditionalGeneration": "qwen2_5_vl_text"}
PREFIXES = (("model.language_model.", "model."), ("language_model.model.", "model."), ("language_model.", ""),
            ("model.text_model.", "model."))  # and what a tower's names begin with where it is alone
OUTER = ("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype",
         "quantization_config")


def decoder_config(config: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """The config.json of the decoder alone, and whether it is a tower among others; others come back as they are."""
    names = config.get("architectures")
    if names is None:  # as transformers decides then
        architecture, model_type = TOWERS.get(str(config.get("model_type")), (None, None))
        if architecture is not None and model_type == config.get("model_type"):
            return {**config, "architectures": [architecture]}, False
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str) or names[0] in FAMILIES:
        return config, False
    if names[0].endswith("Model"):
        stem = names[0].removesuffix("Model").removesuffix("Text")
        headed = [name for name in (f"{stem}ForCausalLM", f"{stem}LMHeadModel") if name in FAMILIES]
        return ({**config, "architectures": headed}, False) if headed else (config, False)
    text = config.get("text_config")
    if names[0] in FLAT and not isinstance(text, Mapping):
        text = {"model_type": FLAT[names[0]], **{name: value for name, value in config.items() if name not in
                                                 ("model_type", "vision_config", "architectures")}}
    if not isinstance(text, Mapping) or text.get("model_type") not in TOWERS:
        return config, False
    architecture, model_type = TOWERS[text["model_type"]]
    outer = {name: config[name] for name in OUTER if config.get(name) is not None}
    tower = {**text, **outer, "architectures": [architecture], "model_type": model_type}
    for name in ("rope_scaling", "rope_parameters"):
        if isinstance(tower.get(name), Mapping):
            tower[name] = _along_text(tower[name])
    return tower, True


def _along_text(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Rope over time, height and width turns as any other does where all three are the position in the text."""
    plain = {name: value for name, value in rope.items() if name not in ("mrope_section", "mrope_interleaved")}
    return {name: "default" if name in ("type", "rope_type") and value == "mrope" else value
            for name, value in plain.items()}


def text_names(names: Iterable[str]) -> dict[str, str]:
    """Those of a checkpoint's tensors that are the text tower's, by their names where it is alone."""
    found = {}
    for name in names:
        for prefix, alone in PREFIXES:
            if name.startswith(prefix):
                found[alone + name.removeprefix(prefix)] = name
                break
        else:
            if name.startswith("lm_head."):
                found[name] = name
    return found if len(found) > 1 else {name: name for name in names if not name.startswith("visual.")}
