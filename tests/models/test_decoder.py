"""The decoder against transformers, on the reference backend in float32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from fptq_runtime.kernels.reference import ReferenceBackend
from fptq_runtime.models.loader import Checkpoint, load_model
from tests.models.hf import FAMILIES, save_random
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


def test_bloom_without_its_prefix_loads(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = save_random("bloom", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file(bare, tmp_path / "model.safetensors")
    assert_agrees(tmp_path, model, list(range(3, 40)))
