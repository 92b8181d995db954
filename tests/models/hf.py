"""Random small transformers models of every family, saved as a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

LLAMA = {
    "vocab_size": 211, "hidden_size": 96, "intermediate_size": 136, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", LLAMA),
    "llama-tied-bias": ("llama", {**LLAMA, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama3-rope": ("llama", {**LLAMA, "rope_parameters": LLAMA3_ROPE}),
    "llama-linear-rope": (
        "llama", {**LLAMA, "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "mistral-window": ("mistral", {**LLAMA, "sliding_window": 20}),
    "mistral-full": ("mistral", {**LLAMA, "sliding_window": None}),
    "qwen2": ("qwen2", LLAMA),
    "qwen2-window": ("qwen2", {**LLAMA, "use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1}),
    "qwen3": ("qwen3", {**LLAMA, "tie_word_embeddings": True}),
    "bloom": ("bloom", {"vocab_size": 211, "hidden_size": 96, "n_layer": 3, "n_head": 6, "bos_token_id": 1,
                        "eos_token_id": 2}),
}


def save_random(name: str, path: Path, seed: int = 0, shard: str = "5GB", **changes: Any) -> PreTrainedModel:
    """Weights large enough that attention and norms matter; norm gains and biases are random too."""
    torch.manual_seed(seed)
    model_type, fields = FAMILIES[name]
    config = AutoConfig.for_model(model_type, **{**fields, **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.copy_(torch.randn_like(parameter) * 2 / parameter.shape[1] ** 0.5)
    model.save_pretrained(path, max_shard_size=shard)
    return model
