"""Writes a model directory as llama.cpp's converter would, with gguf-py: names, what stands in another order or with an
offset, the tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from safetensors.torch import load_file

TURNED = ("llama", "granite", "smollm3")
KEYS: dict[str, str] = {
    "max_position_embeddings": "context_length", "hidden_size": "embedding_length", "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length", "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv", "head_dim": "attention.key_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon", "norm_epsilon": "attention.layer_norm_epsilon",
    "sliding_window": "attention.sliding_window", "final_logit_softcapping": "final_logit_softcapping",
    "attn_logit_softcapping": "attn_logit_softcapping", "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale", "attention_multiplier": "attention.scale",
    "logits_scaling": "logit_scale",
}


def write_gguf(source: Path, out: Path, kind: str, types: dict[str, Type] | Type = Type.F32,
               rope: dict[str, Any] | None = None, **metadata: Any) -> dict[str, np.ndarray]:
    """types: of all matrices, or by the last part of the module's name. Returns the tensors under transformers' names
    as the file means them."""
    config = json.loads((source / "config.json").read_text())
    writer = gguf.GGUFWriter(out, kind)
    for name, key in KEYS.items():
        value = config.get(name)
        if value is not None:
            add = writer.add_float32 if isinstance(value, float) or "scale" in key else writer.add_uint32
            add(f"{kind}.{key}", value)
    parameters = config.get("rope_parameters") or {}
    parameters = parameters.get("full_attention", parameters)
    dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer.add_uint32(f"{kind}.rope.dimension_count", dim)
    writer.add_float32(f"{kind}.rope.freq_base", parameters.get("rope_theta", 10000.0))
    for name, value in (rope or {}).items():
        (writer.add_string if isinstance(value, str) else writer.add_float32 if isinstance(value, float) else
         writer.add_uint32)(f"{kind}.rope.scaling.{name}", value)
    for name, value in metadata.items():
        writer.add_tensor(f"{name}.weight", value)
    if (source / "tokenizer.json").exists():
        add_tokenizer(writer, source)
    else:
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
    arch = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}[kind]
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    meant = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        values = tensor.float().numpy()
        stored = turn(name, values, dim) if kind in TURNED else values
        if kind.startswith("gemma") and name.endswith("norm.weight"):
            stored = stored + 1
        to = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert to is not None, name
        which = types if isinstance(types, Type) else types.get(name.rsplit(".", 2)[-2], Type.F32)
        if values.ndim == 1 or values.shape[1] % 32:
            which = Type.F32
        raw = gguf.quantize(stored, which)
        writer.add_tensor(to, raw, raw_dtype=which)
        back = gguf.dequantize(raw, which).reshape(values.shape)
        back = turn(name, back, dim, back=True) if kind in TURNED else back
        meant[name] = back - 1 if kind.startswith("gemma") and name.endswith("norm.weight") else back
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meant


def turn(name: str, values: np.ndarray, dim: int, back: bool = False) -> np.ndarray:
    """convert_hf_to_gguf.py's permute of q and k, and its inverse."""
    if not any(f".{each}_proj." in name for each in "qk"):
        return values
    heads = values.shape[0] // dim
    shape = (heads, dim // 2, 2) if back else (heads, 2, dim // 2)
    return values.reshape(*shape, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def add_tokenizer(writer: gguf.GGUFWriter, source: Path) -> None:
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    added = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    tokens = sorted({**vocab, **added}.items(), key=lambda item: item[1])
    special = {token["content"] for token in tokenizer["added_tokens"] if token["special"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([token for token, _ in tokens])
    writer.add_token_types([gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL
                            for token, _ in tokens])
    writer.add_token_merges([" ".join(merge) if isinstance(merge, list) else merge
                             for merge in tokenizer["model"]["merges"]])
    settings = json.loads((source / "tokenizer_config.json").read_text())
    for name, add in (("bos_token", writer.add_bos_token_id), ("eos_token", writer.add_eos_token_id)):
        if settings.get(name):
            add(dict(tokens)[settings[name]])
    template = source / "chat_template.jinja"
    if template.exists():
        writer.add_chat_template(template.read_text())


def tensors_of(meant: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in meant.items()}
