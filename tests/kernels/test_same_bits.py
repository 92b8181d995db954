"""One set of bits for every ISA: each op over shapes and values, and whole forwards of every kind of block."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("fptq_runtime._native", reason="the native extension is not built")

import fptq_runtime
from fptq_runtime import _native
from fptq_runtime.config import EngineConfig, KVCacheDtype
from fptq_runtime.engine.engine import Engine
from fptq_runtime.engine.request import SamplingParams
from fptq_runtime.kernels.base import Embedding, Float32Array, Linear, LowRank, Norm, Routing, StepInput, StepLimits
from fptq_runtime.kernels.cpu import CpuBackend
from fptq_runtime.models.loader import Checkpoint, load_model
from fptq_runtime.models.tokenizer import Tokenizer
from tests.engine.conftest import w4a8_decoder
from tests.engine.fake import gist, run
from tests.kernels.test_ops import ACTIVATIONS
from tests.models.hf import save_random
from tests.models.steps import logits_by_chunks

BEST, *OTHERS = _native.available_isas()
DEMO = Path(fptq_runtime.__file__).parent / "demo"
# Of the demo's logits for PROMPT, on any CPU. Another hash is another set of bits: goldens and receipts end there.
DEMO_LOGITS = "8006532e3f6fd4f38958678ee387358c7e4c62c9d2eba3f08417161fd9965f89"
PROMPT = [1, 77, 1000, 5, 5, 64, 900, 3]

def step_of(rows: int) -> tuple[StepLimits, StepInput]:
    return (StepLimits(rows, 1, rows, rows, -(-rows // 16), 16, "float32", 1, 1, 16),
            StepInput.whole([range(rows)]))


def same(program: Callable[[Any], Callable[[Any], Any]], rows: int) -> Float32Array:
    """What every ISA makes of a program over so many rows."""
    limits, step = step_of(rows)

    def of(isa: str) -> Float32Array:
        backend = CpuBackend(1, isa)
        return backend.compile(program(backend), limits).step(step)

    expected = of(BEST)
    for isa in OTHERS:
        np.testing.assert_array_equal(of(isa).view(np.int32), expected.view(np.int32), isa)
    return expected


def numbers(draw: Any, *shape: int) -> Float32Array:
    """Of magnitudes close to one another or far apart, with some zeros and subnormals."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    x = rng.integers(-(2**24), 2**24, shape) * 2.0**-23 * 2.0 ** rng.integers(-1, draw(st.sampled_from([1, 12, 40])),
                                                                             shape)
    x[rng.random(shape) < 0.05] *= draw(st.sampled_from([0, 2.0**-140]))
    return x.astype(np.float32)


@settings(max_examples=60)
@given(data=st.data())
def test_norms(data: st.DataObject) -> None:
    draw: Any = data.draw
    width = draw(st.integers(1, 300))
    x = numbers(draw, 3, width)
    kind = draw(st.sampled_from(["rms", "layer"]))
    norm = Norm(kind, numbers(draw, width), numbers(draw, width) if draw(st.booleans()) else None, 1e-5)

    def program(backend: Any) -> Any:
        table, prepared = backend.prepare(Embedding(x)), backend.prepare(norm)
        return lambda ops: ops.select_rows(ops.norm(ops.embed(table), prepared, None))

    same(program, 3)


@settings(max_examples=60)
@given(data=st.data())
def test_rows(data: st.DataObject) -> None:
    """Activations, caps, scales, sums, and gates of one logit or of many."""
    draw: Any = data.draw
    width = draw(st.integers(1, 40))
    x = numbers(draw, 3, 2 * width)
    activation, cap = draw(st.sampled_from(ACTIVATIONS)), draw(st.sampled_from([0.7, 30.0]))
    single = draw(st.booleans())
    logits = numbers(draw, 3, 1 if single else 2 * width)

    def program(backend: Any) -> Any:
        table, gates = backend.prepare(Embedding(x)), backend.prepare(Embedding(logits))

        def forward(ops: Any) -> Any:
            y = ops.embed(table)
            y = ops.add(y, ops.softcap(ops.scale(y, 1.7), cap))
            return ops.select_rows(ops.activation(ops.gate(y, ops.embed(gates)), activation, None))

        return forward

    same(program, 3)


@settings(max_examples=40)
@given(data=st.data())
def test_float_sums_round_once(data: st.DataObject) -> None:
    """Chains of fused multiply-adds whose terms cancel, underflow and absorb one another: beside numpy's exact ones."""
    draw: Any = data.draw
    k, n = draw(st.integers(1, 4)), 70
    x, weight = numbers(draw, 5, k), numbers(draw, n, k)
    if k > 1 and draw(st.booleans()):
        weight[:, 1] = -weight[:, 0]

    def program(backend: Any) -> Any:
        table, linear = backend.prepare(Embedding(x)), backend.prepare(Linear("linear", weight))
        return lambda ops: ops.select_rows(ops.linear(ops.embed(table), linear))

    got = same(program, 5)
    if k == 1:
        np.testing.assert_array_equal(got, x * weight.T)


@settings(max_examples=40)
@given(data=st.data())
def test_experts(data: st.DataObject) -> None:
    draw: Any = data.draw
    groups = draw(st.sampled_from([1, 2, 4]))
    count = groups * draw(st.integers(2, 9))
    routing = Routing(count, draw(st.integers(1, 2)), groups=groups, top_groups=draw(st.integers(1, groups)),
                      group_best=draw(st.integers(1, 2)), scoring=draw(st.sampled_from(["softmax", "sigmoid"])),
                      normalise=draw(st.booleans()), scale=1.3)
    x, logits, weight = numbers(draw, 4, 20), numbers(draw, 4, count), numbers(draw, count * 10, 20)

    def program(backend: Any) -> Any:
        table, choice, linear, route = (backend.prepare(each) for each in (
            Embedding(x), Embedding(logits), Linear("experts", weight, experts=count), routing))

        def forward(ops: Any) -> Any:
            routed = ops.route(ops.embed(choice), route)
            rows = ops.expert_linear(ops.dispatch(ops.embed(table), routed), linear, routed)
            return ops.select_rows(ops.combine(rows, routed))

        return forward

    same(program, 4)


@settings(max_examples=40)
@given(data=st.data())
def test_adapters(data: st.DataObject) -> None:
    draw: Any = data.draw
    rank, n, k, rows = (draw(st.integers(1, most)) for most in (17, 90, 200, 6))
    x, weight = numbers(draw, rows, k), numbers(draw, n, k)
    down, up = numbers(draw, rank, k), numbers(draw, n, rank)
    limits, step = step_of(rows)
    step = StepInput(**{**vars(step), "adapters": np.array([1], np.int32)})

    def of(isa: str) -> Float32Array:
        backend = CpuBackend(1, isa)
        table, made = backend.prepare(Embedding(x)), backend.adaptable(backend.prepare(Linear("linear", weight)), 1)
        backend.adapt(made, 1, [LowRank(0, down, up, 0.5)])
        return backend.compile(lambda ops: ops.select_rows(ops.linear(ops.embed(table), made)), limits).step(step)

    for isa in OTHERS:
        np.testing.assert_array_equal(of(isa), of(BEST), isa)


@pytest.mark.parametrize("family", [
    "llama3-rope", "gemma2", "bloom", "gpt2", "stablelm", "gpt-oss", "deepseek-v3", "qwen2-moe", "lfm2", "qwen3-next",
    "mamba", "falcon-mamba", "falcon-h1", "cohere2", "olmo3"])
def test_whole_models(family: str, tmp_path: Path) -> None:
    """A prompt's logits, in two chunks, and those of tokens after it, from a cache of each kind."""
    save_random(family, tmp_path)
    tokens = np.random.default_rng(0).integers(3, 200, 60).tolist()

    def of(isa: str) -> Float32Array:
        backend = CpuBackend(1, isa)
        decoder = load_model(Checkpoint(tmp_path), backend)
        return np.stack([logits_by_chunks(decoder, backend, tokens, [40, 15, *[1] * 5], dtype)
                         for dtype in get_args(KVCacheDtype)])

    expected = of(BEST)
    assert np.isfinite(expected).all()
    for isa in OTHERS:
        np.testing.assert_array_equal(of(isa), expected, isa)


def answers(isa: str) -> list[Any]:
    """Tokens, text and log-probabilities of the demo at 4 bits, greedy and drawn."""
    backend = CpuBackend(2, isa)
    engine = Engine(w4a8_decoder(backend), backend, EngineConfig(max_model_len=128), Tokenizer(DEMO))
    prompt = list(range(100, 140))
    engine.add_request("greedy", prompt, SamplingParams(max_tokens=40, temperature=0, logprobs=5, prompt_logprobs=1))
    engine.add_request("drawn", prompt, SamplingParams(max_tokens=40, temperature=1.2, top_p=0.9, seed=7, logprobs=5,
                                                       frequency_penalty=0.5))
    events = run(engine)
    return [gist(events[name, 0]) for name in ("greedy", "drawn")]


def test_answers() -> None:
    expected = answers(BEST)
    for isa in OTHERS:
        assert answers(isa) == expected, isa


@pytest.mark.parametrize("isa", [BEST, *OTHERS])
def test_the_demos_logits_are_those_of_every_machine(isa: str) -> None:
    backend = CpuBackend(1, isa)
    logits = logits_by_chunks(load_model(Checkpoint(DEMO), backend), backend, PROMPT, [len(PROMPT)], "int8")
    assert hashlib.sha256(logits.astype("<f4").tobytes()).hexdigest() == DEMO_LOGITS
