"""The native executor against the reference backend, against itself in other company, and against bad input."""

from __future__ import annotations

import gc
import runpy
import subprocess
import sys
import threading
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("fptq_runtime._native", reason="the native extension is not built")

from fptq_runtime import _native
from fptq_runtime.config import KVCacheDtype
from fptq_runtime.kernels import cpu
from fptq_runtime.kernels.base import (
    Activation,
    ActivationQuant,
    Embedding,
    Linear,
    QuantizedWeight,
    Routing,
    StepInput,
    StepLimits,
    Work,
)
from fptq_runtime.kernels.cpu import CpuBackend, _cgroup_quota, available_threads
from fptq_runtime.kernels.reference import ReferenceBackend
from tests.kernels.small import VOCAB, Batcher, Options, int32, limits, make_decoder, random_tokens

ISAS = _native.available_isas()
KV_DTYPES: tuple[KVCacheDtype, ...] = ("float32", "bf16", "int8")

ROUTED = Routing(8, 3, "sigmoid", scale=1.5, bias=np.linspace(0, 0.3, 8, dtype=np.float32), groups=4, top_groups=2,
                 group_best=2)
FAMILIES = {
    "llama": Options(),
    "llama bf16": Options(dtype=torch.bfloat16),
    "llama fp16": Options(dtype=torch.float16),
    "llama weight-only": Options(act="weight-only"),
    "bloom weight-only": Options(norm="layer", activation=Activation("gelu_tanh"), rope=False, alibi=True, bias=True,
                                 act="weight-only", bits=8, group_size=None),
    "llama low rank": Options(rank=5),
    "llama weight-only low rank": Options(act="weight-only", rank=2, dtype=torch.bfloat16),
    "mistral": Options(window=40),
    "qwen2": Options(bias=True, heads=6, head_dim=20),
    "qwen3": Options(qk_norm=True, head_dim=32),
    "bloom": Options(norm="layer", activation=Activation("gelu_tanh"), rope=False, alibi=True, bias=True,
                     embedding_norm=True, heads=5, kv_heads=5, intermediate=100),
    "experts": Options(intermediate=40, routing=Routing(8, 3)),
    "experts bf16": Options(intermediate=40, routing=ROUTED, bias=True, dtype=torch.bfloat16),
    "experts of sparsemixer": Options(intermediate=40, routing=Routing(8, 2, "sparsemixer", False, jitter=0.2)),
    "experts weight-only": Options(intermediate=64, routing=ROUTED, act="weight-only"),
    "one kv head": Options(heads=20, kv_heads=1, head_dim=8),
}


def mixed_steps(options: Options, kv_dtype: KVCacheDtype, seed: int) -> list[StepInput]:
    """Prefill, chunks that cross blocks, decode and all of them together."""
    rng = np.random.default_rng(seed)
    batcher = Batcher(limits(options, kv_dtype), rng)
    a, b, c = (batcher.sequence(random_tokens(rng, n)) for n in (150, 60, 300))
    plan = [[(a, 140)], [(a, 1)], [(b, 37), (a, 1)], [(c, 1), (b, 1), (a, 1)], [(c, 130), (b, 20)], [(c, 160), (a, 1)],
            [(b, 1), (c, 1), (a, 1)]]
    return [batcher.step(parts) for parts in plan]


def row_errors(options: Options, kv_dtype: KVCacheDtype, isa: str) -> np.ndarray[Any, Any]:
    """max |native - reference| of each row, over max |logit|."""
    executors = [backend.compile(make_decoder(options, backend), limits(options, kv_dtype))
                 for backend in (CpuBackend(2, isa), ReferenceBackend())]
    errors = []
    for step in mixed_steps(options, kv_dtype, seed=1):
        got, expected = (executor.step(step) for executor in executors)
        assert got.shape == expected.shape and np.isfinite(expected).all()
        errors.append(np.abs(got - expected).max(1) / np.abs(expected).max())
    return np.concatenate(errors)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("family", FAMILIES)
def test_float_models_match_reference(family: str, isa: str) -> None:
    assert row_errors(FAMILIES[family], "float32", isa).max() < 1e-5


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kv_dtype", ["bf16", "int8"])
def test_rounded_caches_match_reference(kv_dtype: KVCacheDtype, isa: str) -> None:
    assert row_errors(FAMILIES["qwen3"], kv_dtype, isa).max() < 5e-3


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("family", "act", "bits", "group_size"), [
    ("llama", "static", 4, 32),
    ("mistral", "dynamic", 4, None),
    ("bloom", "dynamic", 4, 32),
    ("qwen3", "static", 8, None),
    ("qwen2", "dynamic", 8, None),
    ("llama", "mixed", 4, 32),
    ("llama low rank", "static", 4, 32),
    ("llama low rank", "dynamic", 4, None),
])
def test_quantized_models_match_reference(family: str, act: Any, bits: Any, group_size: int | None, isa: str) -> None:
    """A last-bit difference flips a code here and there, which costs a row up to a few percent in these narrow
    networks of noise; rows without a flip agree as floats do."""
    options = replace(FAMILIES[family], act=act, bits=bits, group_size=group_size, heads=4, kv_heads=4,
                      intermediate=64 if act == "mixed" else 96)  # whole panels: gate, up and what follows are fused
    errors = row_errors(replace(options, layers=1), "float32", isa)
    assert np.median(errors) < 1e-5
    assert errors.max() < 4e-2
    assert row_errors(options, "int8", isa).max() < 4e-2


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("family", "act", "bits", "group_size"), [
    ("experts", "dynamic", 4, 32), ("experts", "static", 8, None), ("experts bf16", "dynamic", 8, 32),
])
def test_quantized_experts_match_reference(family: str, act: Any, bits: Any, group_size: int | None, isa: str) -> None:
    """A flipped code can also send a token to another expert, or group of them, where two were as good: what comes
    behind it is another row."""
    options = replace(FAMILIES[family], act=act, bits=bits, group_size=group_size, heads=4, kv_heads=4, intermediate=96)
    errors = row_errors(replace(options, layers=1), "float32", isa)
    assert np.median(errors) < 1e-5
    assert np.quantile(errors, 0.99) < 4e-2
    assert np.median(row_errors(options, "int8", isa)) < 2e-2


def in_company(backend: CpuBackend, options: Options, kv_dtype: KVCacheDtype, token_ids: list[int],
               seed: int) -> np.ndarray[Any, Any]:
    """The sequence's logits [T, V], fed in random chunks among random neighbours."""
    executor = backend.compile(make_decoder(options, backend), limits(options, kv_dtype))
    rng = np.random.default_rng(seed)
    batcher = Batcher(limits(options, kv_dtype), rng)
    subject = batcher.sequence(token_ids)
    neighbours = [batcher.sequence(random_tokens(rng, int(n))) for n in rng.integers(40, 200, 3)]
    got = []
    while subject.computed < len(token_ids):
        left = len(token_ids) - subject.computed
        count = int(min(left, rng.choice([1, 2, 5, 17, 64, 131, 300])))
        parts = [(s, int(min(len(s.token_ids) - s.computed, rng.integers(1, 30)))) for s in neighbours]
        parts = [part for part in parts if part[1] and rng.random() < 0.6]
        at = int(rng.integers(0, len(parts) + 1))
        row = sum(part[1] for part in parts[:at])
        got.append(executor.step(batcher.step([*parts[:at], (subject, count), *parts[at:]]))[row : row + count])
    return np.concatenate(got)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("options", "kv_dtype"), [
    (Options(act="dynamic", heads=3, kv_heads=1, hidden=96, head_dim=32), "int8"),
    (Options(act="static", window=200), "bf16"),
    (Options(act="dynamic", intermediate=40, group_size=None, routing=Routing(16, 3)), "int8"),
    (Options(intermediate=40, routing=ROUTED), "float32"),
    (Options(), "float32"),
    (Options(act="weight-only", group_size=64, intermediate=192), "int8"),
    (Options(act="mixed", intermediate=128), "int8"),
    (Options(act="dynamic", rank=3), "int8"),
    (replace(FAMILIES["bloom"], heads=4, kv_heads=4), "int8"),
])
def test_bits_do_not_depend_on_isa_or_company(options: Options, kv_dtype: KVCacheDtype, isa: str) -> None:
    token_ids = random_tokens(np.random.default_rng(0), 420)
    alone = Batcher(limits(options, kv_dtype), np.random.default_rng(9))
    backend = CpuBackend(1, ISAS[0])
    executor = backend.compile(make_decoder(options, backend), limits(options, kv_dtype))
    expected = executor.step(alone.step([(alone.sequence(token_ids), len(token_ids))]))
    for seed, threads in ((1, 1), (2, 2), (3, 3)):
        got = in_company(CpuBackend(threads, isa), options, kv_dtype, token_ids, seed)
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("isa", ISAS)
def test_bits_do_not_depend_on_shared_out_chunks(isa: str) -> None:
    """A long decode on several threads attends to its chunks apart; prefill on one thread does not."""
    options = Options(layers=1, heads=4, kv_heads=1, max_len=1024)
    token_ids = random_tokens(np.random.default_rng(0), 1000)
    results = []
    for threads, chunks in ((1, [1000]), (4, [990, 1, 1, 3, 5])):
        backend = CpuBackend(threads, isa)
        executor = backend.compile(make_decoder(options, backend), limits(options, "int8"))
        batcher = Batcher(limits(options, "int8"), np.random.default_rng(threads))
        sequence = batcher.sequence(token_ids)
        results.append(np.concatenate([executor.step(batcher.step([(sequence, n)])) for n in chunks])[-10:])
    np.testing.assert_array_equal(results[0], results[1])


def test_programs_share_a_pool_from_several_threads() -> None:
    backend, options = CpuBackend(2), Options(act="dynamic", hidden=128)
    decoder = make_decoder(options, backend)
    steps = mixed_steps(options, "int8", seed=3)
    results: list[list[np.ndarray[Any, Any]]] = [[], [], []]

    def work(result: list[np.ndarray[Any, Any]]) -> None:
        executor = backend.compile(decoder, limits(options, "int8"))
        result.extend(executor.step(step) for step in steps * 5)

    work(results[0])
    workers = [threading.Thread(target=work, args=(result,)) for result in results[1:]]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for result in results[1:]:
        for got, expected in zip(result, results[0], strict=True):
            np.testing.assert_array_equal(got, expected)


def test_steps_keep_their_logits_and_may_ask_for_none() -> None:
    backend, options = CpuBackend(1), Options()
    executor = backend.compile(make_decoder(options, backend), limits(options))
    batcher = Batcher(limits(options), np.random.default_rng(0))
    sequence = batcher.sequence(list(range(40)))
    step = replace(batcher.step([(sequence, 20)]), logits_rows=int32([]))
    assert executor.step(step).shape == (0, VOCAB)
    first = executor.step(batcher.step([(sequence, 10)]))
    kept = first.copy()
    executor.step(batcher.step([(sequence, 10)]))
    np.testing.assert_array_equal(first, kept)


def test_router_logits_that_are_not_finite_harm_their_own_rows_alone() -> None:
    """Each row still goes to as many experts as it should, whatever they make of it."""
    backend, routing = CpuBackend(2), Routing(8, 3, groups=2, top_groups=1, group_best=2)
    rng = np.random.default_rng(0)
    x, logits = rng.normal(size=(6, 32)).astype(np.float32), rng.normal(size=(6, 8)).astype(np.float32)
    spoilt = logits.copy()
    spoilt[1], spoilt[2, 3], spoilt[4] = np.nan, np.inf, -np.inf
    weight = rng.normal(size=(8 * 40, 32)).astype(np.float32)
    results = []
    for choice in (logits, spoilt):
        table, scores = (backend.prepare(Embedding(rows)) for rows in (x, choice))
        linear, route = backend.prepare(Linear("experts", weight, experts=8)), backend.prepare(routing)

        def forward(ops: Any, prepared: Any = (table, scores, linear, route)) -> Any:
            table, scores, linear, route = prepared
            routed = ops.route(ops.embed(scores), route)
            rows = ops.expert_linear(ops.dispatch(ops.embed(table), routed), linear, routed)
            return ops.select_rows(ops.combine(rows, routed))

        executor = backend.compile(forward, limits(Options(), max_tokens=16))
        results.append(executor.step(StepInput.whole([list(range(6))], 32)))
    np.testing.assert_array_equal(results[0][[0, 3, 5]], results[1][[0, 3, 5]])


def test_work_counts_the_experts_that_a_step_reads() -> None:
    """Beside all other linears: one token's two, all that ten tokens went to, and of steps not taken the expected."""
    options = Options(layers=1, intermediate=64, routing=Routing(8, 2))
    backend = CpuBackend(1)
    executor = backend.compile(make_decoder(options, backend), limits(options))
    one = 4 * (2 * 64 * 64 + 64 * 64)  # of an expert's weights
    expected = [executor.work(tokens, tokens).weight_bytes for tokens in (1, 2, 10**3)]
    rest = expected[0] - 2 * one
    assert expected[1] == rest + round(8 * (1 - 0.75**2) * 2 / 3 * one) + round(8 * (1 - 0.75**2) * one / 3)
    assert expected[2] == rest + 8 * one
    batcher = Batcher(limits(options), np.random.default_rng(0))
    sequence = batcher.sequence([7] * 30)
    executor.step(batcher.step([(sequence, 10)]))
    reached = (executor.work(10, 10).weight_bytes - rest) / one
    assert reached == int(reached) and 2 <= reached <= 8
    assert executor.work(1, 1).weight_bytes == expected[0]


def test_a_cache_is_shared_only_where_it_fits() -> None:
    pool, sizes = _native.ThreadPool(1), vars(limits(Options()))
    program = _native.Program(pool, "", **sizes)
    second = _native.Program(pool, "", **{**sizes, "max_logits_rows": 1}, sharing=program)
    assert np.shares_memory(program.blocks, second.blocks)
    with pytest.raises(ValueError, match="shared"):
        _native.Program(pool, "", **{**sizes, "num_blocks": 1}, sharing=program)
    del program
    second.blocks[:] = 1  # still there


def test_what_experts_read_is_checked() -> None:
    program = _native.Program(_native.ThreadPool(1), "", **vars(limits(Options())))
    table = _native.Embedding(np.zeros((VOCAB, 8), np.float32))
    weight = _native.pack_float(np.zeros((4 * 64, 8), np.float32))
    facts: dict[str, Any] = {"num_experts": 4, "top_k": 2, "scoring": "softmax", "normalise": True, "scale": 1.0,
                             "bias": [], "groups": 1, "top_groups": 1, "group_best": 1, "jitter": 0.0}
    routing = _native.Routing(**facts)
    x, other = program.embed(table), program.embed(table)
    with pytest.raises(ValueError, match="route reads rows of 4"):
        program.route(x, routing)
    scores = program.linear(x, _native.Linear("r", None, _native.pack_float(np.zeros((4, 8), np.float32)), [], None),
                            None)
    routed = program.route(scores, routing)
    experts = _native.Experts("e", None, weight, [], None, 4, 64)
    rows = program.dispatch(x, routed)
    for call, why in (
        (lambda: program.experts(x, experts, routed), "reads dispatched rows"),
        (lambda: program.experts(rows, experts, other), "reads what `route` made"),
        (lambda: program.dispatch(rows, routed), "different rows"),
        (lambda: program.combine(x, routed, None), "rows of another route"),
        (lambda: program.add(rows, rows), "not dispatched"),
        (lambda: program.finish(rows), "must end with its logits"),
        (lambda: _native.Experts("e", None, weight, [], None, 3, 64), "in whole panels"),
        (lambda: _native.Experts("e", None, weight, [0.0], None, 4, 64), "bias must be"),
        (lambda: _native.Routing(**{**facts, "top_k": 5}), "top_k must be within"),
        (lambda: _native.Routing(**{**facts, "groups": 4}), "groups must be of equal size"),
    ):
        with pytest.raises(ValueError, match=why):
            call()


BAD_STEPS = {
    "token_ids": {"token_ids": [0, 1, VOCAB]},
    "token_ids ": {"token_ids": [0, -1, 2]},
    "positions": {"positions": [40, 41, 43]},
    "seq_lens": {"seq_lens": [1025]},
    "seq_lens ": {"seq_lens": [2]},
    "slot_mapping": {"slot_mapping": [1 << 30, 9, 10]},
    "slot_mapping ": {"slot_mapping": [-1, 9, 10]},
    "query_start_loc": {"query_start_loc": [0, 4]},
    "query_start_loc ": {"query_start_loc": [1, 3]},
    "query_start_loc  ": {"query_start_loc": [0, -1]},
    "query_start_loc   ": {"query_start_loc": [0, 2], "seq_lens": [42]},
    "block_tables": {"block_tables": [[0, 80]]},
    "block_tables ": {"block_tables": [[-1, 3]]},
    "block_tables  ": {"block_tables": [[3]]},
    "logits_rows": {"logits_rows": [3]},
    "logits_rows ": {"logits_rows": [-1]},
    "tokens": {"token_ids": [], "positions": [], "slot_mapping": [], "query_start_loc": [0, 0], "logits_rows": []},
    "sequences": {"seq_lens": [], "query_start_loc": [0], "block_tables": np.zeros((0, 1)), "state_slots": [],
                  "adapters": []},
    "state_slots": {"state_slots": [8]},
    "state_slots ": {"state_slots": [-1]},
}


@pytest.mark.parametrize("case", BAD_STEPS)
def test_bad_steps_are_refused_before_anything_is_written(case: str) -> None:
    options = Options()
    backend = CpuBackend(1)
    executor = backend.compile(make_decoder(options, backend), limits(options))
    batcher = Batcher(limits(options), np.random.default_rng(0))
    sequence = batcher.sequence(random_tokens(np.random.default_rng(0), 64))
    executor.step(batcher.step([(sequence, 40)]))
    good = batcher.step([(sequence, 3)])
    expected = executor.step(good)
    bad = replace(good, **{name: int32(values) for name, values in BAD_STEPS[case].items()})
    with pytest.raises(ValueError, match=case.strip()) as caught:
        executor.step(bad)
    assert "\n" not in str(caught.value)
    np.testing.assert_array_equal(executor.step(good), expected)


@pytest.mark.parametrize("field", ["token_ids", "positions", "slot_mapping", "seq_lens", "block_tables", "logits_rows",
                                   "state_slots"])
def test_arrays_of_the_wrong_kind_are_refused(field: str) -> None:
    options = Options()
    backend = CpuBackend(1)
    executor = backend.compile(make_decoder(options, backend), limits(options))
    batcher = Batcher(limits(options), np.random.default_rng(0))
    good = batcher.step([(batcher.sequence([1, 2, 3, 4]), 4)])
    array = getattr(good, field)
    for wrong in (array.astype(np.int64), np.repeat(array, 2, axis=-1)[..., ::2], array[None]):
        if wrong.flags.c_contiguous and wrong.dtype == np.int32 and wrong.shape == array.shape:
            continue  # a slice of one element is contiguous
        with pytest.raises(ValueError, match=field):
            executor.step(replace(good, **{field: wrong}))


@pytest.mark.parametrize(("contract", "field"), [("StepInput", 1), ("SampleInput", 3), ("SampleOutput", 2),
                                                 ("PARAMETERS", 1)])
def test_an_extension_that_reads_other_arrays_is_not_imported(monkeypatch: pytest.MonkeyPatch, contract: str,
                                                             field: int) -> None:
    other = _native.contracts()
    other[contract][field], other[contract][0] = other[contract][0], other[contract][field]
    monkeypatch.setattr(_native, "contracts", lambda: other)
    with pytest.raises(ImportError, match="built from other sources"):
        runpy.run_path(cpu.__file__)


def test_a_step_over_its_limits_is_refused() -> None:
    options = Options()
    backend = CpuBackend(1)
    small = replace(limits(options), max_tokens=8, max_seqs=2, max_logits_rows=4)
    executor = backend.compile(make_decoder(options, backend), small)
    batcher = Batcher(small, np.random.default_rng(0))
    sequences = [batcher.sequence(random_tokens(np.random.default_rng(0), 30)) for _ in range(3)]
    with pytest.raises(ValueError, match="8 tokens"):
        executor.step(replace(batcher.step([(sequences[0], 9)]), logits_rows=int32([8])))
    with pytest.raises(ValueError, match="4 logits rows"):
        executor.step(batcher.step([(sequences[1], 5)]))
    with pytest.raises(ValueError, match="2 sequences"):
        executor.step(batcher.step([(s, 1) for s in sequences]))


def test_mixed_precision_is_refused_by_name() -> None:
    backend = CpuBackend(1)
    with pytest.raises(ValueError, match=r"layers\.3\.o.*quantized activations"):
        backend.prepare(Linear("layers.3.o", np.zeros((8, 32), np.float32), act=ActivationQuant()))


@pytest.mark.parametrize(("linear", "message"), [
    (Linear("layers.3.o", QuantizedWeight(np.zeros((8, 16), np.uint8), np.ones((8, 1), np.float32), 4, 32, "float"),
            act=ActivationQuant()), r"layers\.3\.o.*FP4 weights"),
    (Linear("layers.3.o", QuantizedWeight(np.zeros((8, 4), np.int32), np.ones((8, 1), np.float32), 4, 32),
            act=ActivationQuant(None, "float")), "FP8 activations"),
    (Linear("layers.3.o", QuantizedWeight(np.zeros((8, 4), np.int32), np.ones((8, 1), np.float32), 4, 32), None,
            ActivationQuant(), (np.pi * np.arange(64, dtype=np.float32).reshape(2, 32), np.zeros((8, 2), np.float32))),
     r"layers\.3\.o\.low_rank_down.*int8 multiples"),
])
def test_floats_in_8_bits_are_refused_by_name(linear: Linear, message: str) -> None:
    with pytest.raises(ValueError, match=f"{message}.*reference backend"):
        CpuBackend(1).prepare(linear)


def test_kernels_are_described_as_they_are_used() -> None:
    backend = CpuBackend(1, "generic")
    weight = QuantizedWeight(np.zeros((8, 4), np.int32), np.ones((8, 1), np.float32), 4, 32)
    none = backend.describe()
    backend.prepare(Linear("o", weight))
    assert set(backend.describe()) - set(none) == {"linear int4, float input"}
    backend.prepare(Linear("o", weight, act=ActivationQuant()))
    backend.prepare(Linear("o", np.zeros((8, 32), np.float16)))
    assert {kind: kernel for kind, kernel in backend.describe().items() if kind not in none} == {
        "linear int4, float input": "float32, plain C++, codes widened in cache",
        "linear int4": "int4 x int8, plain C++",
        "linear float16": "float32, plain C++",
    }


@pytest.mark.parametrize(("options", "element"), [
    (Options(act="weight-only"), 0.5 + 4 / 32), (Options(dtype=torch.float16), 2), (Options(dtype=torch.bfloat16), 2),
    (Options(), 4)])
def test_work_counts_weights_as_they_lie_in_memory(options: Options, element: float) -> None:
    backend = CpuBackend(1)
    executor = backend.compile(make_decoder(options, backend), limits(options))
    hidden, width = options.hidden, options.heads * options.head_dim
    kv = 2 * options.kv_heads * options.head_dim
    weights = options.layers * hidden * (2 * width + kv + 3 * options.intermediate)
    of_rows = hidden * (width + 3 * options.intermediate + VOCAB)  # all after the last attention
    assert executor.work(3, 2) == Work(3 * (weights + VOCAB * hidden) - of_rows,
                                       int((weights + VOCAB * hidden) * element))


def test_operands_that_do_not_fit_are_refused() -> None:
    backend, options = CpuBackend(1), Options()
    table = backend.prepare(Embedding(np.zeros((10, 64), np.float32)))
    linear = backend.prepare(Linear("up", np.zeros((8, 32), np.float32)))
    with pytest.raises(ValueError, match="up reads rows of 32"):
        backend.compile(lambda ops: ops.linear(ops.embed(table), linear), limits(options))
    with pytest.raises(ValueError, match="logits"):
        backend.compile(lambda ops: ops.embed(table), limits(options))
    with pytest.raises(ValueError, match="rope table"):
        backend.compile(make_decoder(options, backend), replace(limits(options), max_model_len=2048))
    with pytest.raises(ValueError, match="KV heads"):
        backend.compile(make_decoder(options, backend), replace(limits(options), num_kv_heads=4))


def test_an_unknown_isa_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"unknown ISA path 'sse9'.*generic"):
        CpuBackend(1, "sse9")
    monkeypatch.setenv("FPTQ_ISA", "sse9")
    with pytest.raises(ValueError, match="sse9"):
        CpuBackend(1)
    monkeypatch.setenv("FPTQ_ISA", "generic")
    assert CpuBackend(1).describe()["isa"] == "generic"
    monkeypatch.delenv("FPTQ_ISA")
    assert CpuBackend(1).describe()["isa"] == ISAS[0]


def test_an_embedding_stays_where_it_is() -> None:
    weight = np.zeros((10, 64), np.float32)
    backend = CpuBackend(1)
    table = backend.prepare(Embedding(weight))
    weight[3] = 7
    limits = StepLimits(max_tokens=1, max_seqs=1, max_logits_rows=1, max_model_len=16, num_blocks=1, block_size=16,
                        kv_dtype="float32", num_layers=1, num_kv_heads=1, head_dim=16)
    executor = backend.compile(lambda ops, table=table: ops.select_rows(ops.embed(table)), limits)
    assert executor.step(StepInput.whole([[3]])).tolist() == [[7.0] * 64]
    held = weakref.ref(weight)
    del weight, table
    gc.collect()
    assert held() is not None  # while a program reads it
    del executor
    gc.collect()
    assert held() is None


def test_threads() -> None:
    assert CpuBackend(3).describe()["threads"] == "3"
    assert CpuBackend().describe()["threads"] == str(available_threads())
    with pytest.raises(ValueError, match="threads"):
        CpuBackend(-1)


def test_more_threads_than_cores_are_named(caplog: pytest.LogCaptureFixture) -> None:
    CpuBackend(available_threads() + 1)
    assert "slow every step down" in caplog.text


def test_more_threads_than_the_machine_starts_are_refused() -> None:
    """In a process whose address space is too small for their stacks."""
    script = (
        "import resource\n"
        "from fptq_runtime.kernels.cpu import CpuBackend\n"
        "resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))\n"
        "try:\n"
        "    CpuBackend(20000)\n"
        "except ValueError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "this machine cannot start 20000 threads\n"


@pytest.mark.parametrize(("files", "expected"), [
    ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "150000 100000",
      "sys/fs/cgroup/a/b/cpu.max": "max 100000"}, 1.5),
    ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "400000 100000\n"}, 4.0),
    ({"proc/self/cgroup": "4:memory:/x\n3:cpu,cpuacct:/x\n", "sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "200000",
      "sys/fs/cgroup/cpu/x/cpu.cfs_period_us": "100000", "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
      "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"}, 2.0),
    ({}, 1e9),
])
def test_cgroup_quota(tmp_path: Path, files: dict[str, str], expected: float) -> None:
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert _cgroup_quota(tmp_path) == expected
