"""The native GEMMs and row quantizer, ISA by ISA: exact integers, float64 references, and bits that never depend on
the batch, the tiles or the split."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import quantize
from compressed_tensors.quantization.utils import calculate_qparams
from hypothesis import given, settings
from hypothesis import strategies as st

native = pytest.importorskip("fptq_runtime._native", reason="the native extension is not built")

ISAS = native.available_isas()
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
RANDOMIZED = {"max_examples": 60, "derandomize": True}


def random_weight(rng, n, k, group_size, bits, unit_scale=False, bf16_scale=False):
    limit = 2 ** (bits - 1)
    codes = rng.integers(-limit, limit, (n, k), dtype=np.int8)
    shape = (n, -(-k // group_size))
    scale = np.ones(shape, np.float32) if unit_scale else rng.uniform(1e-3, 1e-2, shape).astype(np.float32)
    if bf16_scale:
        scale = torch.from_numpy(scale).bfloat16().float().numpy()
    return codes, scale


@dataclass
class WeightOnly:
    """A packed weight whose input stays in float."""

    packed: Any


def run(weight, x, n, isa, out=None, **kwargs):
    out = np.full((len(x), n), np.nan, np.float32) if out is None else out
    if isinstance(weight, native.PackedWeight):
        native.gemm(weight, native.QuantizedRows(x, kwargs.pop("scale", None), isa=isa), out, isa=isa, **kwargs)
    else:
        native.gemm_float(weight.packed if isinstance(weight, WeightOnly) else weight, x, out, isa=isa, **kwargs)
    return out


def pack_float(values):
    return native.pack_float(values.view(torch.int16) if values.dtype == torch.bfloat16 else values)


def group_sizes(k):
    return st.sampled_from([32, 64, 128, 256, k])


@st.composite
def problems(draw):
    k = draw(st.one_of(st.integers(1, 300), st.sampled_from([32, 64, 128, 256, 384])))
    return {
        "m": draw(st.one_of(st.integers(1, 14), st.integers(1, 101))),
        "n": draw(st.one_of(st.integers(1, 200), st.sampled_from([64, 128]))),
        "k": k,
        "group_size": draw(group_sizes(k)),
        "bits": draw(st.sampled_from([4, 8])),
        "bf16_scale": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**32 - 1)),
    }


@settings(**RANDOMIZED)
@given(problems())
def test_integer_parts_are_exact(p):
    """With unit scales every float operation is exact, so the output is the integer."""
    rng = np.random.default_rng(p["seed"])
    codes, scale = random_weight(rng, p["n"], p["k"], p["group_size"], p["bits"], unit_scale=True)
    x = rng.integers(-128, 128, (p["m"], p["k"])).astype(np.float32)
    expected = x.astype(np.int64) @ codes.T.astype(np.int64)
    weight = native.pack_weight(codes, scale, p["group_size"], p["bits"])
    for isa in ISAS:
        assert np.array_equal(run(weight, x, p["n"], isa, scale=1.0), expected), isa


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("isa", ISAS)
def test_longest_k_does_not_overflow(isa, bits):
    """One group over the longest K the packer takes: the int32 sum is exact and rounded to float once."""
    k, n, m = 2**17 - 32, 3, 7
    rng = np.random.default_rng(0)
    codes, scale = random_weight(rng, n, k, k, bits, unit_scale=True)
    codes[0] = -(2 ** (bits - 1))
    codes[1] = 2 ** (bits - 1) - 1
    x = rng.integers(-128, 128, (m, k)).astype(np.float32)
    x[0], x[1] = -128, 127
    expected = (x.astype(np.int64) @ codes.T.astype(np.int64)).astype(np.float32)
    assert np.array_equal(run(native.pack_weight(codes, scale, k, bits), x, n, isa, scale=1.0), expected)


def test_refuses_what_it_cannot_pack():
    codes, scale = np.zeros((4, 64), np.int8), np.ones((4, 1), np.float32)
    with pytest.raises(ValueError, match="group size 48"):
        native.pack_weight(codes, np.ones((4, 2), np.float32), 48, 4)
    with pytest.raises(ValueError, match="4 or 8 bits"):
        native.pack_weight(codes, scale, 64, 5)
    with pytest.raises(ValueError, match="scale must be"):
        native.pack_weight(codes, scale, 32, 4)
    for code in (8, -9, 127):
        outside = codes.copy()
        outside[2, 5] = code
        with pytest.raises(ValueError, match=r"within -8\.\.7"):
            native.pack_weight(outside, scale, 64, 4)
    with pytest.raises(ValueError, match="K within"):
        native.pack_weight(np.zeros((1, 2**17), np.int8), np.ones((1, 1), np.float32), 2**17, 4)
    weight, x = native.pack_weight(codes, scale, 64, 4), np.zeros((2, 64), np.float32)
    with pytest.raises(ValueError, match="panels out of range"):
        run(weight, x, 4, "", panels=(0, 2))
    with pytest.raises(ValueError, match="differ in K"):
        run(weight, np.zeros((2, 96), np.float32), 4, "")
    with pytest.raises(ValueError, match="out must be"):
        run(weight, x, 5, "")
    with pytest.raises(ValueError, match="ISA path 'sse9'"):
        run(weight, x, 4, "sse9")
    with pytest.raises(ValueError, match="differ in K"):
        run(WeightOnly(weight), np.zeros((2, 63), np.float32), 4, "")
    with pytest.raises(ValueError, match="float32, float16 or int16"):
        native.pack_float(np.zeros((2, 2)))


@settings(**RANDOMIZED)
@given(problems(), st.booleans(), st.booleans(), st.booleans())
def test_float64_reference_and_the_same_bits_from_every_isa(p, static, with_bias, with_residual):
    rng = np.random.default_rng(p["seed"])
    codes, scale = random_weight(rng, p["n"], p["k"], p["group_size"], p["bits"], bf16_scale=p["bf16_scale"])
    x = rng.standard_normal((p["m"], p["k"])).astype(np.float32)
    bias = rng.standard_normal(p["n"]).astype(np.float32) if with_bias else None
    residual = rng.standard_normal((p["m"], p["n"])).astype(np.float32) if with_residual else None
    act_scale = 0.02 if static else None
    rows = native.QuantizedRows(x, act_scale)
    dense = codes * np.repeat(scale.astype(np.float64), p["group_size"], axis=1)[:, : p["k"]]
    quantized = rows.codes[:, : p["k"]] * rows.scales.astype(np.float64)
    expected = quantized @ dense.T
    expected += 0 if bias is None else bias
    expected += 0 if residual is None else residual

    weight = native.pack_weight(codes, scale, p["group_size"], p["bits"])
    outputs = [run(weight, x, p["n"], isa, scale=act_scale, bias=bias, residual=residual) for isa in ISAS]
    assert np.abs(outputs[0] - expected).max() <= 1e-5 * np.abs(expected).max()
    for isa, out in zip(ISAS, outputs, strict=True):
        assert np.array_equal(out, outputs[0]), isa


@pytest.mark.parametrize("bits", [4, 8])
def test_scales_are_bf16_where_that_loses_nothing(bits):
    rng = np.random.default_rng(5)
    codes, scale = random_weight(rng, 70, 64, 32, bits, bf16_scale=True)
    x = rng.standard_normal((5, 64)).astype(np.float32)
    narrow = native.pack_weight(codes, scale, 32, bits)
    scale[69, 1] = np.nextafter(scale[69, 1], np.float32(1))
    wide = native.pack_weight(codes, scale, 32, bits)
    assert narrow.bf16_scales and not wide.bf16_scales
    for isa in ISAS:
        assert np.array_equal(run(narrow, x, 70, isa)[:, :69], run(wide, x, 70, isa)[:, :69]), isa


def weights(rng, n, k):
    """Every kind of weight, by name."""
    for bits in (4, 8):
        for group_size in (32, 128, k):
            codes, scale = random_weight(rng, n, k, group_size, bits)
            packed = native.pack_weight(codes, scale, group_size, bits)
            yield f"int{bits} group {group_size}", packed
            yield f"int{bits} group {group_size}, float input", WeightOnly(packed)
    values = torch.from_numpy(rng.standard_normal((n, k)).astype(np.float32))
    for dtype in FLOATS:
        yield str(dtype), pack_float(values.to(dtype))


@pytest.mark.parametrize("isa", ISAS)
def test_bits_do_not_depend_on_rows_panels_or_batch(isa):
    rng = np.random.default_rng(1)
    m, n, k = 53, 200, 200
    x = rng.standard_normal((m, k)).astype(np.float32)
    bias = rng.standard_normal(n).astype(np.float32)
    residual = rng.standard_normal((m, n)).astype(np.float32)
    for kind, weight in weights(rng, n, k):
        whole = run(weight, x, n, isa, bias=bias, residual=residual)
        assert np.isfinite(whole).all()
        for row in range(m):
            alone = run(weight, x[row : row + 1], n, isa, bias=bias, residual=residual[row : row + 1])
            assert np.array_equal(alone[0], whole[row]), (kind, row)
        for row in (1, 5, 6, 7, 12, 47, 48, 52):
            for panel in (1, 2, 3):
                split = np.full_like(whole, np.nan)
                for rows in ((0, row), (row, m)):
                    for panels in ((0, panel), (panel, 4)):
                        part = run(weight, x, n, isa, bias=bias, residual=residual, rows=rows, panels=panels)
                        columns = slice(64 * panels[0], 64 * panels[1])
                        split[slice(*rows), columns] = part[slice(*rows), columns]
                        part[slice(*rows), columns] = np.nan
                        assert np.isnan(part).all(), f"{kind}: wrote outside its rows and panels"
                assert np.array_equal(split, whole), (kind, row, panel)


@pytest.mark.parametrize("isa", ISAS)
def test_every_m_to_600(isa):
    rng = np.random.default_rng(2)
    n, k = 40, 64
    x = rng.standard_normal((600, k)).astype(np.float32)
    for kind, weight in weights(rng, n, k):
        whole = run(weight, x, n, isa)
        every = kind in ("int4 group 32", "int8 group 32", "int4 group 32, float input", "torch.bfloat16")
        for m in range(1, 600) if every else (1, 6, 7, 48, 49, 599):
            assert np.array_equal(run(weight, x[:m], n, isa), whole[:m]), (kind, m)


@pytest.mark.parametrize("isa", ISAS)
def test_residual_may_be_the_output(isa):
    rng = np.random.default_rng(3)
    x = rng.standard_normal((9, 64)).astype(np.float32)
    residual = rng.standard_normal((9, 70)).astype(np.float32)
    for kind, weight in weights(rng, 70, 64):
        out = residual.copy()
        run(weight, x, 70, isa, out, residual=out)
        assert np.array_equal(out, run(weight, x, 70, isa, residual=residual)), kind


@settings(**RANDOMIZED)
@given(st.integers(1, 60), st.integers(1, 200), st.integers(1, 300), st.sampled_from(FLOATS),
       st.integers(0, 2**32 - 1))
def test_float_gemm(m, n, k, dtype, seed):
    rng = np.random.default_rng(seed)
    values = torch.from_numpy(rng.standard_normal((n, k)).astype(np.float32)).to(dtype)
    x = rng.standard_normal((m, k)).astype(np.float32)
    bias = rng.standard_normal(n).astype(np.float32)
    weight = pack_float(values)
    expected = x.astype(np.float64) @ values.double().numpy().T + bias
    outputs = [run(weight, x, n, isa, bias=bias) for isa in ISAS]
    assert np.abs(outputs[0] - expected).max() <= 1e-5 * np.abs(expected).max()
    for isa, out in zip(ISAS, outputs, strict=True):
        assert np.array_equal(out, outputs[0]), isa


@settings(**RANDOMIZED)
@given(problems(), st.booleans(), st.booleans())
def test_weight_only_gemm(p, with_bias, with_residual):
    """Against float64, and the bits that the float GEMM gives for the dequantized weights."""
    rng = np.random.default_rng(p["seed"])
    m, n, k, group = p["m"], p["n"], p["k"], p["group_size"]
    codes, scale = random_weight(rng, n, k, group, p["bits"], bf16_scale=p["bf16_scale"])
    scale *= rng.choice([-1, 1], scale.shape).astype(np.float32)
    x = rng.standard_normal((m, k)).astype(np.float32)
    epilogue = {"bias": rng.standard_normal(n).astype(np.float32) if with_bias else None,
                "residual": rng.standard_normal((m, n)).astype(np.float32) if with_residual else None}
    spread = np.repeat(scale, group, axis=1)[:, :k]
    expected = x.astype(np.float64) @ (codes * spread.astype(np.float64)).T
    expected += sum(part for part in epilogue.values() if part is not None)

    weight = WeightOnly(native.pack_weight(codes, scale, group, p["bits"]))
    dequantized = pack_float(torch.from_numpy(codes * spread))
    outputs = [run(weight, x, n, isa, **epilogue) for isa in ISAS]
    assert np.abs(outputs[0] - expected).max() <= 1e-5 * np.abs(expected).max()
    for isa, out in zip(ISAS, outputs, strict=True):
        assert np.array_equal(out, outputs[0]), isa
        assert np.array_equal(out, run(dequantized, x, n, isa, **epilogue)), isa


def test_every_float16_is_widened_as_torch_does():
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    values = bits.view(torch.float16)
    values = values[torch.isfinite(values)].reshape(-1, 1)
    weight = pack_float(values)
    for isa in ISAS:
        out = run(weight, np.ones((1, 1), np.float32), len(values), isa)
        assert np.array_equal(out[0], values[:, 0].float()), isa


ROWS = st.tuples(st.integers(1, 15), st.integers(1, 200), st.integers(-20, 20), st.integers(0, 2**32 - 1))


def awkward_rows(m, k, step, seed):
    """Random rows with outliers, zero rows, and ties between two codes of a static scale `step`."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((m, k)) * 30 * step
    x[rng.random(x.shape) < 0.05] *= 300
    ties = rng.random(x.shape) < 0.5
    x[ties] = (rng.integers(-140, 140, x.shape)[ties] + 0.5) * step
    x[rng.random(m) < 0.1] = 0
    return torch.from_numpy(x.astype(np.float32))


@settings(**RANDOMIZED)
@given(ROWS)
def test_static_rows_equal_torch(shape):
    m, k, exponent, seed = shape
    for scale in 2.0**exponent * np.array([1, *np.random.default_rng(seed).uniform(0.5, 1, 2)]):
        x = awkward_rows(m, k, scale, seed)
        codes = torch.clamp(torch.round(x / torch.tensor(scale, dtype=torch.float32)), -128, 127).to(torch.int8)
        for isa in ISAS:
            rows = native.QuantizedRows(x, float(scale), isa=isa)
            assert np.array_equal(rows.codes[:, :k], codes), isa
            assert np.array_equal(rows.scales, np.full((m, 1), scale, np.float32))


@settings(**RANDOMIZED)
@given(ROWS)
def test_dynamic_rows_equal_compressed_tensors(shape):
    m, k, exponent, seed = shape
    x = awkward_rows(m, k, 2.0**exponent, seed)
    args = QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="token", dynamic=True)
    scale, zero = calculate_qparams(x.amin(-1, keepdim=True), x.amax(-1, keepdim=True), args)
    codes = quantize(x, scale, zero, args, dtype=torch.int8)
    for isa in ISAS:
        rows = native.QuantizedRows(x, isa=isa)
        assert np.array_equal(rows.scales, scale), isa
        assert np.array_equal(rows.codes[:, :k], codes), isa
        assert not rows.codes[:, k:].any()
        assert np.array_equal(rows.sums, rows.codes.reshape(m, -1, 32).sum(-1, dtype=np.int32))


@pytest.mark.parametrize("isa", ISAS)
def test_a_broken_row_stays_alone(isa):
    rng = np.random.default_rng(4)
    x = rng.standard_normal((8, 100)).astype(np.float32)
    codes, scale = random_weight(rng, 70, 100, 32, 4)
    weight = native.pack_weight(codes, scale, 32, 4)
    good = run(weight, x, 70, isa)
    x[2, 50], x[4, 3] = np.nan, np.inf
    out = run(weight, x, 70, isa)
    rest = [0, 1, 3, 5, 6, 7]
    assert np.array_equal(out[rest], good[rest])
    assert not np.isfinite(out[[2, 4]]).any()


def test_roofs():
    pool = native.ThreadPool(1)
    assert all(native.peak_gops(pool, isa) > 0 for isa in ISAS)
    assert native.read_bandwidth(pool, 64) > 0
    with pytest.raises(ValueError, match="ISA path 'sse9'"):
        native.peak_gops(pool, "sse9")
    for megabytes in (0, -1, 1 << 17):
        with pytest.raises(ValueError, match="megabytes must be within"):
            native.read_bandwidth(pool, megabytes)
