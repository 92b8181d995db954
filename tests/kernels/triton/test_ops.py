"""Blocks written over the ops alone, with what families differ in: against the reference, and in company."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from fptq_runtime.artifact.numerics import pack_codes, quantize_weight
from fptq_runtime.config import KVCacheDtype
from fptq_runtime.kernels.base import (
    Activation,
    ActivationQuant,
    AttentionSpec,
    Backend,
    Embedding,
    Linear,
    Norm,
    QuantizedWeight,
    StepInput,
    StepLimits,
    logits_array,
)
from fptq_runtime.kernels.reference import ReferenceBackend, to_numpy
from fptq_runtime.kernels.triton.backend import TritonBackend

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

HIDDEN, INNER, HEADS, KV_HEADS, DIM, VOCAB = 64, 96, 4, 2, 24, 50
QKV = (HEADS + 2 * KV_HEADS) * DIM
WINDOWS = [list(range(3, 30)), list(range(40, 30, -1))]


def tables(rotated: int) -> tuple[Any, Any]:
    angles = np.arange(64)[:, None] * 100.0 ** (-np.arange(rotated // 2) / (rotated / 2))
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def network(backend: Backend, act: ActivationQuant | None) -> Callable[[Any], Any]:
    """Three layers: a window, sinks and all-head norms; capped scores and partial rope, in parallel with the MLP; no
    rope, norms of each head's own weight."""
    rng = np.random.default_rng(0)

    def random(*shape: int) -> Any:
        return rng.standard_normal(shape, np.float32)

    def linear(n: int, k: int) -> Any:
        weight = random(n, k) * k**-0.5
        if act is None:
            return backend.prepare(Linear("l", weight))
        codes, scale = quantize_weight(torch.from_numpy(weight), 4, 32)
        return backend.prepare(Linear("l", QuantizedWeight(to_numpy(pack_codes(codes, 4)), to_numpy(scale), 4, 32),
                                      None, act))

    def norm(*shape: int, kind: Any = "rms") -> Norm:
        return Norm(kind, 1 + 0.1 * random(*shape), 0.1 * random(*shape) if kind == "layer" else None, 1e-5)

    embedding, positions = (backend.prepare(Embedding(random(rows, HIDDEN))) for rows in (VOCAB, 64))
    attentions = [backend.prepare(AttentionSpec(layer, HEADS, KV_HEADS, DIM, DIM**-0.5, **options))
                  for layer, options in enumerate([
                      {"sliding_window": 9, "rope": tables(DIM), "sinks": random(HEADS), "q_norm": norm(HEADS * DIM),
                       "k_norm": norm(KV_HEADS * DIM)},
                      {"softcap": 2.0, "rope": tables(8)},
                      {"q_norm": norm(HEADS, DIM, kind="layer"), "k_norm": norm(KV_HEADS, DIM, kind="layer")}])]
    layers = [(linear(QKV, HIDDEN), linear(HIDDEN, HEADS * DIM), linear((1 + activation.gated) * INNER, HIDDEN),
               linear(HIDDEN, INNER), activation, [backend.prepare(norm(HIDDEN)) for _ in range(3)])
              for activation in (Activation("clamped_swiglu", True), Activation("gelu"), Activation("relu2"))]
    last, head = backend.prepare(norm(HIDDEN)), linear(VOCAB, HIDDEN)

    def forward(ops: Any) -> Any:
        x = ops.add(ops.scale(ops.embed(embedding), HIDDEN**0.5), ops.embed_positions(positions))
        for attention, (qkv, o, up, down, activation, norms) in zip(attentions, layers, strict=True):
            normed = ops.norm(x, norms[0], None)
            q = ops.rope_and_cache(ops.linear(ops.quantize(normed, qkv.act), qkv), attention)
            attended = ops.norm(ops.linear(ops.attention(q, attention, o.act), o), norms[1], None)
            if activation.curve == "gelu":
                inner = ops.linear(ops.quantize(normed, up.act), up)
                x = ops.add(x, attended)
            else:
                x = ops.add(x, attended)
                inner = ops.linear(ops.norm(x, norms[2], up.act), up)
            x = ops.linear(ops.activation(inner, activation, down.act), down, x)
        return ops.softcap(ops.linear(ops.norm(ops.select_rows(x), last, head.act), head), 3.0)

    return forward


def limits(kv_dtype: KVCacheDtype) -> StepLimits:
    return StepLimits(64, 4, 64, 64, 8, 16, kv_dtype, 3, KV_HEADS, DIM)


def part(whole: StepInput, spans: Sequence[tuple[int, int]]) -> StepInput:
    """Tokens first to last of each sequence, of which the next part goes on."""
    rows = np.concatenate([np.arange(start + first, start + last)
                           for start, (first, last) in zip(whole.query_start_loc.tolist(), spans, strict=False)])
    counts = [last - first for first, last in spans]
    return StepInput(whole.token_ids[rows], whole.positions[rows], whole.slot_mapping[rows],
                     np.cumsum([0, *counts], dtype=np.int32), np.array([last for _, last in spans], np.int32),
                     whole.block_tables, np.arange(len(rows), dtype=np.int32), whole.state_slots)


PARTS = ([(0, 19), (0, 6)], [(19, 20), (6, 7)], [(20, 27), (7, 10)])


def stepwise(backend: Backend, act: ActivationQuant | None, kv_dtype: KVCacheDtype,
             parts: Sequence[StepInput]) -> list[Any]:
    executor = backend.compile(network(backend, act), limits(kv_dtype))
    return [logits_array(executor.step(step)) for step in parts]


def test_floats_agree_with_the_reference() -> None:
    whole = StepInput.whole(WINDOWS)
    parts = [part(whole, spans) for spans in PARTS]
    ours, theirs = (stepwise(each, None, "float32", parts) for each in (TritonBackend(), ReferenceBackend()))
    for got, expected in zip(ours, theirs, strict=True):
        assert np.abs(got - expected).max() < 2e-5 * np.abs(expected).max()


@pytest.mark.parametrize("kv_dtype", ["int8", "bf16"])
def test_bits_depend_on_neither_steps_nor_company(kv_dtype: KVCacheDtype) -> None:
    whole, backend = StepInput.whole(WINDOWS), TritonBackend()
    both = stepwise(backend, ActivationQuant(), kv_dtype, [part(whole, spans) for spans in PARTS])
    [alone] = stepwise(backend, ActivationQuant(), kv_dtype, [StepInput.whole(WINDOWS[:1])])
    firsts = [rows[: last - first] for rows, ((first, last), _) in zip(both, PARTS, strict=True)]
    np.testing.assert_array_equal(np.concatenate(firsts), alone)


def test_work_counts_every_linear_once() -> None:
    backend = TritonBackend()
    executor = backend.compile(network(backend, None), limits("float32"))
    layers = HIDDEN * (3 * (QKV + HEADS * DIM) + (3 + 2 + 2) * INNER)
    work = executor.work(5, 2)
    assert work.multiply_adds == 5 * layers + 2 * HIDDEN * VOCAB
    assert work.weight_bytes == 4 * (layers + HIDDEN * VOCAB)
