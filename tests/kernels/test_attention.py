"""Native attention against double precision: every layout, mask and cache dtype, with a cache full of stale NaN."""

from __future__ import annotations

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
            if spec.alibi_slopes is not None:
                scores += float(spec.alibi_slopes[h]) * torch.arange(first, t + 1)
            probabilities = torch.softmax(scores, 0)
            out[t, h] = probabilities @ v[first : t + 1, g]
            if kv_dtype == "int8":
                for chunk in range(first // 128, t // 128 + 1):
                    low, high = max(first, 128 * chunk), min(t + 1, 128 * chunk + 128)
                    step = (probabilities[low - first : high - first] * value_scales[low:high, g, 0]).max() / 32512
                    off[t, h] += 0.5001 * step * value_codes[low:high, g].abs().sum(0)
    return out.reshape(len(qkv), heads * dim), off.reshape(len(qkv), heads * dim)


@pytest.mark.parametrize("isa", _native.available_isas())
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_attention(isa: str, data: st.DataObject) -> None:
    draw: Any = data.draw
    kv_heads = draw(st.integers(1, 3))
    heads = kv_heads * draw(st.sampled_from([1, 2, 3, 7, 18]))
    dim = draw(st.sampled_from([8, 20, 64, 80, 128, 256]))
    length = draw(st.integers(1, 300))
    window = draw(st.none() | st.integers(1, 200))
    kv_dtype = draw(st.sampled_from(["float32", "bf16", "int8"]))
    block_size = draw(st.sampled_from([16, 32, 64, 128]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    slopes = rng.random(heads).astype(np.float32) / 10 if draw(st.booleans()) else None
    spec = AttentionSpec(0, heads, kv_heads, dim, dim**-0.5, window, None, slopes)

    # Token t's embedding is its q | k | v row; the rows after `length` are NaN.
    table = torch.from_numpy(rng.standard_normal((2 * length, (heads + 2 * kv_heads) * dim)).astype(np.float32))
    table[length:] = torch.nan
    limits = StepLimits(max_tokens=length, max_seqs=1, max_logits_rows=length, max_model_len=length,
                        num_blocks=-(-length // block_size), block_size=block_size, kv_dtype=kv_dtype, num_layers=1,
                        num_kv_heads=kv_heads, head_dim=dim)
    backend = CpuBackend(draw(st.sampled_from([1, 2])), isa)
    embedding, attention = backend.prepare(Embedding(table.numpy())), backend.prepare(spec)

    def forward(ops: Any) -> Any:
        q = ops.rope_and_cache(ops.embed(embedding), attention)
        return ops.select_rows(ops.attention(q, attention, None))

    executor = backend.compile(forward, limits)
    batcher = Batcher(limits, rng)
    stale = batcher.sequence(range(length, 2 * length))
    executor.step(batcher.step([(stale, length)]))
    batcher.release(stale)
    sequence = batcher.sequence(range(length))
    got = []
    while sequence.computed < length:
        count = draw(st.integers(1, length - sequence.computed)) if len(got) < 3 else length - sequence.computed
        got.append(executor.step(batcher.step([(sequence, count)])))
    expected, off = (x.numpy() for x in attend(table[:length], spec, kv_dtype))
    error = np.abs(np.concatenate(got) - expected)
    assert (error <= off + 2e-6 * np.abs(expected).max() + 1e-6).all(), (error - off).max()
