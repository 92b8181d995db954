"""What adapters add, to float and to quantized rows, against the reference; in company, alone and as rows of logits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fptq_runtime.artifact.numerics import pack_codes, quantize_weight
from fptq_runtime.kernels.base import (
    ActivationQuant,
    Backend,
    Embedding,
    Linear,
    LowRank,
    QuantizedWeight,
    StepInput,
    StepLimits,
    logits_array,
)
from fptq_runtime.kernels.reference import ReferenceBackend, to_numpy
from fptq_runtime.kernels.triton.backend import TritonBackend

N, K, VOCAB = 136, 160, 40
WINDOWS = [[3, 4, 5], [6], [7, 8, 9, 10], [11, 12]]
SLOTS = [2, 0, 1, 2]


def outputs(backend: Backend, act: ActivationQuant | None, batch: StepInput) -> Any:
    random = np.random.default_rng(0)
    weight = random.normal(size=(N, K)).astype(np.float32)
    codes, scale = quantize_weight(torch.from_numpy(weight), 8, K)
    stored = weight if act is None else QuantizedWeight(to_numpy(pack_codes(codes, 8)), to_numpy(scale), 8, K)
    embedding = backend.prepare(Embedding(random.normal(size=(VOCAB, K)).astype(np.float32)))
    linear = backend.adaptable(backend.prepare(Linear("l", stored, act=act)), 2)

    def part(first: int, n: int, rank: int) -> LowRank:
        return LowRank(first, random.normal(size=(rank, K)).astype(np.float32),
                       random.normal(size=(n, rank)).astype(np.float32), 0.25)

    backend.adapt(linear, 1, [part(0, N, 90)])
    backend.adapt(linear, 2, [part(5, 64, 3), part(69, 67, 4)])

    def forward(ops: Any) -> Any:
        return ops.select_rows(ops.linear(ops.quantize(ops.embed(embedding), act), linear))

    def last_rows(ops: Any) -> Any:
        return ops.linear(ops.quantize(ops.select_rows(ops.embed(embedding)), act), linear)

    limits = StepLimits(16, 4, 16, 16, 8, 16, "float32", 1, 1, 16)
    whole = logits_array(backend.compile(forward, limits).step(batch))
    assert np.array_equal(logits_array(backend.compile(last_rows, limits).step(batch)), whole)
    return whole


def step(chosen: list[int], rows: slice = slice(None)) -> StepInput:
    whole = StepInput.whole([WINDOWS[i] for i in chosen])
    return StepInput(**{**vars(whole), "adapters": np.array([SLOTS[i] for i in chosen], np.int32),
                        "logits_rows": whole.logits_rows[rows]})


@pytest.mark.parametrize("act", [None, ActivationQuant(), ActivationQuant(0.02)], ids=str)
def test_the_references(act: ActivationQuant | None) -> None:
    backend = TritonBackend()
    got = outputs(backend, act, step([0, 1, 2, 3]))
    expected = outputs(ReferenceBackend(), act, step([0, 1, 2, 3]))
    np.testing.assert_allclose(got, expected, atol=2e-4 * np.abs(expected).max())
    assert np.array_equal(outputs(backend, act, step([3, 2])), np.concatenate([got[8:], got[4:8]]))
    assert np.array_equal(outputs(backend, act, step([0, 1, 2, 3], slice(2, 9, 3))), got[2:9:3])
    decoding = step([1])
    assert np.array_equal(outputs(backend, act, decoding), got[3:4])
