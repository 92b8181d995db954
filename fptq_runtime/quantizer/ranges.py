"""How large a static activation range to choose: the whole range, or a smaller one that clips the rare and rounds the
rest more finely. Codes are symmetric, so a range is one number, the magnitude that gets the largest code."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal

import numpy as np
import torch

from fptq_runtime.kernels.base import Float64Array

RangeMethod = Literal["minmax", "percentile", "mse", "kl", "aciq"]

QUANTILE = 0.999
MSE_BINS = 1 << 13  # of |x|; the 201 that are published for both signs are wider than an int8 step
MSE_FRACTIONS = np.arange(1, 101) / 100  # of max |x|
KL_BINS = 1001  # of both signs
KL_SMOOTHING = 1e-4


def choose_range(method: RangeMethod, amax: float, sample: torch.Tensor, quantile: float, num_bits: int = 8) -> float:
    """The range for an input whose largest magnitude is `amax`, of which `sample` [rows, K] holds some rows. Positive
    where the input is not all zero, never above amax.

    percentile: the quantile, over tokens, of each token's max |x|. mse, kl, aciq: as the functions below say.
    """
    if method == "minmax" or not amax > 0:
        return amax
    chosen = {
        "percentile": lambda: token_quantile(sample, amax, quantile),
        "mse": lambda: mse_range(sample, amax, num_bits),
        "kl": lambda: kl_range(sample, amax, num_bits),
        "aciq": lambda: aciq_range(sample, num_bits),
    }[method]()
    return min(chosen, amax) if chosen > 0 else amax


def token_quantile(sample: torch.Tensor, amax: float, quantile: float) -> float:
    """Hazen's quantile of the sampled tokens' max |x|, beyond the largest of them towards `amax` of all tokens."""
    largest = np.sort(sample.abs().amax(-1).double().numpy())
    places = (np.arange(len(largest)) + 0.5) / len(largest)
    return float(np.interp(quantile, [*places, 1.0], [*largest, amax]))


def mse_range(sample: torch.Tensor, amax: float, num_bits: int) -> float:
    """The fraction of amax, from 0.01 to 1, that gives the least mean squared error. The error is integrated over the
    bins of a histogram, taking values as uniform within a bin."""
    edges, most = np.linspace(0, amax, MSE_BINS + 1), 1 << num_bits - 1
    negative, positive = (torch.histc(x, MSE_BINS, 0, amax).double().numpy() for x in (-sample, sample))
    errors = []
    for fraction in MSE_FRACTIONS:
        scale = amax * fraction / (most - 0.5)
        errors.append(np.diff(_integrated_error(edges, scale, most)) @ negative
                      + np.diff(_integrated_error(edges, scale, most - 1)) @ positive)
    return float(amax * MSE_FRACTIONS[int(np.argmin(errors))])


def _integrated_error(x: Float64Array, scale: float, last: int) -> Float64Array:
    """∫₀ˣ (t - Q(t))² dt for x >= 0 and codes up to `last`: s³/12 a whole step, r³/3 within one and beyond the last."""
    codes = np.minimum(np.floor(x / scale + 0.5), last)
    integrated: Float64Array = codes * scale**3 / 12 + (x - codes * scale) ** 3 / 3
    return integrated


def kl_range(sample: torch.Tensor, amax: float, num_bits: int) -> float:
    """The range with the least KL divergence of the clipped histogram from its own quantized form (as TensorRT and
    MXNet calibrate): what is clipped counts in the end bins, the bins are merged to 2^b - 1 and spread again over those
    that were not empty, zeros are smoothed."""
    counts = torch.histc(sample.flatten(), KL_BINS, -amax, amax).double().numpy()
    middle, levels = KL_BINS // 2, (1 << num_bits) - 1
    totals = np.concatenate(([0.0], np.cumsum(counts)))
    divergences = []
    for half in range(min(levels // 2, middle), middle + 1):
        first, last = middle - half, middle + half + 1
        inside = counts[first:last]
        folded = inside.copy()
        folded[0] += totals[first]
        folded[-1] += totals[-1] - totals[last]
        occupied = folded > 0
        level = np.arange(len(inside)) * levels // len(inside)
        spread = np.bincount(level, inside) / np.maximum(np.bincount(level, occupied), 1)
        divergences.append(_divergence(folded, np.where(occupied, spread[level], 0)))
    half = min(levels // 2, middle) + int(np.argmin(divergences))
    return float(amax * (2 * half + 1) / KL_BINS)


def _divergence(p: Float64Array, q: Float64Array) -> float:
    """KL(p || q) of two histograms after smoothing."""
    p, q = _smoothed(p), _smoothed(q)
    return float((p * np.log(p / q)).sum())


def _smoothed(counts: Float64Array) -> Float64Array:
    """As a distribution, KL_SMOOTHING in every empty bin, which the others give in equal parts."""
    distribution = counts / max(counts.sum(), 1e-300)
    empty = distribution == 0
    given = KL_SMOOTHING * empty.sum() / max(len(counts) - empty.sum(), 1)
    distribution = np.where(empty, KL_SMOOTHING, np.maximum(distribution - given, KL_SMOOTHING))
    smoothed: Float64Array = distribution / distribution.sum()
    return smoothed


def aciq_range(sample: torch.Tensor, num_bits: int) -> float:
    """ACIQ (arXiv 1810.05723): the least expected squared error for the Gaussian or the Laplacian, whichever has the
    sample's mean |x| for its root mean square."""
    magnitude = float(sample.abs().mean(dtype=torch.float64))
    deviation = math.sqrt(float(sample.square().mean(dtype=torch.float64)))
    gaussian, laplacian = math.sqrt(2 / math.pi), math.sqrt(0.5)  # mean |x| for a deviation of 1
    if magnitude > deviation * (gaussian + laplacian) / 2:
        return deviation * aciq_optimum("gauss", num_bits)
    return magnitude * aciq_optimum("laplace", num_bits)


@lru_cache
def aciq_optimum(distribution: Literal["gauss", "laplace"], num_bits: int) -> float:
    """The range, in σ of a Gaussian or b of a Laplacian, where clipping and rounding error, α² / (3 · 4^bits), balance.

    The derivative of their sum rises, so bisection finds its zero.
    """

    def slope(a: float) -> float:
        rounding = 2 * a / 3 / (1 << 2 * num_bits)
        if distribution == "laplace":
            return rounding - 2 * math.exp(-a)
        density = math.exp(-a * a / 2) / math.sqrt(2 * math.pi)
        return rounding - 4 * (density - a * math.erfc(a / math.sqrt(2)) / 2)

    low, high = 0.0, 64.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if slope(middle) > 0 else (middle, high)
    return low
