"""Adapters that PEFT itself makes and saves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel


def save_lora(model: PreTrainedModel, path: Path, seed: int = 0, dtype: torch.dtype = torch.float32,
              **config: Any) -> PeftModel:
    """Both factors are random, so that it changes what the model says; returns the model with it."""
    torch.manual_seed(seed)
    adapted = get_peft_model(model, LoraConfig(**{"target_modules": "all-linear", "r": 4, **config}))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter).mul(0.1).to(dtype))
    adapted.save_pretrained(path)
    return adapted.eval()
