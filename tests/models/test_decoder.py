"""The decoder against transformers, on the reference backend in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from fptq_runtime.kernels.reference import ReferenceBackend
from fptq_runtime.models.loader import Checkpoint, CheckpointError, load_model
from tests.models.hf import FAMILIES, change_config, save_random
from tests.models.steps import logits_by_chunks

SHARED = Path(__file__).parents[3] / "shared" / "models"
DEMO = Path(__file__).parents[2] / "fptq_runtime" / "demo"
LENGTH = 70


def chunkings(length: int, seed: int = 0) -> dict[str, list[int]]:
    cuts = np.sort(np.random.default_rng(seed).choice(np.arange(1, length), 6, replace=False)).tolist()
    pieces = [b - a for a, b in zip([0, *cuts], [*cuts, length], strict=True)]
    return {"whole": [length], "chunked": pieces, "token by token": [1] * length}


def expected_logits(model: PreTrainedModel, token_ids: list[int]) -> np.ndarray:
    with torch.inference_mode():
        return model(torch.tensor([token_ids])).logits[0].float().numpy()


def assert_agrees(path: Path, model: PreTrainedModel, token_ids: list[int]) -> None:
    backend = ReferenceBackend()
    decoder = load_model(Checkpoint(path), backend)
    expected = expected_logits(model, token_ids)
    for name, chunks in chunkings(len(token_ids)).items():
        got = logits_by_chunks(decoder, backend, token_ids, chunks)
        assert np.abs(got - expected).max() <= 1e-4 * np.abs(expected).max(), name


@pytest.mark.parametrize("family", FAMILIES)
def test_random_model_agrees_with_transformers(family: str, tmp_path: Path) -> None:
    model = save_random(family, tmp_path)
    token_ids = torch.randint(0, 211, (LENGTH,), generator=torch.Generator().manual_seed(1)).tolist()
    assert_agrees(tmp_path, model, token_ids)


def test_mxfp4_experts_are_what_transformers_reads(tmp_path: Path) -> None:
    """Of random blocks and scales. Oracle: transformers' own widening, in its float model."""
    model = save_random("gpt-oss", tmp_path, hidden_size=64, intermediate_size=32, num_attention_heads=4)
    change_config(tmp_path, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    tensors, generator = load_file(tmp_path / "model.safetensors"), torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, k, rows = parameter.shape
            blocks = torch.randint(0, 256, (experts, rows, k // 32, 16), dtype=torch.uint8, generator=generator)
            scales = torch.randint(122, 126, (experts, rows, k // 32), dtype=torch.uint8, generator=generator)
            del tensors[name]
            tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            with torch.no_grad():
                parameter.copy_(convert_moe_packed_tensors(blocks, scales, dtype=torch.float32))
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_agrees(tmp_path, model, list(range(3, 40)))
    assert not Checkpoint(tmp_path).quantized, "it is a float source"


@pytest.mark.parametrize("name", ["tales-6m", "stories260k"])
def test_trained_model_agrees_with_transformers(name: str) -> None:
    path = DEMO if name == "tales-6m" else SHARED / name
    if not path.is_dir():
        pytest.skip(f"{path.name} lies outside the project and is not here")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    token_ids = torch.randint(3, model.config.vocab_size, (LENGTH,), generator=torch.Generator().manual_seed(1))
    assert_agrees(path, model, token_ids.tolist())


def test_sharded_checkpoint_loads(tmp_path: Path) -> None:
    model = save_random("qwen3", tmp_path, shard="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_agrees(tmp_path, model, list(range(3, 40)))


HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("stored", "warns"), [
    ("the embedding", False), ("the head", False), ("both", False), ("both, and they differ", True),
])
def test_heads_are_tied_as_transformers_ties_them(tmp_path: Path, caplog: pytest.LogCaptureFixture, tied: bool,
                                                  stored: str, warns: bool) -> None:
    """Where config.json says so and the checkpoint does not have another matrix for it; what is odd is said."""
    save_random("llama", tmp_path, tie_word_embeddings=True)
    change_config(tmp_path, tie_word_embeddings=tied)
    tensors = load_file(tmp_path / "model.safetensors")
    table = tensors.pop(EMBEDDING)
    other = torch.randn_like(table) if "differ" in stored else table.clone()
    tensors |= {EMBEDDING: table} if stored != "the head" else {}
    tensors |= {HEAD: other} if stored != "the embedding" else {}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    if not tied and stored in ("the embedding", "the head"):
        missing = HEAD if stored == "the embedding" else EMBEDDING
        # transformers makes a random matrix of what is missing, which nobody wants
        if missing == EMBEDDING:
            with pytest.raises(CheckpointError, match=missing):
                load_model(Checkpoint(tmp_path), ReferenceBackend())
        else:
            assert_agrees(tmp_path, tied_by_hand(tmp_path), list(range(3, 40)))
            assert any("the embedding is taken for it" in message for message in caplog.messages)
        return
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    caplog.clear()
    assert_agrees(tmp_path, model, list(range(3, 40)))
    assert Checkpoint(tmp_path).tied == (tied and "differ" not in stored)
    assert any(HEAD in message and "another matrix" in message for message in caplog.messages) == (warns and tied)


def tied_by_hand(path: Path) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    model.lm_head.weight = model.model.embed_tokens.weight
    return model


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral-full", "qwen2"])
def test_biases_that_are_not_announced_are_not_loaded(tmp_path: Path, family: str) -> None:
    """As transformers leaves them. (Qwen2's o_proj and MLP never have any.)"""
    save_random(family, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    stray = {"self_attn.q_proj": 96, "self_attn.o_proj": 96, "mlp.up_proj": 136, "mlp.down_proj": 96}
    for module, rows in stray.items():
        tensors.setdefault(f"model.layers.1.{module}.bias", torch.randn(rows, generator=generator))
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert_agrees(tmp_path, model, list(range(3, 40)))


@pytest.mark.parametrize("module", ["self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"])
def test_biases_that_are_announced_must_be_there(tmp_path: Path, module: str) -> None:
    save_random("llama-tied-bias", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[name := f"model.layers.1.{module}.bias"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"no tensor '{name}'"):
        load_model(Checkpoint(tmp_path), ReferenceBackend())


@pytest.mark.parametrize("fields", [
    {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, "rope_theta": 500.0},
    {"rope_parameters": {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 0.9,
                         "original_max_position_embeddings": 32}},
    {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 4.0}},
    {"rope_parameters": {"rope_type": "longrope", "rope_theta": 500.0, "original_max_position_embeddings": 64,
                         "short_factor": [1.0] * 8, "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0]}},
], ids=["rope_scaling wins", "yarn of transformers 4", "yarn", "dynamic", "longrope"])
def test_ropes(tmp_path: Path, fields: dict[str, Any]) -> None:
    """In a config.json that has its `rope_parameters` too; LENGTH is on longrope's long side."""
    save_random("llama", tmp_path)
    change_config(tmp_path, **fields)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager").eval()
    token_ids = torch.randint(0, 211, (LENGTH,), generator=torch.Generator().manual_seed(1)).tolist()
    assert_agrees(tmp_path, model, token_ids)


def test_bloom_without_its_prefix_loads(tmp_path: Path) -> None:
    model = save_random("bloom", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file(bare, tmp_path / "model.safetensors")
    assert_agrees(tmp_path, model, list(range(3, 40)))
