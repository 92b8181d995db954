"""GPTQ against a textbook's loop in double precision, and on what it exists for: correlated inputs."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fptq_runtime.artifact.numerics import code_range, dequantize, quantize, quantize_weight, unpack_codes
from fptq_runtime.artifact.scheme import NumberType
from fptq_runtime.kernels.base import Linear, QuantizedWeight, StepInput
from fptq_runtime.models.block import Block
from fptq_runtime.models.loader import Checkpoint
from fptq_runtime.quantizer.calibrate import HiddenStates, InputStats, Moments, Rows, block_inputs
from fptq_runtime.quantizer.steps.activations import Activations
from fptq_runtime.quantizer.steps.base import QuantizationError, Rounding, Target
from fptq_runtime.quantizer.steps.gptq import Gptq, descend, fit_scale, round_columns, triangular_factor
from fptq_runtime.quantizer.steps.weights import Weights
from fptq_runtime.quantizer.walk import Walk
from tests.quantizer.models import save_model
from tests.quantizer.test_folds import work_on


def inputs_of(states: HiddenStates, block: Block) -> list[dict[str, torch.Tensor]]:
    """What each linear reads of each minibatch."""
    return [{name: rows.x for name, rows in read.items()} for read in block_inputs(states, block)]


def correlated(rows: int, k: int, seed: int) -> torch.Tensor:
    """Inputs that lie near a plane of a quarter of their dimensions."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(rows, k // 4, generator=generator) @ torch.randn(k // 4, k, generator=generator)
    return shared + 0.3 * torch.randn(rows, k, generator=generator)


def target_of(weight: torch.Tensor, x: torch.Tensor, num_bits: Literal[4, 8] = 4, group: int | None = 32) -> Target:
    stats = InputStats(x.amin(0), x.amax(0), x.sum(0).double(), x.square().sum(0).double(), x.shape[0], 0, x)
    stats.moments = Moments(2 * x.T @ x)
    return Target("down", Linear("layers.0.down", weight), ("down",), stats, Rounding(num_bits, group))


def counts(x: torch.Tensor, batch: StepInput) -> torch.Tensor:
    """How often each row [rows, K] of a minibatch counts: a first token 100 times, and no row for more than three times
    the median's length. [rows, 1]"""
    lengths = x.norm(dim=1)
    long = (3 * lengths.median() / lengths).clamp_max(1).square()
    return (long * torch.from_numpy(np.where(batch.positions == 0, 100.0, 1.0)).float())[:, None]


def textbook(weight: np.ndarray, scale: np.ndarray, hessian: np.ndarray, damp: float, order: np.ndarray) -> np.ndarray:
    """As the paper writes it: each column's error over [H⁻¹]jj goes into the columns left, then row and column j are
    eliminated from H⁻¹. scale is each weight's own. Returns codes."""
    left = weight.astype(np.float64).copy()
    codes = np.zeros(weight.shape, np.int64)
    inverse = np.linalg.inv(hessian.astype(np.float64) + damp * np.eye(len(hessian)))
    for j in order:
        codes[:, j] = np.clip(np.rint(left[:, j] / scale[:, j]), -8, 7)
        error = (left[:, j] - codes[:, j] * scale[:, j]) / inverse[j, j]
        left -= np.outer(error, inverse[j])
        inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return codes


@settings(max_examples=15)
@given(seed=st.integers(0, 999), k=st.sampled_from([32, 96, 160]), ordered=st.booleans())
def test_textbook(seed: int, k: int, ordered: bool) -> None:
    """160 columns are more than one block. A value within float's reach of a rounding boundary may fall to either
    side, and then the columns after it differ too; the errors of both must be the same to 1 %."""
    torch.manual_seed(seed)
    weight, x = torch.randn(6, k), correlated(200, k, seed)
    hessian = 2 * x.T @ x
    damp = 0.01 * float(hessian.diagonal().mean())
    order = hessian.diagonal().argsort(descending=True) if ordered else torch.arange(k)
    scale = quantize_weight(weight, 4, 32, None, torch.bfloat16)[1]
    factor = triangular_factor(hessian[order][:, order], damp)
    assert factor is not None
    codes = round_columns(weight, scale, 4, factor, order)
    each = scale.double().repeat_interleave(32, 1).numpy()
    expected = textbook(weight.numpy(), each, hessian.numpy(), damp, order.numpy())
    assert (codes.numpy() == expected).mean() > 0.9
    errors = [((c * each - weight.double().numpy()) @ x.double().numpy().T) for c in (codes.numpy(), expected)]
    assert np.square(errors[0]).sum() == pytest.approx(np.square(errors[1]).sum(), rel=1e-2)


@pytest.mark.parametrize("group", [None, 32])
@pytest.mark.parametrize("num_bits", [4, 8])
def test_uncorrelated_inputs_are_rounded_to_nearest(num_bits: Literal[4, 8], group: int | None) -> None:
    torch.manual_seed(0)
    weight, spread = torch.randn(5, 96), torch.rand(96) + 0.1
    target = target_of(weight, torch.diag(spread), num_bits, group)
    codes, scale = Gptq(clip="none")._round(target)
    nearest, same = quantize_weight(weight, num_bits, group, None, torch.bfloat16)
    assert torch.equal(codes, nearest)
    assert torch.equal(scale, same)


@pytest.mark.parametrize("refits", [0, 2])
def test_beats_nearest_on_correlated_inputs(refits: int) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(64, 128), correlated(1000, 128, 0)
    error = []
    for step in (Weights(clip="mse"), Gptq(refits=refits)):
        codes, scale = step._round(target_of(weight, x))
        error.append(float(((dequantize(codes, scale) - weight) @ x.T).square().sum()))
    assert error[1] < 0.4 * error[0]


def test_fitted_scales_are_least_squares() -> None:
    """Against numpy's lstsq on the outputs, row by row; a group whose codes are all zero keeps its scale."""
    torch.manual_seed(0)
    weight, x = torch.randn(4, 96), correlated(300, 96, 1)
    codes, scale = quantize_weight(weight, 4, 32, torch.full((4, 3), 0.5))
    codes[0, :32] = 0
    fitted = fit_scale(weight, codes, scale, 2 * x.T @ x)
    assert fitted[0, 0] == scale[0, 0]
    for row in range(1, 4):
        by_group = torch.stack([x[:, g : g + 32] @ codes[row, g : g + 32].float() for g in (0, 32, 64)], 1)
        expected = np.linalg.lstsq(by_group.numpy(), (x @ weight[row]).numpy(), rcond=None)[0]
        np.testing.assert_allclose(fitted[row], expected, rtol=2e-2)


@pytest.mark.parametrize("grid", ["int", "float"])
def test_descending_ends_where_no_single_code_is_better(grid: NumberType) -> None:
    """160 columns are more than one block. Oracle: every code of the grid tried in every place."""
    torch.manual_seed(0)
    weight, x = torch.randn(5, 160), correlated(300, 160, 0)
    hessian = x.T @ x
    codes, scale = quantize_weight(weight, 4, 32, None, torch.bfloat16, grid)

    def errors(codes: torch.Tensor) -> torch.Tensor:
        error = (weight - dequantize(codes, scale)).double()
        return ((error @ hessian.double()) * error).sum(-1)

    found = [errors(codes)]
    for _ in range(40):
        codes = descend(weight, codes, scale, 4, hessian, grid)
        found.append(errors(codes))
    assert codes.dtype == (torch.int8 if grid == "int" else torch.float8_e4m3fn)
    assert all(bool((after <= before * (1 + 1e-5)).all()) for before, after in itertools.pairwise(found))
    assert bool((found[-1] < 0.5 * found[0]).all())
    low, high = code_range(4, grid)
    for code in quantize(torch.linspace(low, high, 61), torch.ones(1), 4, grid).float().unique():
        for j in range(160):
            tried = codes.float()
            tried[:, j] = code
            assert bool((errors(tried.to(codes.dtype)) >= found[-1] * (1 - 1e-4)).all())


def test_descents_lose_less() -> None:
    """Than the rounding that they begin with, and again with scales that were fitted after each."""
    torch.manual_seed(1)
    weight, x = torch.randn(32, 96), correlated(400, 96, 1)
    losses = []
    for settings_ in ({}, {"descents": 3}, {"descents": 3, "refits": 2}):
        target = target_of(weight, x)
        Gptq(group_size=32, **settings_)._quantize(target)
        quantized = target.linear.weight
        assert isinstance(quantized, QuantizedWeight)
        made = dequantize(unpack_codes(torch.as_tensor(quantized.packed), 4, 96), torch.as_tensor(quantized.scale))
        losses.append(float((x @ (made - weight).T).square().sum()))
    assert losses[2] < losses[1] < losses[0]


def test_dead_inputs_get_zero_weights() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(5, 64), correlated(200, 64, 0)
    weight[:, 7] = 100  # would take its group's whole range
    x[:, 7] = 0
    codes, scale = Gptq()._round(target_of(weight, x))
    assert not codes[:, 7].any()
    assert scale.max() < 1


def test_a_singular_hessian_is_damped_more_and_says_so() -> None:
    torch.manual_seed(0)
    target = target_of(torch.randn(5, 64), correlated(200, 64, 0))
    assert target.stats.moments is not None
    values, vectors = torch.linalg.eigh(target.stats.moments.hessian)
    values[0] = -0.05 * values.mean()
    target.stats.moments = Moments(vectors @ values.diag() @ vectors.T)
    codes, _ = Gptq()._round(target)
    assert "damped by 0.1" in target.reason
    assert codes.any()


@pytest.mark.parametrize("value", [float("nan"), -1e6])
def test_a_hopeless_hessian_is_an_error(value: float) -> None:
    """Never rounding to nearest instead."""
    target = target_of(torch.randn(5, 64), correlated(200, 64, 0))
    assert target.stats.moments is not None
    target.stats.moments.hessian[3, 4] = target.stats.moments.hessian[4, 3] = value
    with pytest.raises(QuantizationError, match="down: the Hessian") as error:
        Gptq()._round(target)
    assert "\n" not in str(error.value)


def test_hessians_are_of_the_quantized_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Coarse static scales, so that the difference is large; every linear of the block is then rounded with its own."""
    _, work = work_on("llama", tmp_path)
    seen: dict[str, torch.Tensor] = {}
    rounded = Gptq._round

    def spy(self: Gptq, target: Target) -> object:
        assert target.stats.moments is not None
        seen[target.name] = target.stats.moments.hessian.clone()
        return rounded(self, target)

    monkeypatch.setattr(Gptq, "_round", spy)
    with torch.inference_mode():
        Activations(scheme="static").apply(work)
        expected = inputs_of(work.states, work.block)
        batches = work.states.batches
        floats = {kind: target.weight for kind, target in work.targets.items()}
        Gptq().apply(work)
    for kind, target in work.targets.items():
        x = torch.cat([inputs[kind] for inputs in expected])
        hessian = sum(2 * inputs[kind].T @ (inputs[kind] * counts(inputs[kind], batch))
                      for batch, inputs in zip(batches, expected, strict=True))
        torch.testing.assert_close(seen[kind].triu(), hessian.triu(), rtol=1e-3, atol=1e-2)
        weight = target.linear.weight
        assert isinstance(weight, QuantizedWeight)
        codes = unpack_codes(weight.packed, 4, weight.k)
        error = (dequantize(codes, weight.scale) - floats[kind]) @ x.T
        nearest = Rounding()(floats[kind]) - floats[kind]
        assert error.square().sum() < (nearest @ x.T).square().sum()


def test_bands_of_a_hessian(monkeypatch: pytest.MonkeyPatch) -> None:
    """Added up band by band, it is the same where it counts, and so are the codes."""
    torch.manual_seed(0)
    weight, x = torch.randn(8, 96), correlated(300, 96, 0)
    batch = StepInput.whole([[0] * 100, [0] * 200])
    monkeypatch.setattr("fptq_runtime.quantizer.calibrate.BAND", 40)
    banded = Moments.zeros(96, drift=False)
    banded.add(Rows(x, batch.positions))
    whole = Moments(2 * x.T @ (x * counts(x, batch)))
    torch.testing.assert_close(banded.hessian.triu(), whole.hessian.triu(), rtol=1e-4, atol=1e-3)
    assert not torch.allclose(banded.hessian, whole.hessian)
    codes = []
    for moments in (whole, banded):
        target = target_of(weight, x)
        target.stats.moments = moments
        codes.append(Gptq()._round(target)[0])
    assert (codes[0] == codes[1]).float().mean() > 0.9


@pytest.mark.parametrize("drift", [False, True])
def test_moments_follow_a_fold(drift: bool) -> None:
    """Dividing the inputs afterwards is dividing them before."""
    torch.manual_seed(0)
    x, exact, scale = torch.randn(50, 32), torch.randn(50, 32), torch.rand(32) + 0.5
    folded = InputStats(x.amin(0), x.amax(0), x.sum(0).double(), x.square().sum(0).double(), 50, 0, x,
                        Moments(2 * x.T @ x, 2 * (exact - x).T @ x if drift else None))
    folded.divide(scale)
    assert folded.moments is not None
    y = x / scale
    torch.testing.assert_close(folded.moments.hessian, 2 * y.T @ y)
    if drift:
        torch.testing.assert_close(folded.moments.drift, 2 * (exact / scale - y).T @ y)
    folded.shift(torch.ones(32))
    assert folded.moments is None  # observed again by whoever needs them


@pytest.mark.parametrize("spike", [1.0, 1e4])
def test_a_massive_first_token_decides_nothing_alone(spike: float) -> None:
    """Its length hardly matters: it is counted, and no more than that."""
    torch.manual_seed(0)
    x = torch.randn(64, 32)
    x[0] *= spike
    moments = Moments.zeros(32, drift=False)
    moments.add(Rows(x, StepInput.whole([[0] * 64]).positions))
    ordinary = 2 * 64 * 32
    assert 1 < float(moments.hessian.diagonal().sum()) / ordinary < 20


def test_asymmetric_aims_for_what_the_float_model_computes() -> None:
    """The inputs have drifted: 8 bits leave little but the least-squares weights, 4 bits are nearer than without."""
    torch.manual_seed(0)
    weight, exact = torch.randn(16, 64), correlated(500, 64, 0)
    x = exact @ (torch.eye(64) + 0.05 * torch.randn(64, 64)) + 0.1 * torch.randn(500, 64)
    drift = 2 * (exact - x).T @ x

    def rounded(num_bits: Literal[4, 8], moments: Moments) -> torch.Tensor:
        target = target_of(weight, x, num_bits)
        target.stats.moments = moments
        return dequantize(*Gptq(damp=1e-4, drift_damp=1e-4, asymmetric=1)._round(target))

    wanted = exact @ weight.T
    eight = rounded(8, Moments(2 * x.T @ x, drift))
    best = np.linalg.lstsq(x.double().numpy(), wanted.double().numpy(), rcond=None)[0].T
    assert np.abs(eight.numpy() - best).max() < 0.05 * np.abs(best).max()
    errors = [float((x @ rounded(4, moments).T - wanted).square().sum())
              for moments in (Moments(2 * x.T @ x, drift), Moments(2 * x.T @ x))]
    assert errors[0] < 0.7 * errors[1]


def test_sequential_observes_what_is_quantized_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each linear's moments are of the block as it will run: of the quantized block's inputs and the float block's."""
    states, work = work_on("llama", tmp_path)
    work.exact = copy.copy(states)
    work.exact.states = [state + 0.1 * torch.randn_like(state) for state in states.states]
    seen: dict[str, Moments] = {}
    rounded = Gptq._round

    def spy(self: Gptq, target: Target) -> object:
        assert target.stats.moments is not None
        seen[target.name] = copy.deepcopy(target.stats.moments)
        return rounded(self, target)

    monkeypatch.setattr(Gptq, "_round", spy)
    with torch.inference_mode():
        exact = inputs_of(work.exact, work.block)
        Activations(scheme="dynamic").apply(work)
        Gptq(asymmetric=True, sequential=True).apply(work)
        inputs = inputs_of(work.states, work.block)
    assert list(seen) == ["qkv", "o", "up", "down"]
    for kind in work.targets:
        hessian, drift = torch.zeros(()), torch.zeros(())
        for batch, x, wanted in zip(work.states.batches, inputs, exact, strict=True):
            counted = x[kind] * counts(x[kind], batch)
            hessian, drift = hessian + 2 * x[kind].T @ counted, drift + 2 * (wanted[kind] - x[kind]).T @ counted
        torch.testing.assert_close(seen[kind].hessian.triu(), hessian.triu(), rtol=1e-3, atol=1e-2)
        torch.testing.assert_close(seen[kind].drift, drift, rtol=1e-3, atol=1e-2)


def test_one_pass_observes_the_block_before_it_is_rounded(tmp_path: Path) -> None:
    """The walk's own moments are those of a block whose inputs are still floats."""
    save_model("llama", tmp_path)
    step = Gptq(asymmetric=0.25)
    walk = Walk(Checkpoint(tmp_path), (Activations(scheme="dynamic"), step), [[4, 5, 9, 7] * 8, [4, 7, 3] * 8], step)
    walk.stem()
    work = next(walk.blocks())
    with torch.inference_mode():
        plain = work.block.with_linears(lambda _, linear: replace(linear, act=None))
        inputs = inputs_of(work.states, plain)
    for kind, target in work.targets.items():
        moments = target.stats.moments
        assert moments is not None and moments.drift is not None
        hessian = sum(2 * x[kind].T @ (x[kind] * counts(x[kind], batch))
                      for batch, x in zip(work.states.batches, inputs, strict=True))
        torch.testing.assert_close(moments.hessian.triu(), hessian.triu(), rtol=1e-3, atol=1e-2)
        assert not moments.drift.any()  # nothing before the first block is quantized
