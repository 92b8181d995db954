"""The matrices, against numpy's, and that outliers go. That no logit changes is in test_transforms.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fptq_runtime.models.readout import Basis, Turn
from fptq_runtime.quantizer.steps.base import BlockWork, QuantizationError, Step
from fptq_runtime.quantizer.steps.rotation import RandomHadamard, Rotation
from tests.quantizer.models import DEMO, save_model, transplant_outliers
from tests.quantizer.walk import float_logits


@settings(max_examples=25)
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


@settings(max_examples=25)
@given(size=st.integers(1, 200), seed=st.integers(0, 99))
def test_a_basis_goes_there_and_back(size: int, seed: int) -> None:
    rotation, generator = RandomHadamard(size, seed), torch.Generator().manual_seed(seed)
    x, weight = (torch.randn(3, 2 * size, generator=generator) for _ in range(2))
    gains, scales = (torch.rand(2 * size, generator=generator) + 0.5 for _ in range(2))
    turn = Turn(rotation.signs.numpy(), rotation.odd.numpy())
    basis = Basis().divided(np.full(2 * size, 2, np.float32)).turned(gains.numpy() / 2, turn).divided(scales.numpy())
    y = basis.there(x.double().numpy())
    np.testing.assert_allclose(y, rotation((x / gains).reshape(-1, size)).reshape(3, -1) / scales, atol=1e-5)
    np.testing.assert_allclose(basis.back(y), x.numpy(), atol=1e-5)
    np.testing.assert_allclose(y @ basis.reader(weight.double().numpy()).T, x @ weight.T, atol=1e-4)


def test_seeds_differ() -> None:
    one, other = (RandomHadamard(96, seed)(torch.eye(96)) for seed in (0, 1))
    assert not torch.allclose(one, other)


def test_outliers_fall(tmp_path: Path) -> None:
    """The kurtosis of what qkv and up read, in every layer of the demo with outlier channels; a Gaussian has 3."""
    source = transplant_outliers(DEMO, tmp_path / "outliers")
    windows = torch.randint(3, 4000, (4, 64), generator=torch.Generator().manual_seed(0)).tolist()

    def kurtosis(*steps: Step) -> torch.Tensor:
        found = []

        def visit(work: BlockWork) -> None:
            for kind in ("qkv", "up"):
                x = work.targets[kind].stats.sample
                found.append(float(x.pow(4).mean() / x.square().mean().square()))

        float_logits(source, steps, windows, visit)
        return torch.tensor(found)

    before, after = kurtosis(), kurtosis(Rotation())
    assert before.min() > 20
    assert after.max() < 10


@pytest.mark.parametrize("family", ["bloom", "gemma3"])
def test_optional_leaves_alone_what_it_would_change(family: str, tmp_path: Path) -> None:
    save_model(family, tmp_path)
    windows = [[3, 4, 5, 6, 7, 8]]
    with pytest.raises(QuantizationError, match="rotation does not work on"):
        float_logits(tmp_path, (Rotation(),), windows)
    assert torch.equal(float_logits(tmp_path, (Rotation(optional=True),), windows), float_logits(tmp_path, (), windows))
