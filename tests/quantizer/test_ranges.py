"""Range estimators. Oracles: every candidate by itself in double precision, numpy's quantile, numerical integration,
and the constants that ACIQ publishes."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fptq_runtime.quantizer import ranges
from fptq_runtime.quantizer.ranges import RangeMethod, aciq_optimum, choose_range

METHODS: tuple[RangeMethod, ...] = get_args(RangeMethod)


def drawn(kind: str, rows: int = 512, k: int = 64, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    x = torch.randn(rows, k)
    if kind == "laplace":
        x = torch.distributions.Laplace(0.0, 1.0).sample((rows, k))
    elif kind == "outlier":
        x[3, 5] = -60
    elif kind == "channel":
        x[:, 7] *= 30
    elif kind == "relu":
        x = x.relu()
    return x


KINDS = ["gauss", "laplace", "outlier", "channel", "relu"]


def chosen(method: RangeMethod, x: torch.Tensor, quantile: float = 0.999, num_bits: int = 8) -> float:
    return choose_range(method, float(x.abs().max()), x, quantile, num_bits)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_bits", [4, 8])
def test_mse_is_the_best_of_all_fractions(kind: str, num_bits: int) -> None:
    """Within 1 % of the least error that quantizing every value with every fraction finds."""
    x = drawn(kind)
    values, amax, limit = x.double().numpy(), float(x.abs().max()), 2 ** (num_bits - 1)

    def error(r: float) -> float:
        scale = r / (limit - 0.5)
        return float(np.square(np.clip(np.round(values / scale), -limit, limit - 1) * scale - values).mean())

    least = min(error(amax * i / 100) for i in range(1, 101))
    assert error(chosen("mse", x, num_bits=num_bits)) <= 1.01 * least


@pytest.mark.parametrize("kind", KINDS)
def test_kl_in_loops(kind: str) -> None:
    """The published procedure bin by bin."""
    x = drawn(kind)
    amax = float(x.abs().max())
    counts = torch.histc(x.flatten(), 1001, -amax, amax).double().tolist()

    def smooth(values: list[float]) -> list[float]:
        total = sum(values)
        values = [v / total for v in values]
        empty = values.count(0.0)
        taken = 1e-4 * empty / max(len(values) - empty, 1)
        values = [1e-4 if v == 0 else max(v - taken, 1e-4) for v in values]
        return [v / sum(values) for v in values]

    divergences = {}
    for half in range(127, 501):
        inside = counts[500 - half : 501 + half]
        p = list(inside)
        p[0] += sum(counts[: 500 - half])
        p[-1] += sum(counts[501 + half :])
        q = [0.0] * len(p)
        merged: dict[int, list[int]] = {}
        for i in range(len(p)):
            merged.setdefault(i * 255 // len(p), []).append(i)
        for bins in merged.values():
            filled = [i for i in bins if p[i] > 0]
            for i in filled:
                q[i] = sum(inside[j] for j in bins) / len(filled)
        divergences[half] = sum(a * np.log(a / b) for a, b in zip(smooth(p), smooth(q), strict=True))
    best = min(divergences, key=lambda half: divergences[half])
    assert ranges.kl_range(x, amax, 8) == pytest.approx(amax * (2 * best + 1) / 1001)


def test_kl_clips_a_lone_outlier() -> None:
    assert chosen("kl", drawn("outlier")) < 0.4 * 60
    assert chosen("kl", torch.empty(512, 64).uniform_(-1, 1)) > 0.95


@pytest.mark.parametrize(("distribution", "published"), [
    ("gauss", {2: 1.710635, 3: 2.151593, 4: 2.559136, 8: 3.924037}),
    ("laplace", {2: 2.830683, 3: 3.897229, 4: 5.028640, 8: 9.896760}),
])
def test_aciq_constants(distribution: str, published: dict[int, float]) -> None:
    for bits, optimum in published.items():
        assert aciq_optimum(distribution, bits) == pytest.approx(optimum, abs=2e-6)  # type: ignore[arg-type]


@pytest.mark.parametrize("distribution", ["gauss", "laplace"])
@pytest.mark.parametrize("num_bits", [4, 8])
def test_aciq_minimises_the_expected_error(distribution: str, num_bits: int) -> None:
    """Clipping integrated numerically, rounding as a uniform error of α / 2^(bits-1)."""
    x = np.linspace(0, 60, 600001)
    density = np.exp(-x) / 2 if distribution == "laplace" else np.exp(-x * x / 2) / np.sqrt(2 * np.pi)

    def error(a: float) -> float:
        clipped = 2 * np.sum(np.maximum(x - a, 0) ** 2 * density) * (x[1] - x[0])
        return float(clipped + (a / 2 ** (num_bits - 1)) ** 2 / 12)

    best = aciq_optimum(distribution, num_bits)  # type: ignore[arg-type]
    assert error(best) < min(error(best * 0.98), error(best * 1.02))


def test_aciq_knows_its_distribution() -> None:
    for kind, optimum in (("gauss", 3.924), ("laplace", 9.897)):
        x = 2.5 * drawn(kind, 4096)
        x[0, 0] = 1000  # a range to clip
        assert chosen("aciq", x[1:]) <= float(x[1:].abs().max())
        assert ranges.aciq_range(x[1:], 8) == pytest.approx(2.5 * optimum, rel=0.02)


@pytest.mark.parametrize("quantile", [0.9, 0.99, 0.995])
def test_percentile_is_of_tokens(quantile: float) -> None:
    x = drawn("laplace")
    expected = np.quantile(x.abs().amax(-1).double().numpy(), quantile, method="hazen")
    assert chosen("percentile", x, quantile) == pytest.approx(expected, rel=1e-12)


def test_percentile_reaches_the_maximum_that_no_sampled_row_holds() -> None:
    x = drawn("gauss", 100)
    largest = float(x.abs().max())
    assert choose_range("percentile", 50.0, x, 1.0) == 50
    assert largest < choose_range("percentile", 50.0, x, 0.9999) < 50


@settings(max_examples=40)
@given(method=st.sampled_from(METHODS), kind=st.sampled_from(KINDS), seed=st.integers(0, 99),
       exponent=st.integers(-20, 20), unseen=st.floats(1, 1e3), num_bits=st.sampled_from([4, 8]))
def test_invariants(method: RangeMethod, kind: str, seed: int, exponent: int, unseen: float, num_bits: int) -> None:
    """Positive, never above the largest magnitude, in x's own units, and blind to its sign; mse is not, for negative
    values have one code more."""
    x = drawn(kind, 40, 8, seed)
    amax = float(x.abs().max()) * unseen
    found = choose_range(method, amax, x, 0.99, num_bits)
    assert 0 < found <= amax
    if method == "minmax":
        assert found == amax
    unit = 2.0**exponent
    assert choose_range(method, amax * unit, x * unit, 0.99, num_bits) == pytest.approx(found * unit, rel=1e-6)
    if method not in ("mse", "kl"):  # kl's bins are open on one side
        assert choose_range(method, amax, -x, 0.99, num_bits) == pytest.approx(found, rel=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_all_zeros(method: RangeMethod) -> None:
    assert choose_range(method, 0.0, torch.zeros(4, 4), 0.99) == 0
    assert choose_range(method, 3.0, torch.zeros(4, 4), 0.99) > 0
