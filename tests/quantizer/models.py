"""Checkpoints to quantize: random small ones of every family, with a tokenizer, and the demo with outlier channels."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from fptq_runtime.artifact.io import Manifest
from fptq_runtime.kernels.base import Backend
from fptq_runtime.models.gate import check_artifact
from fptq_runtime.models.loader import Checkpoint, load_model
from tests.models.hf import save_random

DEMO = Path(__file__).parents[2] / "fptq_runtime" / "demo"
SHARED = Path(__file__).parents[3] / "shared"
STORIES = SHARED / "models" / "stories260k"


def save_model(family: str, path: Path, **changes: Any) -> PreTrainedModel:
    """A random model whose tokenizer has one token a byte and puts a BOS first."""
    model = save_random(family, path, vocab_size=260, **changes)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(path)
    return model


def transplant_outliers(source: Path, out: Path) -> Path:
    """Four channels of each norm grow 20- to 400-fold and the weights that read them shrink by the same: the same
    float function, with the activation ranges that FPTQ exists for."""
    shutil.copytree(source, out)
    tensors = {name: tensor.float() for name, tensor in load_file(source / "model.safetensors").items()}
    readers = {"input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
               "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj")}
    generator = torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith("layernorm.weight")]:
        layer, norm, _ = name.rsplit(".", 2)
        factors = torch.ones_like(tensors[name])
        channels = torch.randperm(factors.numel(), generator=generator)[:4]
        factors[channels] = 20 * 20 ** torch.rand(4, generator=generator)
        tensors[name] *= factors
        for reader in readers[norm]:
            tensors[f"{layer}.{reader}.weight"] /= factors
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    return out


def through_the_gate(artifact: Path, manifest: Manifest, backend: Backend) -> None:
    """What the artifact's golden values say of this backend's kernels. Raises GateError."""
    checkpoint = Checkpoint(artifact)
    check_artifact(artifact, manifest, load_model(checkpoint, backend), backend, checkpoint.max_positions)
