"""Families whose code comes with their checkpoints: transformers' Llama, Qwen2, SmolLM3, GLM and Granite are the
oracle, with their weights under the other names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

from fptq_runtime.artifact.io import verify
from fptq_runtime.kernels.reference import ReferenceBackend
from fptq_runtime.models.families import parse_config
from fptq_runtime.models.fields import ModelError
from fptq_runtime.models.loader import Checkpoint, CheckpointError, load_head
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


def joined(tensors: Tensors, layers: str, name: str, parts: tuple[str, ...] = ("weight",)) -> Tensors:
    """q, k and v of each layer in one."""
    for layer in range(3):
        for part in parts:
            three = [tensors.pop(f"model.layers.{layer}.self_attn.{each}_proj.{part}") for each in "qkv"]
            tensors[f"{layers}.{layer}.{name}.{part}"] = torch.cat(three)
    return tensors


def qwen(tensors: Tensors) -> tuple[Tensors, dict[str, Any]]:
    tensors = joined(tensors, "transformer.h", "attn.c_attn", ("weight", "bias"))
    return rename(tensors, ("model.layers", "transformer.h"), ("self_attn.o_proj", "attn.c_proj"),
                  ("mlp.down_proj", "mlp.c_proj"), ("mlp.gate_proj", "mlp.w2"), ("mlp.up_proj", "mlp.w1"),
                  ("input_layernorm", "ln_1"), ("post_attention_layernorm", "ln_2"),
                  ("model.embed_tokens", "transformer.wte"), ("model.norm", "transformer.ln_f")), {
                      "architectures": ["QWenLMHeadModel"], "model_type": "qwen", "kv_channels": 16, "no_bias": True,
                      "intermediate_size": 2 * 136, "layer_norm_epsilon": 1e-3, "rotary_emb_base": 300,
                      "rotary_pct": 1.0, "scale_attn_weights": True, "seq_length": 128, "use_dynamic_ntk": True,
                      "use_logn_attn": True, "max_position_embeddings": 4096, "rms_norm_eps": None,
                      "rope_parameters": None, "num_key_value_heads": None, "head_dim": None, "hidden_act": None}


def baichuan(tensors: Tensors) -> tuple[Tensors, dict[str, Any]]:
    return joined(tensors, "model.layers", "self_attn.W_pack"), {
        "architectures": ["BaiChuanForCausalLM"], "model_type": "baichuan", "rope_parameters": None, "head_dim": None,
        "num_key_value_heads": None}


def chatglm(tensors: Tensors) -> tuple[Tensors, dict[str, Any]]:
    tensors = joined(tensors, "transformer.encoder.layers", "self_attention.query_key_value", ("weight", "bias"))
    return rename(tensors, ("model.layers", "transformer.encoder.layers"), ("self_attn.o_proj", "self_attention.dense"),
                  ("mlp.gate_up_proj", "mlp.dense_h_to_4h"), ("mlp.down_proj", "mlp.dense_4h_to_h"),
                  ("model.embed_tokens", "transformer.embedding.word_embeddings"),
                  ("model.norm", "transformer.encoder.final_layernorm"), ("lm_head", "transformer.output_layer")), {
                      "architectures": ["ChatGLMModel"], "model_type": "chatglm", "num_layers": 3,
                      "padded_vocab_size": 260, "vocab_size": 260, "ffn_hidden_size": 136, "kv_channels": 16,
                      "seq_length": 128, "layernorm_epsilon": 1e-3, "multi_query_attention": True,
                      "multi_query_group_num": 2, "add_qkv_bias": True, "add_bias_linear": False, "rope_ratio": 0.05,
                      "post_layer_norm": True, "rmsnorm": True, "original_rope": True,
                      **dict.fromkeys(("num_hidden_layers", "intermediate_size", "num_key_value_heads", "head_dim",
                                       "rms_norm_eps", "rope_parameters", "attention_bias", "hidden_act",
                                       "max_position_embeddings"))}


CASES: list[tuple[str, dict[str, Any], Callable[[Tensors], tuple[Tensors, dict[str, Any]]]]] = [
    ("llama", {"attention_bias": True}, internlm2),
    ("llama", {}, exaone),
    ("granite", {"attention_multiplier": 0.25, "logits_scaling": 4.0}, minicpm),
    ("qwen2", {"num_key_value_heads": 6, "rms_norm_eps": 1e-3, "rope_parameters": {
        "rope_type": "default", "rope_theta": 300.0}}, qwen),
    ("llama", {"num_key_value_heads": 6}, baichuan),
    ("glm", {"attention_bias": True, "rms_norm_eps": 1e-3, "rope_parameters": {
        "rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}}, chatglm),
]


@pytest.mark.parametrize(("family", "changes", "as_stored"), CASES, ids=[
    "internlm2", "exaone", "minicpm", "qwen", "baichuan", "chatglm"])
def test_a_family_under_other_names(family: str, changes: dict[str, Any], as_stored: Any, tmp_path: Path) -> None:
    """In float, and through the quantizer."""
    model = save_model(family, tmp_path / "float", **changes)
    store(tmp_path / "float", *as_stored(load_file(tmp_path / "float" / "model.safetensors")))
    assert_agrees(tmp_path / "float", model, list(range(3, 60)))
    assert_quantizes(tmp_path)


def store(path: Path, tensors: Tensors, fields: dict[str, Any]) -> None:
    """Fields that are None are left out."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "model.safetensors",
              metadata={"format": "pt"})
    config = {**json.loads((path / "config.json").read_text()), **fields}
    (path / "config.json").write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


def assert_quantizes(tmp_path: Path) -> None:
    """`float` to `out`."""
    (tmp_path / "text.txt").write_text("It was a bright cold day in the wood, and the clock was striking. " * 20)
    manifest = quantize(tmp_path / "float", tmp_path / "out", "fptq", text=tmp_path / "text.txt", **SMALL)
    assert verify(tmp_path / "out") == manifest
    through_the_gate(tmp_path / "out", manifest, ReferenceBackend())


class WithAlibi(torch.nn.Module):
    """SmolLM3 without any rope is Llama, to whose causal mask transformers' MPT adds the bias of each head."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, token_ids: torch.Tensor) -> Any:
        count = token_ids.shape[1]
        bias = build_mpt_alibi_tensor(self.model.config.num_attention_heads, count)[None]
        causal = torch.full((count, count), -torch.inf).triu(1)
        return self.model(token_ids, attention_mask=bias + causal)


def test_baichuan_with_alibi_and_a_normalised_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Baichuan 2 of 13B. What is written is normalised already, and then rotated."""
    monkeypatch.setattr("fptq_runtime.models.renamed.BAICHUAN2_VOCABULARY", 260)
    model = save_model("smollm3", tmp_path / "float", no_rope_layers=[0, 0, 0], num_key_value_heads=6, head_dim=16,
                       use_sliding_window=False, sliding_window=None, tie_word_embeddings=False)
    tensors, _ = baichuan(load_file(tmp_path / "float" / "model.safetensors"))
    store(tmp_path / "float", tensors, {
        "architectures": ["BaichuanForCausalLM"], "model_type": "baichuan", "model_max_length": 128,
        **dict.fromkeys(("rope_parameters", "head_dim", "num_key_value_heads", "max_position_embeddings",
                         "no_rope_layers", "layer_types"))})
    with torch.no_grad():
        model.lm_head.weight.copy_(torch.nn.functional.normalize(model.lm_head.weight))
    assert_agrees(tmp_path / "float", WithAlibi(model), list(range(3, 60)))
    assert_quantizes(tmp_path)
    assert Checkpoint(tmp_path / "out").config["normalize_head"] is False


def baichuan2(path: Path, **changes: Any) -> PreTrainedModel:
    """Baichuan 2, whose head's rows are divided by their lengths."""
    model = save_model("llama", path, num_key_value_heads=6, **changes)
    store(path, *baichuan(load_file(path / "model.safetensors")))
    change_config(path, normalize_head=True)
    return model


def test_a_normalised_head_that_is_the_embedding(tmp_path: Path) -> None:
    """Only the head's rows are divided; an artifact has a matrix for each."""
    model = baichuan2(tmp_path / "float", tie_word_embeddings=True)
    change_config(tmp_path / "float", tie_word_embeddings=True)
    with torch.no_grad():
        model.lm_head.weight = torch.nn.Parameter(torch.nn.functional.normalize(model.lm_head.weight))
    assert_agrees(tmp_path / "float", model, list(range(3, 60)))
    quantize(tmp_path / "float", tmp_path / "out", "bf16", **SMALL)
    written = Checkpoint(tmp_path / "out")
    assert not written.tied
    lengths = np.linalg.norm(load_head(written).linears["head"].weight.astype(np.float32), axis=1)
    np.testing.assert_allclose(lengths, 1, atol=1e-2)


def test_a_normalised_head_that_is_quantized_is_refused(tmp_path: Path) -> None:
    """Nobody knows whether its rows were divided before."""
    baichuan2(tmp_path / "float")
    change_config(tmp_path / "float", normalize_head=False)
    (tmp_path / "text.txt").write_text("It was a bright cold day in the wood. " * 40)
    quantize(tmp_path / "float", tmp_path / "out", "w8-dynamic-range", text=tmp_path / "text.txt", **SMALL)
    change_config(tmp_path / "out", normalize_head=True)
    with pytest.raises(CheckpointError, match="lm_head: normalize_head"):
        load_head(Checkpoint(tmp_path / "out"))


def test_layers_without_attention_or_mlp(tmp_path: Path) -> None:
    """DeciLM. Llama computes the same where what is left out writes zeros, and narrow MLPs are filled up with them."""
    factors = [8.0, None, 2.0, None, 4.0]  # of hidden_size · 2 / 3, up to multiples of 256
    attends = [True, True, False, False, True]
    widths = [512, None, 256, None, 256]
    model = save_model("llama", tmp_path / "float", num_hidden_layers=5, intermediate_size=512)
    tensors = load_file(tmp_path / "float" / "model.safetensors")
    with torch.no_grad():
        for index, layer in enumerate(model.model.layers):
            prefix = f"model.layers.{index}."
            if not attends[index]:
                layer.self_attn.o_proj.weight.zero_()
                tensors = {name: tensor for name, tensor in tensors.items()
                           if not name.startswith((f"{prefix}self_attn", f"{prefix}input_layernorm"))}
            width = widths[index]
            layer.mlp.down_proj.weight[:, width or 0 :] = 0
            if width is None:
                tensors = {name: tensor for name, tensor in tensors.items()
                           if not name.startswith((f"{prefix}mlp", f"{prefix}post_attention_layernorm"))}
                continue
            for name in ("gate_proj", "up_proj"):
                tensors[f"{prefix}mlp.{name}.weight"] = tensors[f"{prefix}mlp.{name}.weight"][:width]
            tensors[f"{prefix}mlp.down_proj.weight"] = tensors[f"{prefix}mlp.down_proj.weight"][:, :width]
    store(tmp_path / "float", tensors, {
        "architectures": ["DeciLMForCausalLM"], "model_type": "nemotron-nas", "intermediate_size": None,
        "num_key_value_heads": None, "block_configs": [
            {"attention": {"n_heads_in_group": 3 if attended else None, "no_op": not attended,
                           "replace_with_linear": False, "num_sink_tokens": 0, "window_length": None},
             "ffn": {"ffn_mult": factor, "no_op": factor is None, "replace_with_linear": False, "sparsify": None}}
            for attended, factor in zip(attends, factors, strict=True)]})
    assert_agrees(tmp_path / "float", model, list(range(3, 60)))
    assert_quantizes(tmp_path)


@pytest.mark.parametrize(("change", "message"), [
    ({"attention": {"n_heads_in_group": 2}}, r"n_heads_in_group must be one divisor of 6 for all layers, not \[2, 3\]"),
    ({"attention": {"n_heads_in_group": 3, "window_length": 64}}, r"block_configs\[1\].attention: window_length 64"),
    ({"ffn": {"ffn_mult": 2.0, "replace_with_linear": True}}, r"block_configs\[1\].ffn: replace_with_linear True"),
    ({"ffn": {"ffn_mult": 2.0, "moe": {}}}, r"block_configs\[1\].ffn.moe is not known"),
    ({"ffn": None}, r"block_configs\[1\].ffn must be an object"),
])
def test_layers_that_decilm_cannot_have_here(change: dict[str, Any], message: str) -> None:
    layer = {"attention": {"n_heads_in_group": 3}, "ffn": {"ffn_mult": 2.0}}
    config = {"architectures": ["DeciLMForCausalLM"], "vocab_size": 64, "hidden_size": 96, "num_attention_heads": 6}
    assert parse_config({**config, "block_configs": [layer, layer]}).config.num_kv_heads == 2
    with pytest.raises(ModelError, match=message):
        parse_config({**config, "block_configs": [layer, {**layer, **change}]})


def test_minicpm_with_sparse_attention_is_refused(tmp_path: Path) -> None:
    save_model("granite", tmp_path)
    change_config(tmp_path, architectures=["MiniCPMForCausalLM"], dim_model_base=24, sparse_config={"topk": 64})
    with pytest.raises(ModelError, match="sparse_config"):
        Checkpoint(tmp_path)
