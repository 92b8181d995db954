"""The reference sampler, in numpy: SampleInput's docstring line by line."""

from __future__ import annotations

from typing import Any

import numpy as np

from fptq_runtime.kernels.base import GREEDY_BELOW, Float32Array, SampleInput, SampleOutput


def sample_reference(logits: Float32Array, batch: SampleInput) -> SampleOutput:
    """In float64, by sorting. logits [R, V]."""
    out = SampleOutput.empty(batch)
    for d, row in enumerate(batch.rows):
        x = _masked(logits[row], batch, d)
        if np.isnan(x).any() or not np.isfinite(x.max()):
            continue
        token_id = int(batch.token_ids[d])
        if token_id < 0:
            parameters = batch.parameters[d]
            adjusted = _adjust(x, batch, d)
            if not np.isfinite(adjusted.max()):
                continue
            token_id = draw(adjusted, parameters, uniform(int(parameters["seed"]), int(batch.positions[d])))
        out.token_ids[d] = token_id
        if (top := int(batch.num_logprobs[d])) >= 0:
            shifted = x.astype(np.float64) - x.max()
            logprobs = shifted - np.log(np.exp(shifted).sum())
            out.logprobs[d] = logprobs[token_id]
            best = np.argsort(-x, kind="stable")[:top]
            out.top_ids[d, : best.size] = best
            out.top_logprobs[d, : best.size] = logprobs[best]
    return out


def draw(row: Float32Array, parameters: Any, uniform: float) -> int:
    """Steps 4 to 6. row [V] is finite where it is largest."""
    if parameters["temperature"] < GREEDY_BELOW:
        return int(row.argmax())
    weights = np.exp((row.astype(np.float64) - row.max()) / parameters["temperature"])
    ids = np.argsort(-row, kind="stable")
    ids = ids[weights[ids] >= parameters["min_p"]]
    if parameters["top_k"]:
        ids = ids[: parameters["top_k"]]
    if parameters["top_p"] < 1:
        held = np.cumsum(weights[ids])
        ids = ids[: int(np.searchsorted(held, parameters["top_p"] * held[-1])) + 1]
    ids = np.sort(ids)
    held = np.cumsum(weights[ids])
    return int(ids[np.searchsorted(held, uniform * held[-1], side="right")])


def uniform(seed: int, position: int) -> float:
    """In [0, 1)."""
    bits = np.random.Philox(key=seed, counter=position).random_raw()
    return float(bits >> 11) * 2.0**-53


def _masked(row: Float32Array, batch: SampleInput, d: int) -> Float32Array:
    if (mask := int(batch.mask_rows[d])) < 0:
        return row
    allowed = np.unpackbits(batch.masks[mask].view(np.uint8), count=row.size, bitorder="little")
    return np.where(allowed, row, np.float32(-np.inf))


def _adjust(row: Float32Array, batch: SampleInput, d: int) -> Float32Array:
    """Steps 1 to 3, on a copy."""
    parameters, x = batch.parameters[d], row.copy()
    biases = slice(batch.bias_start[d], batch.bias_start[d + 1])
    x[batch.bias_ids[biases]] += batch.bias_values[biases]
    history = batch.history[batch.history_start[d] : batch.history_start[d + 1]]
    if parameters["repetition_penalty"] != 1:
        seen, penalty = np.unique(history), np.float32(parameters["repetition_penalty"])
        x[seen] = np.where(x[seen] > 0, x[seen] / penalty, x[seen] * penalty)
    seen, counts = np.unique(history[batch.output_start[d] - batch.history_start[d] :], return_counts=True)
    x[seen] -= (parameters["presence_penalty"] + parameters["frequency_penalty"] * counts).astype(np.float32)
    return x
