"""Times of the Llama 3 8B shape with random weights, against bfloat16 torch under CUDA graphs, and of other tiles."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from ml_dtypes import bfloat16

from benchmarks.gpu_check.check import Check, Row, graphed
from benchmarks.gpu_check.compiled import launched_kernels
from benchmarks.gpu_check.roofline import Machine, llama_launches, seconds
from fptq_runtime.config import EngineConfig
from fptq_runtime.engine.engine import Engine
from fptq_runtime.engine.request import SamplingParams
from fptq_runtime.engine.sampler import SampleBatch, Sampling
from fptq_runtime.engine.sequence import Sequence as EngineSequence
from fptq_runtime.kernels.base import (
    Activation,
    ActivationQuant,
    AttentionSpec,
    Linear,
    QuantizedWeight,
    StepInput,
    StepLimits,
)
from fptq_runtime.kernels.triton import choice, fused
from fptq_runtime.kernels.triton.attention import (
    DeviceCache,
    attention,
    attention_bytes,
    prepare_attention,
    rope_and_cache,
)
from fptq_runtime.kernels.triton.backend import TritonBackend
from fptq_runtime.kernels.triton.choice import linear_cases
from fptq_runtime.kernels.triton.device import capability, fastest
from fptq_runtime.kernels.triton.linear import kind, random_case, run_choice, run_linear
from fptq_runtime.kernels.triton.values import DeviceBatch
from fptq_runtime.measure.shapes import SHAPES, NoText, random_decoder

SHAPE = "llama-3-8b"
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
CONTEXT = 1024  # tokens in the cache of each decoding sequence
PREFILL = 8192
LONG = 32768


def roofs(check: Check) -> Iterator[Row]:
    """cuBLAS's int8 product, and all the bytes that a copy moves."""
    check.roofs = check.backend.roofs()
    assert check.roofs is not None
    yield {"int8 TOPS": check.roofs.gops / 1000, "GB/s": check.roofs.read_gb_per_s}


def kernels(check: Check) -> Iterator[Row]:
    """Each linear of the shape by itself, its weights from memory, as a share of the roof that binds it."""

    device, rows = check.backend.device, (1, 16, 64, 128, 2048)
    _warm_linears(check, rows)
    for case in sorted(linear_cases(rows=rows), key=lambda case: case.m):
        copies = max(2, -(-(192 << 20) // case.weight_bytes)) if case.m <= 256 else 1
        made = [random_case(case, device) for _ in range(min(copies, 12))]
        took = graphed([partial(run_linear, x, layer, None, True) for layer, x in made])
        floats = torch.randn((case.m, case.k), device=device, dtype=torch.bfloat16)
        weights = [torch.randn((case.n, case.k), device=device, dtype=torch.bfloat16) for _ in range(len(made[:4]))]
        bf16 = graphed([partial(torch.nn.functional.linear, floats, weight) for weight in weights])
        yield {"layer": case.name, "M": case.m, "us": 1e6 * took, "bf16 us": 1e6 * bf16, "speedup": bf16 / took,
               **_roofline(check, case.bytes, case.multiply_adds, took)}
        del made, weights


def _warm_linears(check: Check, rows: Sequence[int]) -> None:
    def once(case: Any) -> None:
        layer, x = random_case(case, check.backend.device)
        run_linear(x, layer, None, invariant=True)

    check.warm([partial(once, case) for case in sorted(linear_cases(rows=rows), key=lambda case: case.m)])


def _roofline(check: Check, moved: int, multiply_adds: int, took: float) -> Row:
    rates: Row = {"GB/s": 1e-9 * moved / took, "TOPS": 2e-12 * multiply_adds / took}
    if check.roofs is None:
        return rates
    memory, compute = 1e-9 * moved / check.roofs.read_gb_per_s, 2e-9 * multiply_adds / check.roofs.gops
    return {**rates, "of the roof": max(memory, compute) / took, "bound": "memory" if memory > compute else "compute"}


def others(check: Check) -> Iterator[Row]:
    """What lies between the linears, at decode and prefill."""

    config, device, act = SHAPES[SHAPE].config, check.backend.device, ActivationQuant()
    hidden, inner = config.hidden_size, config.intermediate_size
    weight = torch.ones(hidden, device=device)
    for m in (1, 16, 128, 2048):
        x, up = torch.randn((m, hidden), device=device), torch.randn((m, 2 * inner), device=device)
        calls: dict[str, tuple[Callable[[], Any], int]] = {
            "norm, quantize": (partial(fused.norm, x, weight, None, 1e-5, "rms", act),
                               fused.moved_bytes(m, hidden, hidden, act)),
            "silu · mul, quantize": (partial(fused.activation, up, Activation("silu", True), act),
                                     fused.moved_bytes(m, 2 * inner, inner, act)),
        }
        for name, (call, moved) in calls.items():
            took = graphed([call] * 8)
            yield {"op": name, "M": m, "us": 1e6 * took, "GB/s": 1e-9 * moved / took}


def attend(check: Check) -> Iterator[Row]:
    """Paged attention of one layer over an int8 cache, a different one each time."""

    config, device = SHAPES[SHAPE].config, check.backend.device
    heads, kv_heads, dim, block = config.num_heads, config.num_kv_heads, config.head_dim, 32
    for seqs, context, query in ((1, LONG, 1), (8, LONG, 1), (1, CONTEXT, 1), (64, CONTEXT, 1), (1, 8192, 8192),
                                 (1, LONG, 512)):
        layers = 4 if query == 1 else 1
        per = -(-context // block)
        cache = DeviceCache(StepLimits(query * seqs, seqs, seqs, context, seqs * per, block, "int8", layers, kv_heads,
                                       dim), device)
        cache.keys.random_(-127, 128)
        cache.values.random_(-127, 128)
        cache.key_scales.fill_(0.01)
        cache.value_scales.fill_(0.01)
        specs = [prepare_attention(AttentionSpec(layer, heads, kv_heads, dim, dim**-0.5), device)
                 for layer in range(layers)]
        ints = partial(torch.as_tensor, dtype=torch.int32, device=device)
        positions = ints([p for _ in range(seqs) for p in range(context - query, context)])
        tables = torch.randperm(seqs * per, device=device).int().view(seqs, per)
        rows = torch.arange(seqs * query, device=device)
        slots = tables.repeat_interleave(query, 0)[rows, (positions // block).long()]
        batch = DeviceBatch(positions, positions, slots * block + positions % block,
                            ints([query * i for i in range(seqs + 1)]), ints([context] * seqs), tables,
                            ints(list(range(seqs))), query, context)
        qkv = torch.randn((seqs * query, (heads + 2 * kv_heads) * dim), device=device)
        act = ActivationQuant()
        queries = [rope_and_cache(qkv, spec, cache, batch) for spec in specs]
        took = graphed([partial(attention, q, spec, cache, batch, act)
                         for q, spec in zip(queries, specs, strict=True)])
        moved = attention_bytes(specs[0], "int8", [query] * seqs, [context] * seqs)
        pairs = seqs * sum(range(context - query + 1, context + 1))
        yield {"sequences": seqs, "context": context, "queries": query, "us": 1e6 * took,
               **_roofline(check, moved, 2 * pairs * heads * dim, took)}
        del cache


def _model(check: Check, profile: str) -> Any:
    """Random weights on the GPU. grouped: a scale a group of 128; two-level: integer multiples of one a row."""

    if profile not in check.models:
        check.models.clear()
        generator = np.random.default_rng(0)

        class Grouped(TritonBackend):
            def prepare(self, parameter: Any) -> Any:
                if isinstance(parameter, Linear) and isinstance(parameter.weight, QuantizedWeight) \
                        and profile == "grouped" and parameter.weight.num_bits == 4:
                    scale = parameter.weight.scale.astype(np.float32)
                    spread = scale * generator.uniform(0.5, 1.0, scale.shape)
                    parameter = replace(parameter, weight=replace(parameter.weight, scale=spread.astype(bfloat16)))
                return super().prepare(parameter)

        backend = Grouped()
        check.models[profile] = backend, random_decoder(SHAPES[SHAPE], backend, 8)
    return check.models[profile]


def _decode_step(seqs: int, context: int, block: int) -> Any:
    """One more token for each of `seqs` sequences, whose blocks lie one after the other."""

    per = -(-context // block)
    ids = np.arange(seqs, dtype=np.int32)
    tables = np.arange(seqs * per, dtype=np.int32).reshape(seqs, per)
    last = np.full(seqs, context - 1, np.int32)
    return StepInput(ids, last, (tables[:, -1] * block + (context - 1) % block).astype(np.int32),
                     np.arange(seqs + 1, dtype=np.int32), last + 1, tables, ids, ids)


def _greedy(count: int) -> Any:
    batch = SampleBatch()
    for i in range(count):
        sequence = EngineSequence("r", 0, [1], SamplingParams(max_tokens=9, temperature=0), 0, 0.0)
        batch.draw(i, sequence, Sampling(sequence, ()))
    return batch.build()


def _executor(check: Check, profile: str) -> tuple[Any, Any]:
    config = SHAPES[SHAPE].config
    backend, decoder = _model(check, profile)
    blocks = max(BATCHES) * CONTEXT // 32
    limits = StepLimits(PREFILL, max(BATCHES), max(BATCHES), PREFILL, blocks, 32, "int8", config.num_layers,
                        config.num_kv_heads, config.head_dim)
    return backend, backend.compile(decoder, limits)


def decode(check: Check) -> Iterator[Row]:
    """Whole decode steps, greedy sampling included, each sequence with CONTEXT tokens in its int8 cache."""
    for _, kernel in launched_kernels():
        kernel.device_caches.clear()  # `compiled` shall see those of this shape
    _warm_linears(check, BATCHES)
    yield from _decode(check, "grouped", BATCHES)


def two_level(check: Check) -> Iterator[Row]:
    """The same and the prompt with scales that are integers times one of their row."""
    yield from _decode(check, "two-level", (1, 16, 128))
    yield from _prefill(check, "two-level")


def _decode(check: Check, profile: str, batches: Sequence[int]) -> Iterator[Row]:
    backend, executor = _executor(check, profile)
    for batch in batches:
        step, draws = _decode_step(batch, CONTEXT, 32), _greedy(batch)
        for _ in range(3):
            backend.sample(executor.step(step, reuse=True), draws).result()
        count, before = 10, executor.seconds["forward"]
        started = time.perf_counter()
        for _ in range(count):
            backend.sample(executor.step(step, reuse=True), draws).result()
        wall = (time.perf_counter() - started) / count
        device = (executor.seconds["forward"] - before) / count
        cached = batch * CONTEXT * backend.token_bytes(SHAPES[SHAPE].config, "int8")
        moved = executor.work(batch, batch).weight_bytes + cached
        yield {"profile": profile, "batch": batch, "ms": 1e3 * wall, "device ms": 1e3 * device,
               "floor ms": _floor(profile, step),
               **_roofline(check, moved, executor.work(batch, batch).multiply_adds, device)}


def _floor(profile: str, step: StepInput) -> float:
    """Milliseconds that an H200 takes at least, by roofline.py's model of each launch."""
    return 1e3 * sum(seconds(llama_launches(SHAPES[SHAPE].config, step, profile == "two-level"), Machine()).values())


def baseline(check: Check) -> Iterator[Row]:
    """bfloat16 torch: decode steps under a CUDA graph at the same batches, and a prompt of PREFILL tokens."""

    check.models.clear()
    torch.cuda.empty_cache()
    config = SHAPES[SHAPE].config
    hidden, dim, heads, kv_heads = config.hidden_size, config.head_dim, config.num_heads, config.num_kv_heads
    options: dict[str, Any] = {"device": check.backend.device, "dtype": torch.bfloat16}

    def weight(n: int, k: int) -> torch.Tensor:
        return torch.empty((n, k), **options).normal_(std=k**-0.5)

    layers = [(weight((heads + 2 * kv_heads) * dim, hidden), weight(hidden, heads * dim),
               weight(2 * config.intermediate_size, hidden), weight(hidden, config.intermediate_size))
              for _ in range(config.num_layers)]
    head, gain = weight(config.vocab_size, hidden), torch.ones(hidden, **options)

    def forward(x: torch.Tensor, cache: torch.Tensor | None) -> torch.Tensor:
        """x [B, T, H]; cache [layers, 2, B, kv heads, context, dim], or a prompt that attends to itself."""
        size, length = x.shape[:2]
        for index, (qkv, o, up, down) in enumerate(layers):
            rows = F.linear(F.rms_norm(x, (hidden,), gain), qkv).view(size, length, -1, dim).transpose(1, 2)
            q, k, v = torch.split(rows, [heads, kv_heads, kv_heads], 1)
            if cache is not None:
                cache[index, 0, :, :, -1:].copy_(k)
                cache[index, 1, :, :, -1:].copy_(v)
                k, v = cache[index, 0], cache[index, 1]
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=cache is None, enable_gqa=True)
            x = x + F.linear(attended.transpose(1, 2).reshape(size, length, -1), o)
            gate, value = F.linear(F.rms_norm(x, (hidden,), gain), up).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * value, down)
        return F.linear(F.rms_norm(x[:, -1], (hidden,), gain), head).argmax(-1)

    for batch in BATCHES:
        x = torch.randn((batch, 1, hidden), **options)
        cache = torch.randn((config.num_layers, 2, batch, kv_heads, CONTEXT, dim), **options)
        yield {"case": "decode", "batch": batch, "ms": 1e3 * graphed([partial(forward, x, cache)])}
        del cache
    x = torch.randn((1, PREFILL, hidden), **options)
    with torch.inference_mode():
        took = fastest(partial(forward, x, None), 3)
    yield {"case": f"prefill {PREFILL}", "batch": 1, "ms": 1e3 * took}


def prefill(check: Check) -> Iterator[Row]:
    """One prompt of PREFILL tokens in one step."""
    yield from _prefill(check, "grouped")


def _prefill(check: Check, profile: str) -> Iterator[Row]:
    _, executor = _executor(check, profile)
    rows = np.arange(PREFILL, dtype=np.int32)
    step = StepInput(rows % 1000, rows, rows, np.array([0, PREFILL], np.int32), np.array([PREFILL], np.int32),
                     np.arange(PREFILL // 32, dtype=np.int32)[None], rows[-1:], rows[:1])
    took = fastest(partial(executor.step, step), 3)
    yield {"profile": profile, "tokens": PREFILL, "ms": 1e3 * took, "floor ms": _floor(profile, step),
           "tokens/s": PREFILL / took, "TOPS": 2e-12 * executor.work(PREFILL, 1).multiply_adds / took}


def overhead(check: Check) -> Iterator[Row]:
    """Steps of the engine that serves, all sequences decoding: the share of their time that the device does not
    compute."""
    backend, decoder = _model(check, "grouped")
    context, steps, block = 256, 32, 32
    length, per_token = context + 2 * steps, backend.token_bytes(SHAPES[SHAPE].config, "int8")
    for batch in (1, 16, 64):
        config = EngineConfig(max_model_len=length, max_num_seqs=batch, max_num_batched_tokens=2048, block_size=block,
                              kv_cache_memory=batch * (length // block + 1) * block * per_token,
                              enable_prefix_caching=False)
        engine = Engine(decoder, backend, config, NoText())
        for index in range(batch):
            engine.add_request(str(index), [(7 * index + p) % 1000 for p in range(context)],
                               SamplingParams(temperature=0, max_tokens=length - context, ignore_eos=True))
        while engine.step()[1].prompt_tokens:
            pass
        for _ in range(4):
            engine.step()
        before, started = sum(engine.executor.seconds.values()), time.perf_counter()
        for _ in range(steps):
            engine.step()
        took = (time.perf_counter() - started) / steps
        busy = (sum(engine.executor.seconds.values()) - before) / steps
        work = engine.executor.work(batch, batch)
        yield {"batch": batch, "ms/step": 1e3 * took, "tokens/s": batch / took,
               "outside the device %": 100 * (1 - busy / took),
               **_roofline(check, work.weight_bytes + batch * context * per_token, work.multiply_adds, took)}
        del engine


def sweep(check: Check) -> Iterator[Row]:
    """The fastest tiles of each linear beside those of the table, prompts' first, which are least certain; what wins
    clearly belongs into choice.RULES."""

    device = check.backend.device
    for case in sorted(choice.linear_cases(rows=(1, 32, 128, 2048)), key=lambda case: (-case.m, case.name)):
        layer, x = random_case(case, device)
        choices = list(choice.sweep(kind(layer, x), case.m, case.n, case.k, capability(device)))
        check.warm([partial(run_choice, x, layer, None, each) for each in choices])
        copies = [random_case(case, device) for _ in range(1 if case.m > 256 else 6)]
        times = {}
        for each in choices:
            try:
                times[each] = graphed([partial(run_choice, x, layer, None, each) for layer, x in copies], 3)
            except Exception as error:
                print(f"{case.name} M={case.m} {each}: {error!r}", file=sys.stderr)
        best = min(times, key=lambda each: times[each])
        table = times.get(choices[0], float("nan"))
        yield {"layer": case.name, "M": case.m, "table": _text(choices[0]), "table us": 1e6 * table,
               "best": _text(best), "best us": 1e6 * times[best], "gain": table / times[best]}


def _text(choice: Any) -> str:
    tile = choice.tile
    return f"{choice.method} {tile.rows}×{tile.cols} w{tile.warps} s{tile.stages} u{tile.unroll}"
