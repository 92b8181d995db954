"""Whether the Triton backend computes what the reference does on this GPU, and how fast.

    python -m benchmarks.gpu_check [--out benchmarks/results] [--budget 450] [--only ops --only decode]

Parity first (every op, small models step by step, an artifact made from the demo model), then times of the Llama 3 8B
shape with random weights against bfloat16 torch under CUDA graphs. Each part has its share of the budget and stands for
itself; gpu-NAME.json and gpu-NAME.md are written after every row. Exit status 1 where parity fails. Needs torch, Triton
and what comes with transformers; no native extension. `--interpret`: the parity parts on tiny shapes, without a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, cast, get_args

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

Row = dict[str, Any]

SHAPE = "llama-3-8b"
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
CONTEXT = 1024  # tokens in the cache of each decoding sequence
PREFILL = 8192
LONG = 32768
# What the artifact must reach, on so many tokens. Two CPU backends, which differ in the order of float sums alone, have
# the same top token in 97 % of them, in all where it leads by 1 % of max |logit|, and a KL of 8e-4.
TOP1, KL, TOKENS = 0.995, 1e-3, 2000


@dataclass
class Check:
    """What the parts share. tiny: the interpreter runs them."""

    tiny: bool
    threads: int
    roofs: Any = None  # kernels.base.Roofs, or None without a GPU
    models: dict[str, Any] = field(default_factory=dict)  # large ones, by profile

    @property
    def backend(self) -> Any:
        from fptq_runtime.kernels.triton.backend import TritonBackend

        return TritonBackend()

    def warm(self, calls: Sequence[Callable[[], Any]]) -> None:
        """Compile what calls launch, several at a time, neighbours best unlike: two of a kind are compiled twice. What
        fails will fail again where it counts."""
        import torch

        if self.tiny:
            return

        def one(call: Callable[[], Any]) -> None:
            try:
                with torch.inference_mode():
                    call()
            except Exception:
                traceback.print_exc()

        with ThreadPoolExecutor(self.threads) as pool:
            list(pool.map(one, calls))
        torch.cuda.synchronize()


def ops(check: Check) -> Iterator[Row]:
    """Each op by itself: what a linear reads code by code, its product against double precision."""
    import numpy as np
    import torch

    from fptq_runtime.kernels.base import Activation, ActivationQuant, Curve, Embedding, Norm, StepInput
    from fptq_runtime.kernels.reference import ReferenceOps
    from fptq_runtime.kernels.triton import fused
    from fptq_runtime.kernels.triton.values import Quantized

    device = check.backend.device
    generator = torch.Generator().manual_seed(0)
    rows, width = (3, 96) if check.tiny else (70, 4096)
    ids = np.arange(rows, dtype=np.int32)
    none = np.zeros(0, np.int32)
    oracle = ReferenceOps(StepInput(ids, ids, none, none, none, none[None], none), None)
    acts = {"float": None, "static int8": ActivationQuant(0.03), "dynamic int8": ActivationQuant(),
            "static fp8": ActivationQuant(0.03, "float"), "dynamic fp8": ActivationQuant(None, "float")}

    def row(op: str, act: str, got: torch.Tensor | Quantized, expected: torch.Tensor) -> Row:
        """Float: 1e-5 of the largest. Quantized: of a thousand codes one may be its neighbour."""
        values = got.codes.float() * got.scale.view(-1, 1) if isinstance(got, Quantized) else got
        error = (values.cpu() - expected).abs()
        off = float((error > 1e-5 * expected.abs().max()).float().mean())
        ok = off <= (1e-3 if isinstance(got, Quantized) else 0) or off * error.numel() <= 1
        return {"op": op, "case": act, "off": off, "max error": float(error.max() / expected.abs().max()), "ok": ok}

    x = 3 * torch.randn((rows, 2 * width), generator=generator)
    table = torch.randn((rows, width), generator=generator).bfloat16()
    yield row("embed", "bfloat16", fused.embed(torch.from_numpy(ids).to(device), table.to(device)),
              oracle.embed(Embedding(table)))
    weight, bias = 1 + 0.1 * torch.randn((2, width), generator=generator)
    for name, act in acts.items():
        for kind in ("rms", "layer"):
            norm = Norm(cast(Any, kind), weight, bias if kind == "layer" else None, 1e-5)
            got = fused.norm(x[:, :width].contiguous().to(device), weight.to(device),
                             None if norm.bias is None else bias.to(device), 1e-5, norm.kind, act)
            yield row(f"{kind} norm", name, got, oracle.norm(x[:, :width], norm, act))
        for curve in get_args(Curve):
            activation = Activation(curve, gated=curve in ("silu", "clamped_swiglu"))
            got = fused.activation(x.to(device), activation, act)
            yield row(curve, name, got, oracle.activation(x, activation, act))
    yield row("softcap", "float", fused.softcap(x.to(device), 3.0), oracle.softcap(x, 3.0))
    yield from _linears(check, generator)
    yield from _samples(check)


def _linears(check: Check, generator: Any) -> Iterator[Row]:
    import torch

    from fptq_runtime.artifact.numerics import dequantize, pack_codes, quantize_weight
    from fptq_runtime.kernels.base import ActivationQuant, Linear, QuantizedWeight
    from fptq_runtime.kernels.reference import to_numpy
    from fptq_runtime.kernels.triton import fused
    from fptq_runtime.kernels.triton.linear import DeviceLinear, pack_linear, run_linear
    from fptq_runtime.kernels.triton.values import Quantized

    device = check.backend.device
    n, k, sizes = (72, 128, (1, 5)) if check.tiny else (1000, 4096, (1, 5, 16, 33, 64, 130, 300, 2050))
    weight = torch.randn((n, k), generator=generator) * k**-0.5
    bias, residual = torch.randn(n, generator=generator), torch.randn((max(sizes), n), generator=generator)
    x = torch.randn((max(sizes), k), generator=generator)
    dynamic, static, fp8 = ActivationQuant(), ActivationQuant(0.03), ActivationQuant(None, "float")
    cases: list[tuple[str, Any, Any]] = [
        (f"{type_}{bits} {'channel' if group is None else f'group {group}'}{', static' if act is static else ''}"
         f"{', float input' if act is None else ''}", (bits, group, type_), act)
        for bits, group, type_, act in (
            (4, 128, "int", dynamic), (4, 64, "int", dynamic), (4, 32, "int", static), (4, None, "int", dynamic),
            (8, None, "int", dynamic), (8, 128, "int", static), (4, 128, "int", None), (8, None, "int", None),
            (4, 128, "float", fp8), (8, None, "float", fp8))]
    cases += [(str(dtype).removeprefix("torch."), dtype, None) for dtype in (torch.bfloat16, torch.float16,
                                                                              torch.float32)]
    layers = []
    for name, how, act in cases:
        if isinstance(how, torch.dtype):
            exact = weight.to(how)
            linear = Linear("l", to_numpy(exact), to_numpy(bias), act)
        else:
            bits, group, type_ = how
            codes, scale = quantize_weight(weight, bits, group, type=type_)
            exact = dequantize(codes, scale)
            packed = QuantizedWeight(to_numpy(pack_codes(codes, bits)), to_numpy(scale), bits, group or k, type_)
            linear = Linear("l", packed, to_numpy(bias), act)
        layers.append((name, how, exact, pack_linear(linear, device)))

    def product(m: int, layer: DeviceLinear) -> tuple[torch.Tensor | Quantized, torch.Tensor]:
        given = fused.quantize(x[:m].to(device), layer.act)
        return given, run_linear(given, layer, residual[:m].to(device), invariant=True)

    check.warm([partial(product, m, layer) for m in sizes for *_, layer in layers])
    for name, how, exact, layer in layers:
        single = None
        for m in sizes:
            given, got = product(m, layer)
            if isinstance(given, Quantized):
                read = given.codes.cpu().double() * given.scale.cpu().double().view(-1, 1)
            else:
                half = torch.float16 if how == torch.float16 else torch.bfloat16
                read = x[:m].double() if how == torch.float32 else x[:m].to(half).double()
            expected = read @ exact.double().t() + bias.double() + residual[:m].double()
            error = float((got.cpu().double() - expected).abs().max() / expected.abs().max())
            single = got[:1].clone() if single is None else single
            same = bool(torch.equal(got[:1], single))
            # Hopper adds up what it multiplies in FP8 with about 14 bits.
            tolerance = 2e-3 if layer.act is None or layer.act.type == "float" else 1e-5
            yield {"op": "linear", "case": f"{name}, M={m}", "max error": error, "invariant": same,
                   "ok": error < tolerance and same}


def _samples(check: Check) -> Iterator[Row]:
    import numpy as np
    import torch

    from fptq_runtime.engine.request import SamplingParams
    from fptq_runtime.engine.sampler import SampleBatch, Sampling
    from fptq_runtime.engine.sequence import Sequence as EngineSequence
    from fptq_runtime.kernels.sampling import sample_reference

    vocab, count = (3000, 2) if check.tiny else (128256, 64)
    rng = np.random.default_rng(0)
    cases: dict[str, Row] = {
        "greedy": {"temperature": 0}, "temperature": {}, "top_p": {"top_p": 0.9}, "top_k": {"top_k": 40},
        "wide top_p": {"top_p": 0.95, "temperature": 2.0}, "min_p": {"min_p": 0.05, "top_k": 50, "top_p": 0.9},
        "penalties": {"frequency_penalty": 0.4, "repetition_penalty": 1.2, "logit_bias": {5: 4.0}},
    }
    for name, params in cases.items():
        logits = (3 * rng.standard_normal((count, vocab))).astype(np.float32)
        batch = SampleBatch()
        for i in range(count):
            asked = SamplingParams(**{"max_tokens": 9, "logprobs": 3, **params})
            request = EngineSequence("r", 0, [1, 2, 3], asked, i, 0.0)
            request.token_ids.extend([5, 7, 5])
            batch.draw(i, request, Sampling(request, ()))
        made = batch.build()
        backend = check.backend
        on_device = torch.from_numpy(logits).to(backend.device)
        got, expected = backend.sample(on_device, made), sample_reference(logits, made)
        alone = [backend.sample(on_device[i : i + 1], replace(made, **{
            key: getattr(made, key)[i : i + 1] for key in ("parameters", "token_ids", "positions", "num_logprobs")},
            rows=made.rows[:1], bias_start=made.bias_start[:2], bias_ids=made.bias_ids[: made.bias_start[1]],
            bias_values=made.bias_values[: made.bias_start[1]], history_start=made.history_start[:2],
            output_start=made.output_start[:1], history=made.history[: made.history_start[1]],
        )) for i in range(2)]
        same = all(one.token_ids[0] == got.token_ids[i] and one.logprobs[0] == got.logprobs[i]
                   for i, one in enumerate(alone))
        agree = float((got.token_ids == expected.token_ids).mean())
        tops = bool((got.top_ids == expected.top_ids).all())
        error = float(np.abs(got.logprobs - expected.logprobs).max()) if agree == 1 else None
        yield {"op": "sample", "case": name, "agree": agree, "max error": error, "invariant": same,
               "ok": agree >= 1 - 1 / 64 and tops and same}


def models(check: Check) -> Iterator[Row]:
    """Small random models of every kind: steps of prefill, decode and both, against the reference; then one sequence
    in chunks and in company against the same alone, bit for bit. Steps that decode replay graphs. Codes that another
    order of sums tips give two CPU backends a median of 0.009, too."""
    import numpy as np
    import torch

    from fptq_runtime.kernels.base import Activation, logits_array
    from fptq_runtime.kernels.reference import ReferenceBackend
    from tests.kernels.small import Batcher, Options, limits, make_decoder, random_tokens

    base = Options(act="dynamic", max_len=128 if check.tiny else 1024, layers=1 if check.tiny else 2)
    kinds = {
        "llama": base, "llama float": replace(base, act="float", dtype=torch.bfloat16),
        "qwen3, window": replace(base, qk_norm=True, window=40, head_dim=32, act="static"),
        "bloom": replace(base, norm="layer", activation=Activation("gelu_tanh"), rope=False, alibi=True, bias=True,
                         embedding_norm=True, kv_heads=4, bits=8, group_size=None),
        "low rank": replace(base, rank=3), "grouped heads": replace(base, heads=12, kv_heads=2, head_dim=64),
    }
    lengths = (20, 12, 16) if check.tiny else (150, 60, 600)
    combinations = [("llama", "int8"), ("bloom", "bf16"), ("qwen3, window", "int8"), ("llama float", "bf16"),
                    ("low rank", "int8"), ("grouped heads", "int8"), ("llama", "float32"), ("bloom", "int8")]
    if check.tiny:
        combinations = combinations[:1]
    for name, kv in combinations:
        options, backend = kinds[name], check.backend
        made = limits(options, cast(Any, kv), num_blocks=40)
        decoder = make_decoder(options, backend)
        reference = ReferenceBackend()
        executors = [backend.compile(decoder, made), reference.compile(make_decoder(options, reference), made)]
        batcher = Batcher(made, np.random.default_rng(1))
        a, b, c = (batcher.sequence(random_tokens(batcher.rng, length)) for length in lengths)
        first = (lengths[0] - 8, lengths[1] - 8, lengths[2] - 8)
        plan = [[(a, first[0])], [(a, 1)], [(b, first[1]), (a, 1)], [(c, first[2] - 2), (b, 1)],
                [(c, 2), (b, 1), (a, 1)], *([[(b, 1), (c, 1), (a, 1)]] * 2)]
        errors = []
        for parts in plan:
            step = batcher.step(parts)
            got, expected = (logits_array(executor.step(step)) for executor in executors)
            errors += (np.abs(got - expected).max(1) / np.abs(expected).max()).tolist()
        token_ids = random_tokens(np.random.default_rng(2), lengths[2])
        whole = _alone(backend, decoder, made, token_ids, [len(token_ids)], 0)
        chunks = [len(token_ids) // 3, 1, 1, len(token_ids) // 4, 5]
        same = bool(np.array_equal(whole, _alone(backend, decoder, made, token_ids,
                                                 [*chunks, len(token_ids) - sum(chunks)], 2)))
        error, median = max(errors), float(np.median(errors))
        yield {"model": name, "kv": kv, "max error": error, "median error": median, "invariant": same,
               "ok": bool(error < (1e-1 if kv == "int8" else 4e-2) and median < 2e-2 and same)}


def _alone(backend: Any, decoder: Any, made: Any, token_ids: list[int], chunks: Sequence[int], neighbours: int) -> Any:
    """Logits of every position, fed in chunks beside some neighbours."""
    import numpy as np

    from fptq_runtime.kernels.base import logits_array
    from tests.kernels.small import Batcher, random_tokens

    executor = backend.compile(decoder, made)
    batcher = Batcher(made, np.random.default_rng(len(chunks)))
    subject = batcher.sequence(token_ids)
    others = [batcher.sequence(random_tokens(batcher.rng, 12)) for _ in range(neighbours)]
    rows = []
    for chunk in chunks:
        step = batcher.step([*((other, 1) for other in others), (subject, chunk)])
        rows.append(logits_array(executor.step(step))[neighbours:])
    return np.concatenate(rows)


def artifact(check: Check) -> Iterator[Row]:
    """The demo model as `rtn-dynamic` rounds it: its logits on TOKENS tokens against the CPU's, and these as golden
    logits; then 24 requests through the engine, chunked, cached and preempted, each against itself alone."""
    from importlib import resources

    import numpy as np
    import torch

    from fptq_runtime.kernels.base import StepLimits
    from fptq_runtime.kernels.reference import ReferenceBackend
    from fptq_runtime.kernels.select import select_backend
    from fptq_runtime.locate import DEMO_MODEL
    from fptq_runtime.models.golden import MARGIN, check_golden, compute_golden
    from fptq_runtime.models.tokenizer import Tokenizer

    try:
        cpu = select_backend("native")
    except ValueError:
        cpu = ReferenceBackend()
    backend = check.backend
    decoders = [_rounded(DEMO_MODEL, each) for each in (backend, cpu)]
    config, tokenizer = decoders[0].config, Tokenizer(DEMO_MODEL)
    text = resources.files("fptq_runtime.quantizer").joinpath("data", "heldout.txt").read_text("utf-8")
    window, wanted = (24, 24) if check.tiny else (1024, TOKENS)
    token_ids = tokenizer.encode(text)[:wanted]
    golden = compute_golden(decoders[1], cpu, token_ids[: 8 if check.tiny else 32])
    yield {"check": "golden logits", "value": check_golden(decoders[0], backend, golden), "ok": True}
    made = StepLimits(max_tokens=window, max_seqs=1, max_logits_rows=window, max_model_len=window,
                      num_blocks=-(-window // 16), block_size=16, kv_dtype="int8", num_layers=config.num_layers,
                      num_kv_heads=config.num_kv_heads, head_dim=config.head_dim)
    clear, agree, divergence = 0, 0, 0.0
    for start in range(0, wanted, window):
        part = token_ids[start : start + window]
        got, expected = (torch.from_numpy(_alone(each, decoder, made, part, [len(part)], 0)).double()
                         for each, decoder in zip((backend, cpu), decoders, strict=True))
        best = expected.topk(2).values
        leads = best[:, 0] - best[:, 1] > MARGIN * expected.abs().amax(-1)
        clear += int(leads.sum())
        agree += int((got.argmax(-1) == expected.argmax(-1))[leads].sum())
        got, expected = got.log_softmax(-1), expected.log_softmax(-1)
        divergence += float((expected.exp() * (expected - got)).sum())
    tokens = f"{wanted} tokens, {cpu.name} backend"
    yield {"check": f"top-1 agreement where it leads, {clear} of {tokens}", "value": agree / max(clear, 1),
           "ok": agree >= TOP1 * clear}
    yield {"check": f"KL, {tokens}", "value": divergence / wanted, "ok": divergence / wanted <= KL}
    if check.tiny:
        return
    same, preemptions = _company(backend, decoders[0], tokenizer, np.random.default_rng(0))
    yield {"check": f"24 requests as alone, {preemptions} preemptions", "value": same, "ok": same == 1}


def _rounded(path: Path, backend: Any) -> Any:
    """A float model's decoder with int4 weights in groups of 128, an int8 head, and inputs quantized per token; made
    here rather than by the quantizer, which needs more packages."""
    import torch

    from fptq_runtime.artifact.numerics import pack_codes, quantize_weight
    from fptq_runtime.kernels.base import ActivationQuant, Linear, QuantizedWeight
    from fptq_runtime.kernels.reference import to_numpy, to_torch
    from fptq_runtime.models.block import prepare_block, prepare_stem
    from fptq_runtime.models.decoder import Decoder
    from fptq_runtime.models.loader import Checkpoint, load_block, load_head, load_stem

    def rounded(linear: Linear, bits: Any, group: int | None) -> Linear:
        weight = to_torch(linear.weight)
        codes, scale = quantize_weight(weight, bits, group, None, torch.bfloat16)
        packed = QuantizedWeight(to_numpy(pack_codes(codes, bits)), to_numpy(scale), bits, group or weight.shape[1])
        return replace(linear, weight=packed, act=ActivationQuant())

    checkpoint = Checkpoint(path)
    blocks = [load_block(checkpoint, index).with_linears(lambda _, linear: rounded(linear, 4, 128))
              for index in range(len(checkpoint.model.blocks))]
    head = load_head(checkpoint).with_linears(lambda _, linear: rounded(linear, 8, None))
    return Decoder(checkpoint.model_config, prepare_stem(load_stem(checkpoint), backend),
                   [prepare_block(block, backend) for block in blocks], prepare_block(head, backend))


def _company(backend: Any, decoder: Any, tokenizer: Any, rng: Any) -> tuple[float, int]:
    """The share of requests that give the same alone."""
    from fptq_runtime.config import EngineConfig
    from fptq_runtime.engine.engine import Engine
    from fptq_runtime.engine.request import SamplingParams

    def engine(tokens: int, **options: Any) -> Engine[Any]:
        memory = tokens * backend.token_bytes(decoder.config, "int8")
        return Engine(decoder, backend, EngineConfig(max_model_len=192, block_size=16, kv_cache_memory=memory,
                                                     **options), tokenizer)

    shared = rng.integers(2, 4096, 90).tolist()
    sent = [(shared[: int(rng.integers(1, 90))] + rng.integers(2, 4096, int(rng.integers(1, 40))).tolist(),
             SamplingParams(max_tokens=int(rng.integers(1, 60)), temperature=float(i % 2), seed=i, ignore_eos=True,
                            logprobs=i % 3, top_p=0.9 if i % 4 == 1 else 1.0)) for i in range(24)]

    def outputs(engine: Engine[Any], requests: Sequence[int]) -> tuple[dict[int, list[Any]], int]:
        found: dict[int, list[Any]] = {i: [] for i in requests}
        preemptions = 0
        for i in requests:
            engine.add_request(str(i), *sent[i])
        while engine.has_unfinished_requests:
            made, stats = engine.step()
            preemptions += stats.preemptions
            for output in made:
                found[int(output.request_id)].append((output.token_ids, output.text, output.logprobs))
        return found, preemptions

    together, preemptions = outputs(engine(400, max_num_batched_tokens=61, max_num_seqs=9), range(24))
    alone = engine(4096, max_num_batched_tokens=192, enable_prefix_caching=False)
    return sum(together[i] == outputs(alone, [i])[0][i] for i in range(24)) / 24, preemptions


def kernels(check: Check) -> Iterator[Row]:
    """Each linear of the shape by itself, its weights from memory, as a share of the roof that binds it."""
    import torch

    from fptq_runtime.kernels.triton.choice import linear_cases
    from fptq_runtime.kernels.triton.linear import random_case, run_linear

    device, rows = check.backend.device, (1, 16, 64, 128, 2048)
    _warm_linears(check, rows)
    for case in sorted(linear_cases(rows=rows), key=lambda case: case.m):
        copies = max(2, -(-(192 << 20) // case.weight_bytes)) if case.m <= 256 else 1
        made = [random_case(case, device) for _ in range(min(copies, 12))]
        took = _graphed([partial(run_linear, x, layer, None, True) for layer, x in made])
        floats = torch.randn((case.m, case.k), device=device, dtype=torch.bfloat16)
        weights = [torch.randn((case.n, case.k), device=device, dtype=torch.bfloat16) for _ in range(len(made[:4]))]
        bf16 = _graphed([partial(torch.nn.functional.linear, floats, weight) for weight in weights])
        yield {"layer": case.name, "M": case.m, "us": 1e6 * took, "bf16 us": 1e6 * bf16, "speedup": bf16 / took,
               **_roofline(check, case.bytes, case.multiply_adds, took)}
        del made, weights


def _warm_linears(check: Check, rows: Sequence[int]) -> None:
    from fptq_runtime.kernels.triton.choice import linear_cases
    from fptq_runtime.kernels.triton.linear import random_case, run_linear

    def once(case: Any) -> None:
        layer, x = random_case(case, check.backend.device)
        run_linear(x, layer, None, invariant=True)

    check.warm([partial(once, case) for case in sorted(linear_cases(rows=rows), key=lambda case: case.m)])


def _roofline(check: Check, moved: int, multiply_adds: int, took: float) -> Row:
    memory, compute = 1e-9 * moved / check.roofs.read_gb_per_s, 2e-9 * multiply_adds / check.roofs.gops
    return {"GB/s": 1e-9 * moved / took, "TOPS": 2e-12 * multiply_adds / took,
            "of the roof": max(memory, compute) / took, "bound": "memory" if memory > compute else "compute"}


def others(check: Check) -> Iterator[Row]:
    """What lies between the linears, at decode and prefill."""
    import torch

    from fptq_runtime.kernels.base import Activation, ActivationQuant
    from fptq_runtime.kernels.triton import fused
    from fptq_runtime.measure.shapes import SHAPES

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
            took = _graphed([call] * 8)
            yield {"op": name, "M": m, "us": 1e6 * took, "GB/s": 1e-9 * moved / took}


def attend(check: Check) -> Iterator[Row]:
    """Paged attention of one layer over an int8 cache, a different one each time."""
    import torch

    from fptq_runtime.kernels.base import ActivationQuant, AttentionSpec, StepLimits
    from fptq_runtime.kernels.triton.attention import (
        DeviceCache,
        attention,
        attention_bytes,
        prepare_attention,
        rope_and_cache,
    )
    from fptq_runtime.kernels.triton.values import DeviceBatch
    from fptq_runtime.measure.shapes import SHAPES

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
        took = _graphed([partial(attention, q, spec, cache, batch, act)
                         for q, spec in zip(queries, specs, strict=True)])
        moved = attention_bytes(specs[0], "int8", [query] * seqs, [context] * seqs)
        pairs = seqs * sum(range(context - query + 1, context + 1))
        yield {"sequences": seqs, "context": context, "queries": query, "us": 1e6 * took,
               **_roofline(check, moved, 2 * pairs * heads * dim, took)}
        del cache


def _model(check: Check, profile: str) -> Any:
    """Random weights on the GPU. grouped: a scale a group of 128; two-level: integer multiples of one a row."""
    import numpy as np
    from ml_dtypes import bfloat16

    from fptq_runtime.kernels.base import Linear, QuantizedWeight
    from fptq_runtime.kernels.triton.backend import TritonBackend
    from fptq_runtime.measure.shapes import SHAPES, random_decoder

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
    import numpy as np

    from fptq_runtime.kernels.base import StepInput

    per = -(-context // block)
    ids = np.arange(seqs, dtype=np.int32)
    tables = np.arange(seqs * per, dtype=np.int32).reshape(seqs, per)
    last = np.full(seqs, context - 1, np.int32)
    return StepInput(ids, last, (tables[:, -1] * block + (context - 1) % block).astype(np.int32),
                     np.arange(seqs + 1, dtype=np.int32), last + 1, tables, ids)


def _greedy(count: int) -> Any:
    from fptq_runtime.engine.request import SamplingParams
    from fptq_runtime.engine.sampler import SampleBatch, Sampling
    from fptq_runtime.engine.sequence import Sequence as EngineSequence

    batch = SampleBatch()
    for i in range(count):
        sequence = EngineSequence("r", 0, [1], SamplingParams(max_tokens=9, temperature=0), 0, 0.0)
        batch.draw(i, sequence, Sampling(sequence, ()))
    return batch.build()


def _executor(check: Check, profile: str) -> tuple[Any, Any]:
    from fptq_runtime.kernels.base import StepLimits
    from fptq_runtime.measure.shapes import SHAPES

    config = SHAPES[SHAPE].config
    backend, decoder = _model(check, profile)
    blocks = max(BATCHES) * CONTEXT // 32
    limits = StepLimits(PREFILL, max(BATCHES), max(BATCHES), PREFILL, blocks, 32, "int8", config.num_layers,
                        config.num_kv_heads, config.head_dim)
    return backend, backend.compile(decoder, limits)


def decode(check: Check) -> Iterator[Row]:
    """Whole decode steps, greedy sampling included, each sequence with CONTEXT tokens in its int8 cache."""
    for _, kernel in _kernels():
        kernel.device_caches.clear()  # `compiled` shall see those of this shape
    _warm_linears(check, BATCHES)
    yield from _decode(check, "grouped", BATCHES)


def two_level(check: Check) -> Iterator[Row]:
    """The same and the prompt with scales that are integers times one of their row."""
    yield from _decode(check, "two-level", (1, 16, 128))
    yield from _prefill(check, "two-level")


def _decode(check: Check, profile: str, batches: Sequence[int]) -> Iterator[Row]:
    from fptq_runtime.measure.shapes import SHAPES

    backend, executor = _executor(check, profile)
    for batch in batches:
        step, draws = _decode_step(batch, CONTEXT, 32), _greedy(batch)
        for _ in range(3):
            backend.sample(executor.step(step, reuse=True), draws)
        count, before = 10, executor.seconds["forward"]
        started = time.perf_counter()
        for _ in range(count):
            backend.sample(executor.step(step, reuse=True), draws)
        wall = (time.perf_counter() - started) / count
        device = (executor.seconds["forward"] - before) / count
        cached = batch * CONTEXT * backend.token_bytes(SHAPES[SHAPE].config, "int8")
        moved = executor.work(batch, batch).weight_bytes + cached
        yield {"profile": profile, "batch": batch, "ms": 1e3 * wall, "device ms": 1e3 * device,
               **_roofline(check, moved, executor.work(batch, batch).multiply_adds, device)}


def baseline(check: Check) -> Iterator[Row]:
    """bfloat16 torch: decode steps under a CUDA graph at the same batches, and a prompt of PREFILL tokens."""
    import torch
    import torch.nn.functional as F

    from fptq_runtime.kernels.triton.device import fastest
    from fptq_runtime.measure.shapes import SHAPES

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
        yield {"case": "decode", "batch": batch, "ms": 1e3 * _graphed([partial(forward, x, cache)])}
        del cache
    x = torch.randn((1, PREFILL, hidden), **options)
    with torch.inference_mode():
        took = fastest(partial(forward, x, None), 3)
    yield {"case": f"prefill {PREFILL}", "batch": 1, "ms": 1e3 * took}


def prefill(check: Check) -> Iterator[Row]:
    """One prompt of PREFILL tokens in one step."""
    yield from _prefill(check, "grouped")


def _prefill(check: Check, profile: str) -> Iterator[Row]:
    import numpy as np

    from fptq_runtime.kernels.base import StepInput
    from fptq_runtime.kernels.triton.device import fastest

    _, executor = _executor(check, profile)
    rows = np.arange(PREFILL, dtype=np.int32)
    step = StepInput(rows % 1000, rows, rows, np.array([0, PREFILL], np.int32), np.array([PREFILL], np.int32),
                     np.arange(PREFILL // 32, dtype=np.int32)[None], rows[-1:])
    took = fastest(partial(executor.step, step), 3)
    yield {"profile": profile, "tokens": PREFILL, "ms": 1e3 * took, "tokens/s": PREFILL / took,
           "TOPS": 2e-12 * executor.work(PREFILL, 1).multiply_adds / took}


def overhead(check: Check) -> Iterator[Row]:
    """Steps of the engine that serves: the share of their time that the device does not compute."""
    from fptq_runtime.engine.engine import Engine
    from fptq_runtime.measure import bench
    from fptq_runtime.measure.shapes import SHAPES

    backend, decoder = _model(check, "grouped")
    for batch in (1, 16, 64):
        row = bench.Row(batch, 256)
        config = bench.bench_config(SHAPES[SHAPE].config, [row], 32, backend, max_num_batched_tokens=2048)
        engine = Engine(decoder, backend, config, bench.NoText())
        bench.measure(engine, row, ("decode",), steps=4, seconds=0)
        [steps] = bench.measure(engine, row, ("decode",), steps=32, seconds=0)
        measured = steps.against(check.roofs)
        yield {"batch": batch, "ms/step": measured.step_ms, "tokens/s": measured.tokens_per_s,
               "outside the device %": measured.percent_outside_kernels, "of the roof %": measured.percent_of_roof}
        del engine


def compiled(check: Check) -> Iterator[Row]:
    """The kernels that the large parts before have launched: tensor-core instructions, registers, spills. A linear with
    int8 inputs must be on the tensor cores, on Hopper through wgmma, and spill nothing."""
    from fptq_runtime.kernels.triton.device import capability

    hopper = capability(check.backend.device) >= 90
    for name, kernel in _kernels():
        for cache in kernel.device_caches.values():
            for binary in cache[0].values():
                ptx = binary.asm["ptx"]
                wgmma, mma, spills = ptx.count("wgmma.mma_async"), ptx.count("mma.sync"), binary.n_spills
                right = spills == 0 and (wgmma > 0 if hopper else mma > 0)
                yield {"kernel": name, "warps": binary.metadata.num_warps, "registers": binary.n_regs,
                       "shared": binary.metadata.shared, "spills": spills, "wgmma": wgmma, "mma": mma,
                       "ok": right or name != "_linear_kernel"}


def _kernels() -> list[tuple[str, Any]]:
    """All that were written for the backend, by name."""
    from fptq_runtime.kernels.triton import attention, fused, linear, sampling

    return [(name, kernel) for module in (linear, attention, fused, sampling)
            for name, kernel in sorted(vars(module).items())
            if getattr(kernel, "__module__", None) == module.__name__ and hasattr(kernel, "device_caches")]


def sweep(check: Check) -> Iterator[Row]:
    """The fastest tiles of each linear beside those of the table; what wins clearly belongs into choice.RULES."""
    from fptq_runtime.kernels.triton import choice
    from fptq_runtime.kernels.triton.device import capability
    from fptq_runtime.kernels.triton.linear import kind, random_case, run_choice

    device = check.backend.device
    for case in sorted(choice.linear_cases(rows=(1, 32, 128, 2048)), key=lambda case: (case.m, case.name)):
        layer, x = random_case(case, device)
        choices = list(choice.sweep(kind(layer, x), case.m, case.n, case.k, capability(device)))
        check.warm([partial(run_choice, x, layer, None, each) for each in choices])
        copies = [random_case(case, device) for _ in range(1 if case.m > 256 else 6)]
        times = {}
        for each in choices:
            try:
                times[each] = _graphed([partial(run_choice, x, layer, None, each) for layer, x in copies], 3)
            except Exception as error:
                print(f"{case.name} M={case.m} {each}: {error!r}", file=sys.stderr)
        best = min(times, key=lambda each: times[each])
        table = times.get(choices[0], float("nan"))
        yield {"layer": case.name, "M": case.m, "table": _text(choices[0]), "table us": 1e6 * table,
               "best": _text(best), "best us": 1e6 * times[best], "gain": table / times[best]}


def _text(choice: Any) -> str:
    tile = choice.tile
    return f"{choice.method} {tile.rows}×{tile.cols} w{tile.warps} s{tile.stages} u{tile.unroll}"


def _graphed(calls: Sequence[Callable[[], Any]], repeats: int = 5) -> float:
    """Seconds of one call, from the fastest of several replays of a graph of all."""
    import torch

    from fptq_runtime.kernels.triton.device import fastest

    with torch.inference_mode():
        for call in calls:
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            for call in calls:
                call()
        took = fastest(graph.replay, repeats) / len(calls)
    del graph
    return took


@dataclass(frozen=True)
class Part:
    """seconds: what it takes at most, if the budget is `BUDGET`. parity: a row that is not ok, or an error, fails, and
    nothing is left out; other parts are cut short there."""

    run: Callable[[Check], Iterator[Row]]
    seconds: float
    parity: bool = False

    @property
    def name(self) -> str:
        return self.run.__name__


BUDGET = 450.0
PARTS = (
    Part(ops, 75, parity=True), Part(models, 70, parity=True), Part(artifact, 50, parity=True), Part(decode, 75),
    Part(prefill, 15), Part(overhead, 20), Part(two_level, 35), Part(baseline, 25), Part(kernels, 40), Part(attend, 20),
    Part(others, 10), Part(compiled, 5, parity=True), Part(sweep, 55),
)


class Report:
    """gpu-NAME.json and gpu-NAME.md, whole after every row."""

    def __init__(self, out: Path, facts: Row) -> None:
        self.facts = facts
        self.parts: dict[str, Row] = {}
        self._stem = out / f"gpu-{facts['name']}"
        out.mkdir(parents=True, exist_ok=True)

    def write(self) -> None:
        for suffix, text in ((".json", json.dumps({**self.facts, "parts": self.parts}, indent=1) + "\n"),
                             (".md", self.markdown())):
            temporary = self._stem.with_name(f"{self._stem.name}{suffix}.tmp")
            temporary.write_text(text)
            temporary.replace(self._stem.with_name(f"{self._stem.name}{suffix}"))

    def markdown(self) -> str:
        lines = [f"# {self.facts['device']}", "", ", ".join(f"{key} {value}" for key, value in self.facts.items()
                                                          if key not in ("device", "name")), ""]
        for name, part in self.parts.items():
            rows = part["rows"]
            state = "" if part["ok"] is None else " passed" if part["ok"] else " FAILED"
            lines += [f"## {name}:{state or ' timed'} in {part['seconds']:.0f} s", ""]
            if part.get("about"):
                lines += [part["about"], ""]
            columns = list(dict.fromkeys(key for row in rows for key in row))
            if rows:
                lines += [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
                lines += [f"| {' | '.join(_cell(row.get(column)) for column in columns)} |" for row in rows]
                lines.append("")
            for key in ("cut short", "error"):
                if part.get(key):
                    lines += [f"{key}: {part[key]}", ""]
        speedups = self._speedups()
        return "\n".join([*lines, *speedups])

    def _speedups(self) -> list[str]:
        """Ours against bfloat16, once both were measured."""
        rows = {name: part["rows"] for name, part in self.parts.items()}
        bf16 = {(row["case"], row["batch"]): row["ms"] for row in rows.get("baseline", ())}
        ours = [row for part in ("decode", "prefill", "two_level") for row in rows.get(part, ())]
        lines = [f"- decode, {row['profile']}, batch {row['batch']}: {bf16['decode', row['batch']] / row['ms']:.2f} × "
                 f"bfloat16 ({bf16['decode', row['batch']] / row['device ms']:.2f} × without the host)"
                 for row in ours if ("decode", row.get("batch")) in bf16]
        lines += [f"- prefill, {row['profile']}: {bf16[key] / row['ms']:.2f} × bfloat16"
                  for row in ours if (key := (f"prefill {row.get('tokens')}", 1)) in bf16]
        return ["## Against bfloat16", "", *lines, ""] if lines else []


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return "" if value is None else str(value)


def run(check: Check, report: Report, parts: Sequence[Part], scale: float) -> bool:
    """Whether all parity holds. What a part does not use of its time, the later ones have."""
    spare = 0.0
    for part in parts:
        started = time.monotonic()
        limit = scale * part.seconds + spare
        entry: Row = {"about": " ".join((part.run.__doc__ or "").split()), "rows": [], "ok": part.parity or None,
                      "seconds": 0.0}
        report.parts[part.name] = entry
        print(f"== {part.name}, at most {limit:.0f} s", flush=True)
        try:
            for row in part.run(check):
                entry["rows"].append(row)
                entry["seconds"] = time.monotonic() - started
                print("  " + ", ".join(f"{key} {_cell(value)}" for key, value in row.items()), flush=True)
                if part.parity and not row.get("ok", True):
                    entry["ok"] = False
                report.write()
                if entry["seconds"] > limit and not part.parity:
                    entry["cut short"] = f"after {limit:.0f} s"
                    break
        except Exception as error:
            traceback.print_exc()
            entry["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            entry["ok"] = False
        entry["seconds"] = time.monotonic() - started
        spare = limit - entry["seconds"]
        report.write()
    return all(report.parts[part.name]["ok"] for part in parts if part.parity)


def facts(check: Check) -> Row:
    import torch
    import triton

    from fptq_runtime import __version__

    made: Row = {"fptq": __version__, "torch": str(torch.__version__), "triton": triton.__version__,
                 "date": str(date.today())}
    if check.tiny:
        return {"name": "interpreter", "device": "Triton's interpreter: nothing was timed", **made}
    device = torch.cuda.get_device_name()
    driver = subprocess.run(["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm", "--format=csv,noheader"],
                            capture_output=True, text=True, check=False).stdout.strip()
    return {"name": re.sub(r"[^a-z0-9]+", "-", device.lower().removeprefix("nvidia ")).strip("-"), "device": device,
            **made, "driver and clock": driver, "int8 TOPS by cuBLAS": round(check.roofs.gops / 1000),
            "GB/s by a copy": round(check.roofs.read_gb_per_s)}


def interpret() -> None:
    """Run kernels in Triton's interpreter."""
    os.environ["TRITON_INTERPRET"] = "1"  # read where a kernel is defined
    from fptq_runtime.kernels.triton import interpreter

    interpreter.mend()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for all parts")
    parser.add_argument("--only", action="append", choices=[part.name for part in PARTS], help="may be repeated")
    parser.add_argument("--threads", type=int, default=8, help="that compile kernels")
    parser.add_argument("--interpret", action="store_true", help="parity on tiny shapes, without a GPU")
    options = parser.parse_args(arguments)
    if options.interpret:
        interpret()
    from fptq_runtime.kernels.triton.device import problem

    if why_not := problem():
        print(f"gpu-check: {why_not}", file=sys.stderr)
        return 2
    check = Check(options.interpret, options.threads)
    check.roofs = check.backend.roofs()
    parts = [part for part in PARTS if (options.only is None or part.name in options.only)
             and (not check.tiny or part.name in ("ops", "models", "artifact"))]
    report = Report(options.out, facts(check))
    passed = run(check, report, parts, options.budget / sum(part.seconds for part in parts))
    print(report.markdown())
    print("parity holds" if passed else "parity FAILED")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
