"""Native attention against double precision: every layout, mask and cache dtype, with a cache full of stale NaN."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

pytest.importorskip("fptq_runtime._native", reason="the native extension is not built")

from fptq_runtime import _native
from fptq_runtime.config import KVCacheDtype
from fptq_runtime.kernels.base import AttentionSpec, Embedding, StepLimits
from fptq_runtime.kernels.cpu import CpuBackend
from tests.kernels.small import Batcher


def quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 codes of float32 rows [..., dim], in double, and their scales [..., 1]."""
    scale = x.abs().amax(-1, keepdim=True) / 127.5
    return (x / scale).round().clamp(-128, 127).double(), scale.double()


def rounded(x: torch.Tensor, kv_dtype: KVCacheDtype) -> torch.Tensor:
    """What attention reads of float32 rows [..., dim] of q, k or v, in double."""
    if kv_dtype == "int8":
        codes, scale = quantize(x)
        return codes * scale
    return x.bfloat16().double() if kv_dtype == "bf16" else x.double()


def attend(qkv: torch.Tensor, spec: AttentionSpec, kv_dtype: KVCacheDtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention in double, row by row. qkv [T, (heads + 2 · kv heads) · dim] to [T, heads · dim].

    And how far each output may be off: an int8 cache rounds probability · value scale to steps of 1 / 32512 of the
    largest among a chunk's 128 keys.
    """
    heads, kv_heads, dim = spec.num_heads, spec.num_kv_heads, spec.head_dim
    q, k, v = qkv.reshape(len(qkv), -1, dim).split((heads, kv_heads, kv_heads), dim=1)
    value_codes, value_scales = quantize(v)
    q = rounded(q, "int8") if kv_dtype == "int8" else q.double()
    k, v = rounded(k, kv_dtype), rounded(v, kv_dtype)
    out = torch.empty(len(qkv), heads, dim, dtype=torch.float64)
    off = torch.zeros_like(out)
    for t in range(len(qkv)):
        first = 0 if spec.sliding_window is None else max(0, t + 1 - spec.sliding_window)
        for h in range(heads):
            g = h // (heads // kv_heads)
            scores = k[first : t + 1, g] @ q[t, h] * spec.softmax_scale
            if spec.softcap is not None:
                scores = spec.softcap * torch.tanh(scores / spec.softcap)
            if spec.alibi_slopes is not None:
                scores += float(spec.alibi_slopes[h]) * torch.arange(first, t + 1)
            sink = torch.tensor([-torch.inf if spec.sinks is None else float(spec.sinks[h])], dtype=torch.float64)
            probabilities = torch.softmax(torch.cat((scores, sink)), 0)[:-1]
            out[t, h] = probabilities @ v[first : t + 1, g]
            if kv_dtype == "int8":
                for chunk in range(first // 128, t // 128 + 1):
                    low, high = max(first, 128 * chunk), min(t + 1, 128 * chunk + 128)
                    step = (probabilities[low - first : high - first] * value_scales[low:high, g, 0]).max() / 32512
                    off[t, h] += 0.5001 * step * value_codes[low:high, g].abs().sum(0)
    return out.reshape(len(qkv), heads * dim), off.reshape(len(qkv), heads * dim)


def run(table: torch.Tensor, spec: AttentionSpec, kv_dtype: KVCacheDtype, isa: str, threads: int, block_size: int,
        steps: list[int], stale: bool = False) -> np.ndarray:
    """Outputs [T, heads · dim] of one sequence computed `steps` tokens at a time. Token t's embedding, row t of the
    table, is its q | k | v; stale: the cache was used before, for the rows from T on."""
    length = sum(steps)
    limits = StepLimits(max_tokens=length, max_seqs=1, max_logits_rows=length, max_model_len=length,
                        num_blocks=-(-length // block_size), block_size=block_size, kv_dtype=kv_dtype, num_layers=1,
                        num_kv_heads=spec.num_kv_heads, head_dim=spec.head_dim)
    backend = CpuBackend(threads, isa)
    embedding, attention = backend.prepare(Embedding(table.numpy())), backend.prepare(spec)

    def forward(ops: Any) -> Any:
        q = ops.rope_and_cache(ops.embed(embedding), attention)
        return ops.select_rows(ops.attention(q, attention, None))

    executor = backend.compile(forward, limits)
    batcher = Batcher(limits, np.random.default_rng(length))
    if stale:
        used = batcher.sequence(range(length, 2 * length))
        executor.step(batcher.step([(used, length)]))
        batcher.release(used)
    sequence = batcher.sequence(range(length))
    return np.concatenate([executor.step(batcher.step([(sequence, count)])) for count in steps])


def cut(draw: Any, length: int, most: int) -> list[int]:
    """`length` as a sum of at most that many steps."""
    steps: list[int] = []
    while sum(steps) < length:
        left = length - sum(steps)
        steps.append(draw(st.integers(1, left)) if len(steps) < most - 1 else left)
    return steps


@pytest.mark.parametrize("isa", _native.available_isas())
@settings(max_examples=25)
@given(data=st.data())
def test_attention(isa: str, data: st.DataObject) -> None:
    draw: Any = data.draw
    kv_heads = draw(st.integers(1, 3))
    heads = kv_heads * draw(st.sampled_from([1, 2, 3, 4, 7, 8, 18, 50]))
    dim = draw(st.sampled_from([8, 20, 32, 64, 80, 96, 128, 256]))
    length = draw(st.integers(1, 300))
    window = draw(st.none() | st.integers(1, 200))
    kv_dtype = draw(st.sampled_from(["float32", "bf16", "int8"]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    slopes = rng.random(heads).astype(np.float32) / 10 if draw(st.booleans()) else None
    sinks = (3 * rng.standard_normal(heads)).astype(np.float32) if draw(st.booleans()) else None
    spec = AttentionSpec(0, heads, kv_heads, dim, dim**-0.5, window, None, slopes, sinks=sinks,
                         softcap=draw(st.sampled_from([None, None, 1.0, 50.0])))
    table = torch.from_numpy(rng.standard_normal((2 * length, (heads + 2 * kv_heads) * dim)).astype(np.float32))
    table[length:] = torch.nan
    got = run(table, spec, kv_dtype, isa, draw(st.sampled_from([1, 2])), draw(st.sampled_from([16, 32, 64, 128])),
              cut(draw, length, 4), stale=True)
    expected, off = (x.numpy() for x in attend(table[:length], spec, kv_dtype))
    error = np.abs(got - expected)
    assert (error <= off + 2e-6 * np.abs(expected).max() + 1e-6).all(), (error - off).max()


@pytest.mark.parametrize("isa", _native.available_isas())
@settings(max_examples=15)
@given(data=st.data())
def test_bits_depend_on_neither_isa_nor_threads_nor_steps_nor_blocks(isa: str, data: st.DataObject) -> None:
    """Long enough for two threads to share out one query's chunks."""
    draw: Any = data.draw
    kv_heads = draw(st.integers(1, 2))
    heads = kv_heads * draw(st.sampled_from([1, 4, 7, 16]))
    length = draw(st.integers(520, 1100))
    kv_dtype = draw(st.sampled_from(["float32", "bf16", "int8"]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    sinks = rng.standard_normal(heads).astype(np.float32) if draw(st.booleans()) else None
    spec = AttentionSpec(0, heads, kv_heads, 128, 128**-0.5, draw(st.none() | st.integers(1, 1000)), sinks=sinks,
                         softcap=draw(st.sampled_from([None, 5.0])))
    table = torch.from_numpy(rng.standard_normal((length, (heads + 2 * kv_heads) * 128)).astype(np.float32))
    whole = run(table, spec, kv_dtype, _native.available_isas()[0], 1, 32, [length])
    tail = draw(st.integers(1, 5))
    parts = run(table, spec, kv_dtype, isa, 2, draw(st.sampled_from([16, 32, 128])),
                [*cut(draw, length - tail, 4), *[1] * tail])
    np.testing.assert_array_equal(parts, whole)


@pytest.mark.parametrize("isa", _native.available_isas())
@pytest.mark.parametrize("dim", [20, 64, 256])
def test_int8_scores_are_exact(isa: str, dim: int) -> None:
    """One unit of q · K is worth e^(1/8) of weight here, so an integer that is off by one shows."""
    rng = np.random.default_rng(dim)
    length = 200
    q, k = rng.integers(-2, 3, (2, length, dim)).astype(np.float32)
    q[:, 0], q[:, 1], k[:, 0], k[:, 1] = 127.5, 0, 0, -127.5    # scales of 1
    v = rng.standard_normal((length, dim)).astype(np.float32)
    spec = AttentionSpec(0, 1, 1, dim, 0.125, 5, None, None)
    table = torch.from_numpy(np.concatenate([q, k, v], axis=1))
    expected, off = (x.numpy() for x in attend(table, spec, "int8"))
    got = run(table, spec, "int8", isa, 1, 32, [length])
    assert (np.abs(got - expected) <= off + 1e-6).all()
    assert off.max() < 1e-3 * (np.exp(0.125) - 1) * np.abs(expected).max()


@pytest.mark.parametrize("isa", _native.available_isas())
def test_a_cached_value_comes_back_exactly(isa: str) -> None:
    """A query that sees one key: the integers of an int8 value times its scale, on every path."""
    rng = np.random.default_rng(0)
    table = torch.from_numpy((100 * rng.standard_normal((70, 3 * 96))).astype(np.float32))
    got = run(table, AttentionSpec(0, 1, 1, 96, 1.0, 1, None, None), "int8", isa, 1, 16, [70])
    codes, scale = quantize(table[:, 192:])
    np.testing.assert_allclose(got, (codes * scale).numpy(), rtol=3e-7, atol=0)


@pytest.mark.parametrize("isa", _native.available_isas())
@settings(max_examples=15)
@given(data=st.data())
def test_selected_rows_are_the_rows_of_the_whole(isa: str, data: st.DataObject) -> None:
    """To the last bit, whichever rows are asked for."""
    draw: Any = data.draw
    kv_heads, dim = draw(st.integers(1, 2)), 64
    spec = AttentionSpec(0, kv_heads * draw(st.sampled_from([1, 4, 7])), kv_heads, dim, dim**-0.5,
                         draw(st.none() | st.integers(1, 200)), None, None)
    lengths = draw(st.lists(st.integers(1, 300), min_size=1, max_size=3))
    total = sum(lengths)
    rows = draw(st.lists(st.integers(0, total - 1), max_size=4) | st.just(list(range(total))))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    table = rng.standard_normal((total, (spec.num_heads + 2 * kv_heads) * dim)).astype(np.float32)
    limits = StepLimits(max_tokens=total, max_seqs=3, max_logits_rows=total + 4, max_model_len=300,
                        num_blocks=total // 32 + 3, block_size=32, kv_dtype=draw(st.sampled_from(["bf16", "int8"])),
                        num_layers=1, num_kv_heads=kv_heads, head_dim=dim)
    backend = CpuBackend(2, isa)
    embedding, attention = backend.prepare(Embedding(table)), backend.prepare(spec)

    def forward(ops: Any, selected: bool) -> Any:
        attended = ops.attention(ops.rope_and_cache(ops.embed(embedding), attention), attention, None, selected)
        return attended if selected else ops.select_rows(attended)

    batcher = Batcher(limits, rng)
    starts = np.cumsum([0, *lengths])
    step = batcher.step([(batcher.sequence(range(start, start + count)), count)
                         for start, count in zip(starts, lengths, strict=False)])
    step = replace(step, logits_rows=np.array(rows, np.int32))
    whole, selected = (backend.compile(partial(forward, selected=only), limits).step(step) for only in (False, True))
    np.testing.assert_array_equal(selected, whole)
