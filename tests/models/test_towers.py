"""Text towers beside vision towers, and models without their heads: logits of text are transformers'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from fptq_runtime.models.loader import Checkpoint
from fptq_runtime.quantizer.pipeline import quantize
from tests.models.hf import LLAMA, change_config, save_random
from tests.models.test_decoder import assert_agrees
from tests.quantizer.models import save_model
from tests.quantizer.test_pipeline import SMALL, assert_transformers_agrees

VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 4,
          "image_size": 8}
QWEN_VISION = {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 4,
               "out_hidden_size": 96}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
TOWERS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "gemma3": ("gemma3", {**LLAMA, "sliding_window": 20}, {
        "vision_config": {**VISION, "model_type": "siglip_vision_model"}, "mm_tokens_per_image": 4}),
    "mistral3": ("mistral3", {**LLAMA, "model_type": "mistral", "sliding_window": None},
                 {"vision_config": {**VISION, "model_type": "pixtral", "head_dim": 16}}),
    "ministral3": ("mistral3", {**LLAMA, "model_type": "ministral3", "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 1e3, "factor": 2.0, "original_max_position_embeddings": 64,
        "llama_4_scaling_beta": 0.1, "mscale": 1.0, "mscale_all_dim": 1.0}}, {
        "vision_config": {**VISION, "model_type": "pixtral", "head_dim": 16}}),
    "llava": ("llava", {**LLAMA, "model_type": "llama"}, {
        "vision_config": {**VISION, "model_type": "clip_vision_model"}}),
    "qwen2-vl": ("qwen2_vl", {**LLAMA, "rope_parameters": MROPE}, {
        "vision_config": {"depth": 1, "embed_dim": 32, "hidden_size": 96, "num_heads": 2, "patch_size": 4}}),
    "qwen2.5-vl": ("qwen2_5_vl", {**LLAMA, "rope_parameters": MROPE}, {"vision_config": QWEN_VISION}),
    "qwen3-vl": ("qwen3_vl", {**LLAMA, "rope_parameters": {**MROPE, "mrope_interleaved": True}}, {
        "vision_config": {**QWEN_VISION, "deepstack_visual_indexes": [0]}, "tie_word_embeddings": False}),
    "qwen3.5": ("qwen3_5", {
        **LLAMA, "num_hidden_layers": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "rms_norm_eps": 1e-2,
        "layer_types": ["linear_attention", "full_attention"],
        "rope_parameters": {**MROPE, "mrope_interleaved": True, "partial_rotary_factor": 0.5}}, {
            "vision_config": QWEN_VISION, "tie_word_embeddings": False}),
    "qwen3.5-moe": ("qwen3_5_moe", {
        **LLAMA, "num_hidden_layers": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "rms_norm_eps": 1e-2, "num_experts": 6,
        "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 40,
        "layer_types": ["linear_attention", "full_attention"],
        "rope_parameters": {**MROPE, "mrope_interleaved": True, "partial_rotary_factor": 0.5}}, {
            "vision_config": QWEN_VISION, "tie_word_embeddings": False}),
}


def save_tower(name: str, path: Path, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model_type, text, others = TOWERS[name]
    config = AutoConfig.for_model(model_type, text_config={**text, **changes}, **others)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "language_model" in name or "lm_head" in name:
                parameter.copy_(torch.randn_like(parameter) * (2 / parameter.shape[-1] ** 0.5 if parameter.ndim > 1
                                                               else 0.3) + (parameter.ndim == 1) * parameter)
    model.save_pretrained(path)
    return model


@pytest.mark.parametrize("name", TOWERS)
def test_text_is_read_as_transformers_reads_it(name: str, tmp_path: Path) -> None:
    model = save_tower(name, tmp_path)
    assert_agrees(tmp_path, model, list(range(3, 60)))


@pytest.mark.parametrize("name", ["gemma3", "llava"])
def test_other_names_of_the_same_tensors(name: str, tmp_path: Path) -> None:
    """What transformers saves, and what is on the hub."""
    model = save_tower(name, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    stored = "language_model.model." if any(key.startswith("language_model.model.") for key in tensors) else \
        "model.language_model."
    other = {"language_model.model.": "model.language_model.", "model.language_model.": "language_model.model."}[stored]
    renamed = {key.replace(stored, other, 1): tensor for key, tensor in tensors.items()}
    save_file(renamed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_agrees(tmp_path, model, list(range(3, 60)))


def test_an_artifact_is_the_tower_alone(tmp_path: Path) -> None:
    save_tower("qwen3-vl", tmp_path / "float", vocab_size=260)
    save_model("llama", tmp_path / "other", num_hidden_layers=1)
    for file in (tmp_path / "other").glob("tokenizer*"):
        (tmp_path / "float" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "text.txt").write_text("It was a bright cold day in the wood, and the clock was striking. " * 20)
    quantize(tmp_path / "float", tmp_path / "out", "fptq", text=tmp_path / "text.txt", **SMALL)
    assert Checkpoint(tmp_path / "out").config["architectures"] == ["Qwen3ForCausalLM"]
    assert_transformers_agrees(tmp_path / "out", list(range(3, 60)))


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "bloom"])
def test_a_model_without_its_head(family: str, tmp_path: Path) -> None:
    """Saved by transformers' base class: the head is the embedding."""
    save_random(family, tmp_path, tie_word_embeddings=True)
    base = AutoModel.from_pretrained(tmp_path, dtype=torch.float32)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager").eval()
    base.save_pretrained(tmp_path / "base")
    assert Checkpoint(tmp_path / "base").config["architectures"] == whole.config.architectures
    assert_agrees(tmp_path / "base", whole, list(range(3, 60)))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_config_that_names_no_architecture(family: str, tmp_path: Path) -> None:
    """transformers goes by its model_type."""
    model = save_random(family, tmp_path)
    change_config(tmp_path, architectures=None)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is type(model)
    assert_agrees(tmp_path, model, list(range(3, 60)))


def test_float64(tmp_path: Path) -> None:
    model = save_random("llama", tmp_path)
    tensors = {name: tensor.double() for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    change_config(tmp_path, dtype="float64")
    assert_agrees(tmp_path, model, list(range(3, 60)))
