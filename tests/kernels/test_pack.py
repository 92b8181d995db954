"""Packing from a checkpoint's words, on a pool, against packing from codes one by one."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fptq_runtime import _native
from fptq_runtime.artifact.numerics import pack_codes

POOL = _native.ThreadPool(3)


@given(n=st.integers(1, 200), groups=st.integers(1, 9), group=st.sampled_from([32, 64, 128]) | st.integers(1, 200),
       bits=st.sampled_from([4, 8]), seed=st.integers(0, 2**32), bf16=st.booleans())
def test_words_are_packed_as_their_codes(n: int, groups: int, group: int, bits: Literal[4, 8], seed: int,
                                         bf16: bool) -> None:
    groups = groups if group in (32, 64, 128) else 1  # other sizes are per channel
    rng, k = np.random.default_rng(seed), group * groups
    codes = rng.integers(-(1 << bits - 1), 1 << bits - 1, (n, k), np.int8)
    scale = rng.random((n, groups), np.float32) + np.float32(0.1)
    if bf16:
        scale = torch.from_numpy(scale).bfloat16().float().numpy()
    words = pack_codes(torch.from_numpy(codes), bits).numpy()
    x = _native.QuantizedRows(rng.standard_normal((3, k), np.float32))
    outputs = []
    for weight in (_native.pack_weight(codes, scale, group, bits), _native.pack_weight(words, scale, group, bits),
                   _native.pack_weight(words, scale, group, bits, POOL)):
        assert (weight.n, weight.k, weight.bits) == (n, k, bits)
        outputs.append(np.empty((3, n), np.float32))
        _native.gemm(weight, x, outputs[-1])
    assert np.array_equal(outputs[0], outputs[1])
    assert np.array_equal(outputs[0], outputs[2])


@given(n=st.integers(1, 200), k=st.integers(1, 300), bf16=st.booleans(), seed=st.integers(0, 2**32))
def test_float_weights_on_a_pool(n: int, k: int, bf16: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = torch.from_numpy(rng.standard_normal((n, k), np.float32))
    weight = values.bfloat16().view(torch.int16).numpy() if bf16 else values.numpy()
    out = np.empty((2, n), np.float32)
    x = rng.standard_normal((2, k), np.float32)
    _native.gemm_float(_native.pack_float(weight, POOL), x, out)
    dense = values.bfloat16().double() if bf16 else values.double()
    expected = (torch.from_numpy(x).double() @ dense.T).numpy()
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-4)


def test_words_that_do_not_fit_their_scales_are_refused() -> None:
    with pytest.raises(ValueError, match="packed must be"):
        _native.pack_weight(np.zeros((4, 5), np.int32), np.ones((4, 1), np.float32), 32, 4)
    with pytest.raises(ValueError, match="neither a multiple of 32 nor K"):
        _native.pack_weight(np.zeros((4, 12), np.int32), np.ones((4, 2), np.float32), 48, 4)
