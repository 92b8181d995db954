"""Every known field of every family's config.json, changed one at a time: what alters transformers' logits is refused,
or alters ours alike."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from fptq_runtime.errors import FptqError
from fptq_runtime.kernels.reference import ReferenceBackend
from fptq_runtime.models.loader import Checkpoint, load_model
from tests.models.hf import FAMILIES, save_random
from tests.models.steps import logits_by_chunks

CASES = int(os.environ.get("FPTQ_FUZZ_FIELDS", 30))
TOKENS = torch.randint(3, 211, (40,), generator=torch.Generator().manual_seed(1)).tolist()
SILENT = {"architectures", "model_type", "transformers_version", "dtype", "torch_dtype", "vocab_size", "use_cache",
          "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id", "attention_dropout", "resid_pdrop",
          "embd_pdrop", "attn_pdrop", "hidden_dropout", "classifier_dropout", "residual_dropout", "embedding_dropout",
          "resid_dropout", "embed_dropout", "tie_word_embeddings"}  # which has tests of its own
LEGACY: dict[str, tuple[Any, ...]] = {  # what other versions of transformers write, and what other families have
    "rope_theta": (300.0, 1e6), "partial_rotary_factor": (0.25, 0.5, 1.0), "rotary_pct": (0.5,),
    "rotary_emb_base": (300,), "rope_local_base_freq": (300.0,), "head_dim": (8, 32, None),
    "rope_scaling": (None, {"rope_type": "linear", "factor": 3.0}, {"type": "dynamic", "factor": 3.0},
                     {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
                     {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                      "original_max_position_embeddings": 32}),
    "sliding_window": (5, None), "sliding_window_pattern": (2, 3), "layer_types": (None, "swapped"),
    "use_bidirectional_attention": (True,), "attn_logit_softcapping": (2.0, None),
    "final_logit_softcapping": (2.0, None), "query_pre_attn_scalar": (3, 100),
    "attention_bias": (True, False), "mlp_bias": (True, False), "use_bias": (True, False), "bias": (True, False),
    "no_rope_layers": ([1, 0, 1, 0, 1],), "clip_qkv": (0.5,), "logit_scale": (0.7,), "attention_multiplier": (0.7,),
    "num_key_value_heads": (1, 3, None), "original_max_position_embeddings": (16,), "max_position_embeddings": (64,),
    "layer_norm_eps": (0.3,), "layer_norm_epsilon": (0.3,), "rms_norm_eps": (0.3,), "norm_eps": (0.3,),
    "norm_epsilon": (0.3,), "qk_layernorm": (True, False), "use_qk_norm": (True, False), "hidden_act": ("relu", "gelu"),
    "hidden_activation": ("relu", "gelu"), "activation_function": ("relu", "gelu"), "activation": ("relu", "silu"),
}


def alternatives(value: Any) -> list[Any]:
    """Other values of its kind."""
    match value:
        case bool():
            return [not value]
        case int():
            return [value + 1, value * 2, max(value // 2, 1), None]
        case float():
            return [value * 2 + 0.1, value / 3, None]
        case str():
            return ["relu", "gelu", "gelu_pytorch_tanh"]
        case None:
            return [True, 2, 0.5]
        case list():
            return [value[::-1], value[:-1], None]
        case dict():
            inner = [{**value, name: other} for name, own in value.items() for other in alternatives(own)]
            return [*inner, *({k: v for k, v in value.items() if k != name} for name in value), None]
    return []


def changes(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    names = {**dict.fromkeys(config), **dict.fromkeys(LEGACY)}
    for name in names:
        if name in SILENT:
            continue
        values = [*LEGACY.get(name, ()), *(alternatives(config[name]) if name in config else ())]
        for value in values:
            if value == "swapped":
                kinds = config.get("layer_types") or ["full_attention"]
                value = [{"full_attention": "sliding_attention"}.get(kind, "full_attention") for kind in kinds]
            yield name, value


def theirs(model: Any, path: Path) -> np.ndarray | None:
    """None where transformers cannot run it with the weights that are there."""
    try:
        parsed = type(model.config).from_pretrained(path)
        other = AutoModelForCausalLM.from_config(parsed, attn_implementation="eager").float().eval()
        loaded = other.load_state_dict(model.state_dict(), strict=False)
        if loaded.missing_keys:
            return None
        with torch.inference_mode():
            logits: np.ndarray = other(torch.tensor([TOKENS])).logits[0].numpy()
            return logits
    except Exception:  # whatever a config that makes no sense leads to
        return None


def ours(path: Path) -> np.ndarray | None:
    """None where it is refused."""
    try:
        backend, checkpoint = ReferenceBackend(), Checkpoint(path)
        if checkpoint.max_positions < len(TOKENS):
            return None
        checkpoint.max_positions = len(TOKENS)  # what "dynamic" and "longrope" choose by
        return logits_by_chunks(load_model(checkpoint, backend), backend, TOKENS, [len(TOKENS)])
    except FptqError:
        return None


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_no_field_is_taken_and_not_meant(family: str, tmp_path: Path) -> None:
    """A part of the changes, another for each family; `make fuzz` tries them all."""
    model = save_random(family, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    tried = list(changes(config))
    random.Random(family).shuffle(tried)
    wrong, taken = [], 0
    for name, value in tried[:CASES]:
        (tmp_path / "config.json").write_text(json.dumps({**config, name: value}))
        expected = theirs(model, tmp_path)
        if expected is None or not np.isfinite(expected).all():
            continue
        got = ours(tmp_path)
        if got is None:
            continue
        taken += 1
        if got.shape != expected.shape or not np.abs(got - expected).max() <= 2e-4 * np.abs(expected).max():
            wrong.append((name, value))
    assert not wrong, wrong
    assert taken > len(tried[:CASES]) / 5
