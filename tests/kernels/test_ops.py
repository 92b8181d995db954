"""The native ops one by one and in random programs, against torch; every option of attention, alone and in company."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from ml_dtypes import bfloat16

pytest.importorskip("fptq_runtime._native", reason="the native extension is not built")

from fptq_runtime import _native
from fptq_runtime.artifact.numerics import pack_codes, quantize_weight
from fptq_runtime.config import KVCacheDtype
from fptq_runtime.kernels.base import (
    Activation,
    ActivationQuant,
    AttentionSpec,
    Curve,
    Embedding,
    Float32Array,
    Linear,
    Norm,
    QuantizedWeight,
    StepInput,
    StepLimits,
)
from fptq_runtime.kernels.cpu import CpuBackend
from fptq_runtime.kernels.reference import ReferenceBackend, to_numpy
from tests.kernels.small import Batcher, int32
from tests.kernels.test_attention import cut

ISAS = _native.available_isas()
KV_DTYPES: tuple[KVCacheDtype, ...] = ("float32", "bf16", "int8")
CURVES: tuple[Curve, ...] = get_args(Curve)
GATED = [Activation(curve, True, 2.5) for curve in CURVES]
ACTIVATIONS = [*GATED, *(Activation(curve) for curve in CURVES if curve != "clamped_swiglu")]

# What a program is made of: its parameters prepared by the backend that will run it, then its forward.
Program = Callable[[Any], Callable[[Any], Any]]


def limits(tokens: int, kv_heads: int = 1, head_dim: int = 8, kv_dtype: KVCacheDtype = "float32") -> StepLimits:
    return StepLimits(max_tokens=tokens, max_seqs=4, max_logits_rows=tokens, max_model_len=tokens,
                      num_blocks=tokens // 16 + 4, block_size=16, kv_dtype=kv_dtype, num_layers=1,
                      num_kv_heads=kv_heads, head_dim=head_dim)


def run(program: Program, backend: Any, step: StepInput) -> Float32Array:
    return backend.compile(program(backend), limits(len(step.token_ids))).step(step)


def of_rows(x: np.ndarray[Any, Any], then: Callable[[Any, Any], Any]) -> tuple[Program, StepInput]:
    """A program of one float op on the rows of x, and the step that feeds it each of them."""
    def program(backend: Any) -> Callable[[Any], Any]:
        table = backend.prepare(Embedding(x))
        return lambda ops: then(ops, ops.select_rows(ops.embed(table)))

    return program, StepInput.whole([range(len(x))])


def quantized(rng: np.random.Generator, name: str, n: int, k: int, bits: int, act: ActivationQuant | None) -> Linear:
    weight = torch.from_numpy(rng.standard_normal((n, k)).astype(np.float32) * k**-0.5)
    codes, scale = quantize_weight(weight, bits, 32)
    packed = QuantizedWeight(to_numpy(pack_codes(codes, bits)), to_numpy(scale), bits, 32)
    return Linear(name, packed, rng.standard_normal(n).astype(np.float32) / 10, act)


def in_double(x: torch.Tensor, activation: Activation) -> torch.Tensor:
    if activation.curve == "clamped_swiglu":
        gate, up = x.chunk(2, -1)
        gate, up = gate.clamp(max=activation.limit), up.clamp(-activation.limit, activation.limit)
        return gate * torch.sigmoid(1.702 * gate) * (up + 1)
    gate, up = x.chunk(2, -1) if activation.gated else (x, torch.ones(1, dtype=x.dtype))
    curve = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu, "relu2": lambda v: F.relu(v) ** 2,
             "gelu_tanh": lambda v: F.gelu(v, approximate="tanh")}[activation.curve]
    return curve(gate) * up


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: f"{a.curve}{'-gated' * a.gated}")
def test_activations_match_double_precision(activation: Activation, isa: str) -> None:
    """A curve's error is a few of its input's ulps at most, however far out the input is."""
    rng = np.random.default_rng(0)
    x = np.concatenate([np.linspace(-12, 12, 4096), rng.standard_normal(900) / 100, [0, -0.0, 1e-30, -90, 90, 3e4]])
    x = np.stack([x, rng.permutation(x)]).astype(np.float32)
    program, step = of_rows(x, lambda ops, rows: ops.activation(rows, activation, None))
    got = run(program, CpuBackend(1, isa), step)
    expected = in_double(torch.from_numpy(x).double(), activation).numpy()
    assert got.shape == (2, activation.width(x.shape[1]))
    gate = x[:, : got.shape[1]]
    scale = np.maximum(np.abs(expected), np.abs(gate) * (np.abs(x[:, -got.shape[1]:]) if activation.gated else 1))
    assert (np.abs(got - expected) <= 4e-7 * scale + 1e-30).all()
    small = np.abs(gate) < 4  # where no argument of an exponential is large the error is relative to the result
    assert (np.abs(got - expected) <= 3e-6 * np.abs(expected) + 1e-30)[small].all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: f"{a.curve}{'-gated' * a.gated}")
def test_activations_keep_nan(activation: Activation, isa: str) -> None:
    x = np.full((1, 2 * 20), np.nan, np.float32)
    program, step = of_rows(x, lambda ops, rows: ops.activation(rows, activation, None))
    assert np.isnan(run(program, CpuBackend(1, isa), step)).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("cap", [0.5, 30.0])
def test_softcap_matches_double_precision(cap: float, isa: str) -> None:
    x = np.concatenate([np.linspace(-200, 200, 4001), np.logspace(-20, 4, 997), [0, np.inf, -np.inf]])[None]
    x = x.astype(np.float32)
    program, step = of_rows(x, lambda ops, rows: ops.softcap(rows, cap))
    expected = cap * np.tanh(x.astype(np.float64) / cap)
    np.testing.assert_allclose(run(program, CpuBackend(1, isa), step), expected, rtol=4e-7, atol=0)


@pytest.mark.parametrize("isa", [*ISAS, "reference"])
@pytest.mark.parametrize("index", [[3], range(9), [8, 8, -1, 0, 1, 2, -1, -1, 5, 6], np.arange(400) % 9])
def test_columns_come_from_where_the_index_says(index: Any, isa: str) -> None:
    x = np.random.default_rng(0).standard_normal((30, 9)).astype(np.float32)
    index = np.asarray(index, np.int32)

    def program(backend: Any) -> Callable[[Any], Any]:
        left, right = (backend.prepare(Embedding(np.ascontiguousarray(part))) for part in (x[:, :4], x[:, 4:]))
        return lambda ops: ops.select_rows(ops.columns((ops.embed(left), ops.embed(right)), index))

    backend = ReferenceBackend() if isa == "reference" else CpuBackend(1, isa)
    got = run(program, backend, StepInput.whole([range(30)]))
    np.testing.assert_array_equal(got, np.where(index < 0, 0, x[:, index]))


@pytest.mark.parametrize("index", [[9], [-2], []])
def test_columns_that_are_not_there_are_refused(index: list[int]) -> None:
    program, step = of_rows(np.zeros((2, 9), np.float32), lambda ops, x: ops.columns((x,), np.array(index, np.int32)))
    with pytest.raises(ValueError, match="columns: there"):
        run(program, CpuBackend(1), step)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("scale", [None, 0.02])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("activation", GATED, ids=lambda a: a.curve)
def test_a_fused_gate_gives_the_bits_of_its_parts(activation: Activation, bits: int, scale: float | None,
                                                  isa: str) -> None:
    """Of a quantized activation right behind the linear, and of the same with its float output read by others too, or
    quantized by an op of its own; over rows enough for several tiles and few for one."""
    rng = np.random.default_rng(bits)
    table = rng.standard_normal((210, 96)).astype(np.float32)
    act = ActivationQuant(scale)
    up, down = quantized(rng, "up", 2 * 128, 96, bits, act), quantized(rng, "down", 40, 128, bits, act)

    def program(form: str) -> Program:
        def prepared(backend: Any) -> Callable[[Any], Any]:
            embedding, first, second = (backend.prepare(p) for p in (Embedding(table), up, down))

            def forward(ops: Any) -> Any:
                x = ops.linear(ops.quantize(ops.embed(embedding), first.act), first)
                if form == "apart":
                    y = ops.quantize(ops.activation(x, activation, None), second.act)
                else:
                    y = ops.activation(x, activation, second.act)
                y = ops.select_rows(ops.linear(y, second))
                if form == "read again":
                    ops.add(x, x)
                    y = ops.scale(y, 1.0)
                return y
            return forward
        return prepared

    whole = StepInput.whole([range(210)])
    expected = run(program("apart"), CpuBackend(1, ISAS[0]), whole)
    for threads in (1, 3):
        for form in ("fused", "read again"):
            np.testing.assert_array_equal(run(program(form), CpuBackend(threads, isa), whole), expected)
    few = StepInput.whole([[7, 4, 209]])
    np.testing.assert_array_equal(run(program("fused"), CpuBackend(2, isa), few), expected[[7, 4, 209]])
    errors = np.abs(expected - run(program("fused"), ReferenceBackend(), whole)).max(1) / np.abs(expected).max()
    assert np.median(errors) < 1e-5 and errors.max() < 2e-2  # a tipped code here and there


@settings(max_examples=100)
@given(data=st.data())
def test_random_programs_match_the_reference(data: st.DataObject) -> None:
    """Straight lines of float ops over values that die early, late or never, of all rows and of the selected."""
    draw: Any = data.draw
    width = draw(st.sampled_from([20, 64]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))

    def floats(*shape: int) -> Float32Array:
        return rng.standard_normal(shape).astype(np.float32)

    tables = [Embedding(floats(50, width)), Embedding(floats(60, width).astype(bfloat16))]
    parameters = [*tables, Linear("square", floats(width, width) * np.float32(width**-0.5)),
                  Norm("layer", floats(width), floats(width), 1e-5)]
    lines: list[tuple[Any, ...]] = [("embed",), ("positions",)]
    rows = ["all", "all"]  # of each value

    def of(kind: str) -> int:
        return draw(st.sampled_from([i for i, of in enumerate(rows) if of == kind]))

    for count, kind in ((draw(st.integers(0, 8)), "all"), (1, "cut"), (draw(st.integers(0, 8)), "selected")):
        for _ in range(count):
            if kind == "cut" or (kind == "selected" and draw(st.integers(0, 5)) == 0):
                lines.append(("select", of("all")))
                rows.append("selected")
                continue
            op = draw(st.sampled_from(["add", "scale", "softcap", "norm", "linear", "residual", "relu"]))
            lines.append((op, of(kind), of(kind)))
            rows.append(kind)

    def program(backend: Any) -> Callable[[Any], Any]:
        embedding, positions, linear, norm = map(backend.prepare, parameters)

        def forward(ops: Any) -> Any:
            values: list[Any] = []
            for op, *at in lines:
                x, y = (values[i] for i in [*at, 0, 0][:2]) if values else (None, None)
                values.append({
                    "embed": lambda: ops.embed(embedding), "positions": lambda: ops.embed_positions(positions),
                    "select": lambda x=x: ops.select_rows(x), "add": lambda x=x, y=y: ops.add(x, y),
                    "scale": lambda x=x: ops.scale(x, -0.7), "softcap": lambda x=x: ops.softcap(x, 1.5),
                    "norm": lambda x=x: ops.norm(x, norm, None), "linear": lambda x=x: ops.linear(x, linear),
                    "residual": lambda x=x, y=y: ops.linear(x, linear, y),
                    "relu": lambda x=x: ops.activation(x, Activation("relu"), None),
                }[op]())
            return values[-1]
        return forward

    step = StepInput.whole([rng.integers(0, 50, n).tolist() for n in (17, 1, 30)])
    step = replace(step, logits_rows=int32(sorted(rng.choice(48, 9, replace=False))))
    got = run(program, CpuBackend(draw(st.integers(1, 2)), draw(st.sampled_from(ISAS))), step)
    expected = run(program, ReferenceBackend(), step)
    assert got.shape == (9, width)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def random_spec(draw: Any, rng: np.random.Generator, kv_dtype: KVCacheDtype, length: int) -> AttentionSpec:
    """Any option with any other."""
    kv_heads = draw(st.integers(1, 3))
    heads = kv_heads * draw(st.sampled_from([1, 2, 5]))
    dim = draw(st.sampled_from([8, 20, 64, 96, 128]))

    def norm(of: int) -> Norm | None:
        form = draw(st.sampled_from([None, (dim,), (of, dim), (of * dim,)]))
        if form is None:
            return None
        kind = draw(st.sampled_from(["rms", "layer"]))
        bias = rng.standard_normal(form).astype(np.float32) / 10 if draw(st.booleans()) and kind == "layer" else None
        return Norm(kind, 1 + rng.standard_normal(form).astype(np.float32) / 4, bias, 1e-5)

    rope = None
    if draw(st.booleans()):
        half = draw(st.sampled_from([1, dim // 4, dim // 2]))
        angles = np.arange(length)[:, None] * 10000.0 ** (-np.arange(half) / half)
        rope = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)

    def maybe(values: Any) -> Any:
        return values if draw(st.booleans()) else None

    return AttentionSpec(
        0, heads, kv_heads, dim, dim**-0.5, draw(st.none() | st.integers(1, length)), rope,
        maybe(rng.random(heads).astype(np.float32) / 20), norm(heads), norm(kv_heads), draw(st.booleans()),
        draw(st.sampled_from([None, 2.0, 50.0])), maybe(2 * rng.standard_normal(heads).astype(np.float32)))


def attention_program(spec: AttentionSpec, table: Float32Array) -> Program:
    """A row of the table is a token's q | k | v."""
    def program(backend: Any) -> Callable[[Any], Any]:
        embedding, attention = backend.prepare(Embedding(table)), backend.prepare(spec)
        return lambda ops: ops.attention(ops.rope_and_cache(ops.embed(embedding), attention), attention, None, True)

    return program


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@settings(max_examples=10)
@given(data=st.data())
def test_attention_with_any_options(kv_dtype: KVCacheDtype, isa: str, data: st.DataObject) -> None:
    """Against the reference in mixed steps, and a sequence's bits alone and whole on the best ISA, in chunks, and token
    by token among others, on one thread and on several that share out its chunks."""
    draw: Any = data.draw
    length = draw(st.sampled_from([5, 140, 460]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    spec = random_spec(draw, rng, kv_dtype, 2 * length)
    width = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
    table = rng.standard_normal((2 * length, width)).astype(np.float32)
    size = limits(2 * length, spec.num_kv_heads, spec.head_dim, kv_dtype)
    program = attention_program(spec, table)
    alone = CpuBackend(1, ISAS[0])
    whole = alone.compile(program(alone), size).step(StepInput.whole([range(length)]))

    native, oracle = CpuBackend(draw(st.sampled_from([1, 2, 3])), isa), ReferenceBackend()
    executors = [backend.compile(program(backend), size) for backend in (native, oracle)]
    batcher = Batcher(size, rng)
    subject, other = batcher.sequence(range(length)), batcher.sequence(range(length, 2 * length))
    chunks = cut(draw, length - (singles := draw(st.integers(0, 4))), 3)
    for count in [*chunks, *[1] * singles]:
        beside = min(length - other.computed, draw(st.integers(0, 30)))
        parts = [(subject, count), *([(other, beside)] if beside else [])]
        step = batcher.step(parts[::-1] if draw(st.booleans()) else parts)
        got, expected = (executor.step(step) for executor in executors)
        error = np.abs(got - expected).max() / np.abs(expected).max()
        assert error < (2e-5 if kv_dtype == "float32" else 2e-2), error
        mine = step.token_ids < length
        np.testing.assert_array_equal(got[mine], whole[step.token_ids[mine]])


@pytest.mark.parametrize("isa", ISAS)
def test_layers_have_windows_ropes_and_norms_of_their_own(isa: str) -> None:
    rng = np.random.default_rng(0)
    length, heads, dim = 90, 2, 16
    table = rng.standard_normal((length, 3 * heads * dim)).astype(np.float32)
    angles = rng.random((length, dim // 2)).astype(np.float32)
    tables = np.cos(angles), np.sin(angles)
    specs = [AttentionSpec(0, heads, heads, dim, 0.3, 7, tables),
             AttentionSpec(1, heads, heads, dim, 0.3, None, None, softcap=3.0),
             AttentionSpec(2, heads, heads, dim, 0.3, None, (tables[0][:, :3], tables[1][:, :3]),
                           sinks=np.float32([0.5, -1]))]
    back = Linear("back", rng.standard_normal((3 * heads * dim, heads * dim)).astype(np.float32) / 5)

    def program(backend: Any) -> Callable[[Any], Any]:
        embedding, linear = backend.prepare(Embedding(table)), backend.prepare(back)
        attentions = [backend.prepare(spec) for spec in specs]

        def forward(ops: Any) -> Any:
            x = ops.embed(embedding)
            for attention in attentions:
                x = ops.linear(ops.attention(ops.rope_and_cache(x, attention), attention, None), linear, x)
            return ops.select_rows(x)
        return forward

    size = replace(limits(length, heads, dim), num_layers=3)
    step = StepInput.whole([range(length)])
    got, expected = (backend.compile(program(backend), size).step(step)
                     for backend in (CpuBackend(2, isa), ReferenceBackend()))
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_logits_may_come_from_any_float_op() -> None:
    """Without a second array of their size: what softcap and scale overwrite lies in the step's own."""
    x = np.random.default_rng(0).standard_normal((9, 33)).astype(np.float32)
    for then in (lambda ops, rows: ops.softcap(ops.scale(rows, 2.0), 3.0), lambda ops, rows: ops.add(rows, rows),
                 lambda ops, rows: rows, lambda ops, rows: ops.activation(rows, Activation("relu"), None)):
        program, step = of_rows(x, then)
        np.testing.assert_allclose(run(program, CpuBackend(1), step), run(program, ReferenceBackend(), step), rtol=1e-6)


def test_a_prepared_linear_has_its_act() -> None:
    rng = np.random.default_rng(0)
    act = ActivationQuant(0.5)
    assert CpuBackend(1).prepare(quantized(rng, "o", 8, 32, 4, act)).act == act
    assert CpuBackend(1).prepare(Linear("o", np.zeros((8, 32), np.float32))).act is None


X = np.zeros((9, 33), np.float32)
BAD_OPS = {
    "clamped_swiglu is always gated": lambda ops, x: ops.activation(x, Activation("clamped_swiglu"), None),
    "gate and up.* 33 wide": lambda ops, x: ops.activation(x, Activation("silu", True), None),
    "curve must be .*clamped_swiglu, not swish": lambda ops, x: ops.activation(x, Activation("swish"), None),
    "limit must be positive": lambda ops, x: ops.activation(x, Activation("relu", limit=0), None),
    "cap must be positive": lambda ops, x: ops.softcap(x, 0.0),
    "cap must be positive ": lambda ops, x: ops.softcap(x, float("nan")),
    "factor must be finite": lambda ops, x: ops.scale(x, float("inf")),
    "add reads floats": lambda ops, x: ops.add(x, ops.quantize(x, ActivationQuant())),
    "add reads rows of 33, but its input has 66": lambda ops, x: ops.add(x, ops.wide),
    "add: its inputs have different rows": lambda ops, x: ops.add(x, ops.all_rows),
    "quantize reads floats": lambda ops, x: ops.quantize(ops.quantize(x, ActivationQuant()), ActivationQuant(0.1)),
    "floats of the selected rows": lambda ops, x: ops.quantize(x, ActivationQuant()),
    "floats of the selected rows ": lambda ops, x: ops.scale(ops.all_rows, 2.0),
}


@pytest.mark.parametrize("message", BAD_OPS)
def test_misused_ops_are_refused(message: str) -> None:
    backend = CpuBackend(1)
    table, wide = backend.prepare(Embedding(X)), backend.prepare(Embedding(np.zeros((9, 66), np.float32)))

    def forward(ops: Any) -> Any:
        ops.all_rows, ops.wide = ops.embed(table), ops.select_rows(ops.embed(wide))
        return BAD_OPS[message](ops, ops.select_rows(ops.all_rows))

    with pytest.raises(ValueError, match=message.strip()) as caught:
        backend.compile(forward, limits(9))
    assert "\n" not in str(caught.value)


def test_positions_beyond_the_table_are_refused() -> None:
    backend = CpuBackend(1)
    table = backend.prepare(Embedding(X))
    with pytest.raises(ValueError, match="max_model_len 10 exceeds the position embedding's 9 positions"):
        backend.compile(lambda ops: ops.select_rows(ops.embed_positions(table)), limits(10))


def ones(*shape: int) -> Float32Array:
    return np.ones(shape, np.float32)


BAD_SPECS = {
    r"rope tables must be \[positions, at most 8\]": {"rope": (ones(9, 9), ones(9, 9))},
    r"rope tables must be \[positions, at most 8\] ": {"rope": (ones(9, 8), ones(9, 4))},
    r"sinks must be \[num_heads\]": {"sinks": ones(2)},
    r"alibi_slopes must be \[num_heads\]": {"alibi_slopes": ones(2)},
    "softcap must be positive": {"softcap": 0.0},
    r"q or k norm's weight must be .* 4 heads of 16, but it has 32": {"q_norm": Norm("rms", ones(32), None, 1e-6)},
    r"q or k norm's weight must be .* 2 heads of 16, but it has 64": {"k_norm": Norm("rms", ones(4, 16), None, 1e-6)},
    "sliding_window must be at least 1": {"sliding_window": 0},
    "head_dim must be at most 256": {"head_dim": 257},
}


@pytest.mark.parametrize("message", BAD_SPECS)
def test_an_impossible_attention_is_refused(message: str) -> None:
    good = AttentionSpec(0, 4, 2, 16, 0.25)
    CpuBackend(1).prepare(good)
    with pytest.raises(ValueError, match=message.strip()) as caught:
        CpuBackend(1).prepare(replace(good, **BAD_SPECS[message]))
    assert "\n" not in str(caught.value)
