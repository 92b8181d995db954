"""A rotation changes no logit and takes the outliers away. Oracles: the model itself, numpy's dense matrices."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fptq_runtime.config import ModelConfig
from fptq_runtime.kernels.reference import ReferenceBackend
from fptq_runtime.models.decoder import Block, Decoder, prepare_block, prepare_head, prepare_stem
from fptq_runtime.models.golden import prompt_logits
from fptq_runtime.models.loader import Checkpoint, load_block, load_head, load_stem
from fptq_runtime.quantizer.calibrate import BLOCK_KINDS, HiddenStates, observe_block
from fptq_runtime.quantizer.steps.base import QuantizationError
from fptq_runtime.quantizer.steps.rotation import RandomHadamard, Rotation
from tests.models.hf import FAMILIES, save_random
from tests.quantizer.models import DEMO, transplant_outliers

ROTATABLE = [family for family in FAMILIES if family != "bloom"]


def rotated(path: Path, step: Rotation | None) -> Decoder:
    checkpoint, backend = Checkpoint(path), ReferenceBackend()
    config: ModelConfig = checkpoint.model_config
    stem, head = prepare_stem(load_stem(checkpoint), backend), prepare_head(load_head(checkpoint), backend)
    blocks: list[Block] = [prepare_block(load_block(checkpoint, i), backend) for i in range(config.num_layers)]
    if step is not None:
        step.check(config)
        step.transform_stem(config, stem)
        for index, block in enumerate(blocks):
            step.transform_block(config, index, block)
        step.transform_head(config, head)
    return Decoder(config, stem, blocks, head)


@pytest.mark.parametrize("heads", [True, False])
@pytest.mark.parametrize("family", ROTATABLE)
def test_logits_stay(family: str, heads: bool, tmp_path: Path) -> None:
    """hidden_size 96 = 32 · 3. Biases are random, and not zero."""
    save_random(family, tmp_path)
    prompt = torch.randint(3, 211, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    backend = ReferenceBackend()
    before, after = (prompt_logits(rotated(tmp_path, step), backend, prompt) for step in (None, Rotation(heads=heads)))
    assert np.abs(before - after).max() <= 1e-4


@settings(max_examples=25, deadline=None)
@given(size=st.integers(1, 200), seed=st.integers(0, 99))
def test_orthogonal(size: int, seed: int) -> None:
    matrix = RandomHadamard(size, seed)(torch.eye(size)).double().numpy()
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(size), atol=1e-5)


def test_hadamard_is_sylvesters() -> None:
    matrix = RandomHadamard(8, 0)(torch.eye(8)).numpy() * 8**0.5
    sylvester = np.ones((1, 1))
    for _ in range(3):
        sylvester = np.kron([[1, 1], [1, -1]], sylvester)
    np.testing.assert_allclose(matrix, matrix[:, :1] * sylvester, atol=1e-5)


def test_seeds_differ() -> None:
    one, other = (RandomHadamard(96, seed)(torch.eye(96)) for seed in (0, 1))
    assert not torch.allclose(one, other)


def test_bloom_is_refused(tmp_path: Path) -> None:
    save_random("bloom", tmp_path)
    with pytest.raises(QuantizationError, match="BloomForCausalLM"):
        rotated(tmp_path, Rotation())


def test_outliers_fall(tmp_path: Path) -> None:
    """The kurtosis of what qkv and up read, in every layer of the demo with outlier channels; a Gaussian has 3."""
    source = transplant_outliers(DEMO, tmp_path / "outliers")
    windows = torch.randint(3, 4000, (4, 64), generator=torch.Generator().manual_seed(0)).tolist()

    def kurtosis(step: Rotation | None) -> torch.Tensor:
        decoder = rotated(source, step)
        states = HiddenStates(decoder.config, windows)
        states.run_stem(decoder.stem)
        found = []
        for block in decoder.blocks:
            stats = observe_block(states, block)
            samples = [stats[kind].sample for kind in BLOCK_KINDS if kind in ("qkv", "up")]
            found += [float(x.pow(4).mean() / x.square().mean().square()) for x in samples]
            states.run_block(block)
        return torch.tensor(found)

    before, after = kurtosis(None), kurtosis(Rotation())
    assert before.min() > 20
    assert after.max() < 10
