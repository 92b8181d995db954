"""Families whose code comes with their checkpoints: transformers' Llama and Granite are the oracle, with their weights
under the other names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fptq_runtime.artifact.io import verify
from fptq_runtime.kernels.reference import ReferenceBackend
from fptq_runtime.models.fields import ModelError
from fptq_runtime.models.loader import Checkpoint
from fptq_runtime.quantizer.pipeline import quantize
from tests.models.hf import change_config
from tests.models.test_decoder import assert_agrees
from tests.quantizer.models import save_model, through_the_gate
from tests.quantizer.test_pipeline import SMALL

Tensors = dict[str, torch.Tensor]


def rename(tensors: Tensors, *pairs: tuple[str, str]) -> Tensors:
    renamed = {}
    for name, tensor in tensors.items():
        for old, new in pairs:
            name = name.replace(old, new)
        renamed[name] = tensor
    return renamed


def internlm2(tensors: Tensors) -> tuple[Tensors, dict[str, Any]]:
    """Rows of q, k and v by KV head: [KV head, (its query heads, k, v), dim]."""
    for layer in range(3):
        at = f"model.layers.{layer}.self_attn"
        for part in ("weight", "bias"):
            q, k, v = (tensors.pop(f"{at}.{each}_proj.{part}") for each in "qkv")
            rest = q.shape[1:]
            grouped = torch.cat([q.reshape(2, 3, 16, *rest), k.reshape(2, 1, 16, *rest), v.reshape(2, 1, 16, *rest)], 1)
            tensors[f"model.layers.{layer}.attention.wqkv.{part}"] = grouped.reshape(-1, *rest)
    return rename(tensors, ("self_attn.o_proj", "attention.wo"), ("mlp.gate_proj", "feed_forward.w1"),
                  ("mlp.up_proj", "feed_forward.w3"), ("mlp.down_proj", "feed_forward.w2"),
                  ("input_layernorm", "attention_norm"), ("post_attention_layernorm", "ffn_norm"),
                  ("model.embed_tokens", "model.tok_embeddings"), ("lm_head", "output")), {
                      "architectures": ["InternLM2ForCausalLM"], "model_type": "internlm2", "bias": True}


def exaone(tensors: Tensors) -> tuple[Tensors, dict[str, Any]]:
    return rename(tensors, ("model.layers", "transformer.h"), ("self_attn.", "attn.attention."), ("o_proj", "out_proj"),
                  ("mlp.gate_proj", "mlp.c_fc_0"), ("mlp.up_proj", "mlp.c_fc_1"), ("mlp.down_proj", "mlp.c_proj"),
                  ("input_layernorm", "ln_1"), ("post_attention_layernorm", "ln_2"),
                  ("model.embed_tokens", "transformer.wte"), ("model.norm", "transformer.ln_f")), {
                      "architectures": ["ExaoneForCausalLM"], "model_type": "exaone", "num_layers": 3,
                      "num_hidden_layers": None, "activation_function": "silu", "layer_norm_epsilon": 1e-6,
                      "hidden_act": None, "rms_norm_eps": None}


def minicpm(tensors: Tensors) -> tuple[Tensors, dict[str, Any]]:
    return tensors, {"architectures": ["MiniCPMForCausalLM"], "model_type": "minicpm", "scale_emb": 3.0,
                     "scale_depth": 0.3 * 3**0.5, "dim_model_base": 24, "embedding_multiplier": None,
                     "residual_multiplier": None, "attention_multiplier": None, "logits_scaling": None}


CASES: list[tuple[str, dict[str, Any], Callable[[Tensors], tuple[Tensors, dict[str, Any]]]]] = [
    ("llama", {"attention_bias": True}, internlm2),
    ("llama", {}, exaone),
    ("granite", {"attention_multiplier": 0.25, "logits_scaling": 4.0}, minicpm),
]


@pytest.mark.parametrize(("family", "changes", "as_stored"), CASES, ids=["internlm2", "exaone", "minicpm"])
def test_a_family_under_other_names(family: str, changes: dict[str, Any], as_stored: Any, tmp_path: Path) -> None:
    """In float, and through the quantizer."""
    path = tmp_path / "float"
    model = save_model(family, path, **changes)
    tensors, fields = as_stored(load_file(path / "model.safetensors"))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "model.safetensors",
              metadata={"format": "pt"})
    change_config(path, **fields)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
    assert_agrees(path, model, list(range(3, 60)))
    (tmp_path / "text.txt").write_text("It was a bright cold day in the wood, and the clock was striking. " * 20)
    manifest = quantize(path, tmp_path / "out", "fptq", text=tmp_path / "text.txt", **SMALL)
    assert verify(tmp_path / "out") == manifest
    through_the_gate(tmp_path / "out", manifest, ReferenceBackend())


def test_minicpm_with_sparse_attention_is_refused(tmp_path: Path) -> None:
    save_model("granite", tmp_path)
    change_config(tmp_path, architectures=["MiniCPMForCausalLM"], dim_model_base=24, sparse_config={"topk": 64})
    with pytest.raises(ModelError, match="sparse_config"):
        Checkpoint(tmp_path)
