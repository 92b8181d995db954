"""Draw a token from one row of logits.

Row by row, and a pure function of the row, the sequence's own tokens, parameters and seed: what else is in the batch
cannot matter. The randomness of a position is Philox keyed by the seed with the position as its counter.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from fptq_runtime.engine.output import TokenLogprobs
from fptq_runtime.engine.request import Request, SamplingParams
from fptq_runtime.kernels.base import Float32Array

IdArray = npt.NDArray[np.intp]
# Tokens first sorted for top_p. The set it keeps is nearly always smaller; where not, eight times as many are tried.
FIRST_CANDIDATES = 256
STRETCH = 512  # tokens
GREEDY_BELOW = 1e-5  # vLLM's bound; a temperature that float32 rounds to 0 would divide by it
NOT_FINITE = "the model returned logits that are not finite"


def sample(logits: Float32Array, request: Request, eos_token_ids: Iterable[int]) -> int:
    """The next token of a sequence, given its last row of logits [V], which stays as it is. Raises ValueError where
    logits are not finite."""
    params = request.params
    best = int(logits.argmax())
    if not np.isfinite(logits[best]):  # argmax finds a NaN first
        raise ValueError(NOT_FINITE)
    row = _adjust(logits, request, eos_token_ids)
    if params.temperature < GREEDY_BELOW:
        return best if row is logits else int(row.argmax())
    return _draw(row, params, _uniform(request.seed, request.num_tokens))


def token_logprobs(logits: Float32Array, token_id: int, num_top: int) -> TokenLogprobs:
    """The model's own log-probabilities for one row [V]: x - max - log Σ exp(x - max). Raises ValueError where logits
    are not finite."""
    shifted = logits - logits.max()
    log_sum = float(np.log(np.exp(shifted).sum(dtype=np.float64)))
    if not np.isfinite(log_sum):
        raise ValueError(NOT_FINITE)
    top = top_indices(logits, num_top) if num_top else ()
    return TokenLogprobs(
        token_id,
        float(shifted[token_id]) - log_sum,
        tuple((int(i), float(shifted[i]) - log_sum) for i in top),
    )


def top_indices(row: Float32Array, k: int) -> IdArray:
    """Indices of the k largest values, best first, the lower index first on ties. No full sort unless k = V."""
    if k == 1:
        return np.array([row.argmax()])
    groups = 8 * k
    if groups >= row.size:
        return np.argsort(-row, kind="stable")[:k]
    # k of these groups have a maximum at or above the threshold, hence k values at least are.
    maxima = row[: row.size // groups * groups].reshape(-1, groups).max(axis=0)
    candidates = np.flatnonzero(row >= np.partition(maxima, -k)[-k])
    return candidates[np.argsort(-row[candidates], kind="stable")[:k]]


def _adjust(logits: Float32Array, request: Request, eos_token_ids: Iterable[int]) -> Float32Array:
    """Bias, suppressed ids and penalties, in vLLM's order; the very same array where none applies."""
    params = request.params
    row = logits
    suppressed: list[int] = []
    if request.num_output_tokens < params.min_tokens:
        suppressed = [*params.stop_token_ids, *(() if params.ignore_eos else eos_token_ids)]
    penalized = params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0
    if params.logit_bias or suppressed or penalized:
        row = logits.copy()
    if params.logit_bias:
        row[list(params.logit_bias)] += np.fromiter(params.logit_bias.values(), np.float32)
    if suppressed:
        row[suppressed] = -np.inf
    if params.repetition_penalty != 1:
        seen = np.unique(np.array(request.token_ids, dtype=np.intp))
        penalty = np.float32(params.repetition_penalty)
        row[seen] = np.where(row[seen] > 0, row[seen] / penalty, row[seen] * penalty)
    if request.num_output_tokens and (params.presence_penalty != 0 or params.frequency_penalty != 0):
        output = np.array(request.token_ids[request.num_prompt_tokens :], dtype=np.intp)
        seen, counts = np.unique(output, return_counts=True)
        row[seen] -= (params.presence_penalty + params.frequency_penalty * counts).astype(np.float32)
    return row


def _draw(row: Float32Array, params: SamplingParams, uniform: float) -> int:
    """Invert the cumulative distribution of softmax(row / temperature), cut by min_p, top_k and top_p in that order;
    each works on what the one before it left, renormalised."""
    with np.errstate(over="ignore"):  # a tiny temperature: -inf is the value meant
        weights = np.exp((row - row.max()) / np.float32(params.temperature))  # [V], the best is 1
    if params.min_p > 0:
        weights[weights < params.min_p] = 0
    ids: IdArray | None = None  # all of them
    if 0 < params.top_k < weights.size:
        ids = top_indices(weights, params.top_k)
    if params.top_p < 1:
        ids = _nucleus(weights, params.top_p) if ids is None else _cut(weights, ids, params.top_p * _sum(weights[ids]))
    if ids is not None:
        return int(ids[_invert(weights[ids], uniform)])
    # Find the stretch first, then the token: numpy sums much faster than it accumulates.
    stretches = np.add.reduceat(weights, np.arange(0, weights.size, STRETCH), dtype=np.float64)
    start = STRETCH * _invert(stretches, uniform)
    below = float(stretches[: start // STRETCH].sum())
    stretch = weights[start : start + STRETCH]
    return start + _invert(stretch, max(0.0, (uniform * float(stretches.sum()) - below) / _sum(stretch)))


def _invert(weights: npt.NDArray[np.floating[Any]], uniform: float) -> int:
    """The index at which the running sum exceeds that fraction of the total; never one of weight 0."""
    cumulative = np.cumsum(weights, dtype=np.float64)
    index = int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))
    return min(index, int(np.searchsorted(cumulative, cumulative[-1])))


def _nucleus(weights: Float32Array, top_p: float) -> IdArray:
    """The fewest most likely tokens that hold top_p of all weight."""
    enough = top_p * _sum(weights)
    k = FIRST_CANDIDATES
    while True:
        ids = top_indices(weights, k)
        if ids.size == weights.size or _sum(weights[ids]) >= enough:
            return _cut(weights, ids, enough)
        k *= 8


def _cut(weights: Float32Array, ids: IdArray, enough: float) -> IdArray:
    """The fewest leading ids that hold `enough` weight."""
    cumulative = np.cumsum(weights[ids], dtype=np.float64)
    return ids[: int(np.searchsorted(cumulative, enough)) + 1]


def _sum(weights: Float32Array) -> float:
    return float(weights.sum(dtype=np.float64))


def _uniform(seed: int, position: int) -> float:
    """In [0, 1)."""
    bits = np.random.Philox(key=seed & (1 << 64) - 1, counter=position).random_raw()
    return float(bits >> 11) * 2.0**-53
