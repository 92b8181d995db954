"""The Triton backend: parameters on the GPU, and an executor that replays a CUDA graph where a step only decodes.

TRITON_INTERPRET=1 runs the same steps, padding included, on the CPU in Triton's interpreter, without graphs.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
import triton

from fptq_runtime.config import KVCacheDtype, ModelConfig
from fptq_runtime.errors import FptqError
from fptq_runtime.kernels.base import (
    Activation,
    ActivationQuant,
    Array,
    AttentionSpec,
    Embedding,
    GatedDelta,
    Int32Array,
    Linear,
    LowRank,
    Norm,
    Ops,
    PendingSample,
    Roofs,
    Routing,
    SampleInput,
    ShortConv,
    StateSpace,
    StepInput,
    StepLimits,
    Work,
    arrays_of,
)
from fptq_runtime.kernels.triton import fused
from fptq_runtime.kernels.triton.adapters import DeviceAdapters, add_adapters, slots_of
from fptq_runtime.kernels.triton.attention import (
    DeviceAttention,
    DeviceCache,
    cache_bytes_per_token,
    part_bytes,
    parts_bytes,
    prepare_attention,
    rope_and_cache,
)
from fptq_runtime.kernels.triton.attention import attention as attend
from fptq_runtime.kernels.triton.device import device_watched, fastest, is_gpu
from fptq_runtime.kernels.triton.experts import DeviceExperts, Routed, combine, prepare_routing, route, run_experts
from fptq_runtime.kernels.triton.fused import DeviceNorm
from fptq_runtime.kernels.triton.linear import DeviceLinear, describe, pack_linear, queue_linear, run_linear
from fptq_runtime.kernels.triton.sampling import DeviceSample, sample, take_sampled
from fptq_runtime.kernels.triton.sums import Sums
from fptq_runtime.kernels.triton.values import DeviceBatch, Quantized, interpreted, take_rows

Value = torch.Tensor | Quantized | Sums

SMALLEST_CONTEXT = 1024  # the least of the powers of two that graphs are made for, in tokens
OVERHEAD_BYTES = 640 << 20  # CUDA's context, graphs
LOGIT_BYTES = 32  # of a logit, its copy and its sort key on the way to a token
ALIGNED = 32  # each array of a step begins at a multiple of so many int32


class TritonBackend:
    """batch_invariant: a row's bits depend on nothing but the row; without it large matrix products may go the fastest
    way. Raises FptqError where memory runs out."""

    name = "triton"

    def __init__(self, batch_invariant: bool = True) -> None:
        self.device = torch.device("cpu" if interpreted() else "cuda")
        self.batch_invariant = batch_invariant
        self.asynchronous = is_gpu(self.device)
        self._linears: dict[str, str] = {}  # the kernel of each kind that was prepared
        self._tables: dict[int, tuple[Array, torch.Tensor]] = {}  # that layers share

    def prepare(self, parameter: Any) -> Any:
        try:
            if isinstance(parameter, Linear):
                experts = tuple(pack_linear(parameter.expert(i) if parameter.experts > 1 else parameter, self.device)
                                for i in range(parameter.experts))
                kind, kernel = describe(experts[0])
                self._linears[kind] = kernel
                return experts[0] if len(experts) == 1 else DeviceExperts(experts)
            if isinstance(parameter, Norm):
                return fused.prepare_norm(parameter, self.device)
            if isinstance(parameter, Embedding):
                return fused.prepare_embedding(parameter, self.device)
            if isinstance(parameter, AttentionSpec):
                return prepare_attention(parameter, self.device, self._tables)
            if isinstance(parameter, Routing):
                return prepare_routing(parameter, self.device)
        except torch.OutOfMemoryError:
            raise FptqError("the model's weights do not fit into the GPU's free memory; free some, choose another GPU "
                            "with CUDA_VISIBLE_DEVICES, or use --device cpu") from None
        if isinstance(parameter, ShortConv | GatedDelta | StateSpace):
            raise FptqError(f"{parameter.name}: the GPU has no kernel for recurrent layers; use --device cpu", "device")
        raise TypeError(f"cannot prepare a {type(parameter).__name__}")

    def adaptable(self, linear: DeviceLinear, slots: int) -> DeviceLinear:
        return replace(linear, adapters=DeviceAdapters.empty(linear.n, linear.k, slots, self.device))

    def adapt(self, linear: DeviceLinear, slot: int, parts: Sequence[LowRank]) -> None:
        assert linear.adapters is not None
        linear.adapters.set(slot, parts)

    def compile(self, forward: Callable[[Ops[Any]], Any], limits: StepLimits, sharing: TritonExecutor | None = None
                ) -> TritonExecutor:
        """Raises MemoryError where the KV cache does not fit."""
        try:
            cache = DeviceCache(limits, self.device) if sharing is None else sharing.cache
            return TritonExecutor(forward, limits, cache, self.device, self.batch_invariant)
        except torch.OutOfMemoryError as error:
            raise MemoryError(str(error)) from None

    def sample(self, logits: torch.Tensor, batch: SampleInput) -> PendingSample:
        with torch.inference_mode(), device_watched(self.device):
            return sample(logits, batch)

    def token_bytes(self, model: ModelConfig, dtype: KVCacheDtype) -> int:
        return cache_bytes_per_token(dtype, model.cached_layers, model.num_kv_heads, model.head_dim)

    def step_bytes(self, model: ModelConfig, limits: StepLimits) -> int:
        widest = 4 * model.hidden_size + (model.num_heads + 2 * model.num_kv_heads) * model.head_dim \
            + 3 * model.intermediate_size
        values, logits = 8 * limits.max_tokens * widest, LOGIT_BYTES * limits.max_logits_rows * model.vocab_size
        parts = part_bytes(limits.max_seqs, model.num_heads, model.head_dim, limits.kv_dtype, limits.max_model_len)
        return OVERHEAD_BYTES + values + logits + min(parts, parts_bytes(self.device))

    def free_memory(self) -> int | None:
        if not is_gpu(self.device):
            return None
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self.device)[0]

    def roofs(self) -> Roofs | None:
        """cuBLAS's int8 product, and all the bytes that a copy moves."""
        if not is_gpu(self.device):
            return None
        size = 8192
        a, b = (torch.randint(-127, 128, (size, size), dtype=torch.int8, device=self.device) for _ in range(2))
        source = torch.empty(1 << 28, dtype=torch.float32, device=self.device)
        target = torch.empty_like(source)
        product = fastest(lambda: torch._int_mm(a, b.t()))
        copy = fastest(lambda: target.copy_(source))
        return Roofs(2e-9 * size**3 / product, 2e-9 * source.nbytes / copy)

    @property
    def fingerprint(self) -> str:
        return str(self.describe())

    def describe(self) -> dict[str, str]:
        where = "Triton's interpreter"
        if is_gpu(self.device):
            major, minor = torch.cuda.get_device_capability(self.device)
            where = f"{torch.cuda.get_device_name(self.device)}, sm_{major}{minor}"
        return {
            "backend": "triton",
            "isa": where,
            "versions": f"triton {triton.__version__}, torch {torch.__version__}",
            **self._linears,
            "attention": "paged, split over the cache; int8 KV: integer q·K and P·V",
            "steps": "CUDA graphs where all sequences decode" if self.asynchronous else "eager",
            "batch": "invariant" if self.batch_invariant else "a row may depend on the batch",
        }


@dataclass(frozen=True)
class _Shape:
    """Of the arrays of a step, padding included, and what a graph is made for."""

    tokens: int
    seqs: int
    rows: int  # of logits
    context: int  # tokens, of any sequence at most
    query: int  # rows of any sequence at most
    graph: bool


class TritonExecutor:
    """One model and its KV cache. Steps are for one thread at a time, on its current stream."""

    def __init__(self, forward: Callable[[Ops[Any]], Any], limits: StepLimits, cache: DeviceCache,
                 device: torch.device, invariant: bool) -> None:
        self._forward = forward
        self._limits = limits
        self._device = device
        self._invariant = invariant
        self.cache = cache
        self._inputs = _Inputs(limits, device)
        self._logits: torch.Tensor | None = None  # [max seqs, V], what graphs write to
        self._graphs: dict[_Shape, torch.cuda.CUDAGraph] = {}
        self._pool: Any = None  # the memory that all graphs share: one runs at a time
        self._timer = _Timer(device)
        self.blocks = None
        survey = _Survey()
        forward(survey)
        self._survey = survey

    @property
    def seconds(self) -> dict[str, float]:
        return {"forward": self._timer.seconds()}

    def work(self, tokens: int, rows: int) -> Work:
        return self._survey.work(tokens, rows)

    def step(self, batch: StepInput, reuse: bool = False, sampled: PendingSample | None = None) -> torch.Tensor:
        """Returns once the step is queued. Raises ValueError where it exceeds the limits."""
        shape, rows = self._shape(batch), batch.logits_rows.size
        with torch.inference_mode(), device_watched(self._device):
            inputs = self._inputs.load(batch if shape.graph else _shorter_first(batch), shape)
            if isinstance(sampled, DeviceSample):  # else nothing was drawn
                take_sampled(inputs.token_ids, sampled.token_ids)
            with self._timer:
                if not shape.graph:
                    return self._run(inputs)[:rows]
                logits = self._replay(shape, inputs)[:rows]
            return logits if reuse or not self._graphs else logits.clone()

    def copy_state(self, source: int, target: int) -> None:
        """There is none: `prepare` refuses recurrent layers."""

    def _shape(self, batch: StepInput) -> _Shape:
        """Steps in which every sequence has one token are padded to a few sizes, each of which gets a graph."""
        tokens, seqs, rows = batch.token_ids.size, batch.seq_lens.size, batch.logits_rows.size
        limits = self._limits
        longest = int(batch.seq_lens.max(initial=1))
        if tokens > limits.max_tokens or seqs > limits.max_seqs or rows > limits.max_logits_rows \
                or longest > limits.max_model_len:
            raise ValueError("the step exceeds what the executor was compiled for")
        context = max(SMALLEST_CONTEXT, triton.next_power_of_2(longest))
        if tokens == seqs and 0 < rows <= seqs and not self._survey.has_experts:
            padded = min(bucket(seqs), limits.max_seqs)
            return _Shape(padded, padded, padded, context, 1, True)
        query = int(np.diff(batch.query_start_loc).max(initial=1))
        return _Shape(tokens, seqs, rows, context, triton.next_power_of_2(query), False)

    def _run(self, inputs: DeviceBatch) -> torch.Tensor:
        return _float(self._forward(TritonOps(inputs, self.cache, self._invariant)))

    def _replay(self, shape: _Shape, inputs: DeviceBatch) -> torch.Tensor:
        if not is_gpu(self._device):
            return self._run(inputs)
        if shape not in self._graphs:
            self._capture(shape, inputs)
        assert self._logits is not None
        self._graphs[shape].replay()
        return self._logits

    def _capture(self, shape: _Shape, inputs: DeviceBatch) -> None:
        """The step runs once before, so that its kernels are compiled; it writes the same keys and values again."""
        logits = self._run(inputs)
        if self._logits is None:
            self._logits = torch.empty((self._limits.max_seqs, logits.shape[1]), device=self._device)
            self._pool = torch.cuda.graph_pool_handle()
        del logits
        torch.cuda.current_stream(self._device).synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            self._logits[: shape.rows].copy_(self._run(inputs))
        self._graphs[shape] = graph


def _shorter_first(batch: StepInput) -> StepInput:
    """The same step, sequences with few rows before others, so that attention may take those that decode together."""
    lengths = np.diff(batch.query_start_loc)
    if (lengths[1:] >= lengths[:-1]).all():
        return batch
    order = np.argsort(lengths, kind="stable")
    rows = np.concatenate([np.arange(batch.query_start_loc[s], batch.query_start_loc[s + 1]) for s in order])
    places = np.empty(rows.size, np.int32)
    places[rows] = np.arange(rows.size, dtype=np.int32)
    starts = np.concatenate([[0], np.cumsum(lengths[order])]).astype(np.int32)
    taken = {"M": rows, "S": order, "S, blocks": order}
    arrays = {name: getattr(batch, name)[taken[shape]] for name, _, shape in arrays_of(StepInput) if shape in taken}
    return replace(batch, **arrays, query_start_loc=starts, logits_rows=places[batch.logits_rows])


def bucket(seqs: int) -> int:
    """1, 2, 4, 8, 16, 24, 32, …"""
    return triton.next_power_of_2(seqs) if seqs <= 8 else -(-seqs // 8) * 8


class TritonOps:
    """The ops of one step, queued on the device."""

    def __init__(self, batch: DeviceBatch, cache: DeviceCache, invariant: bool) -> None:
        self._batch = batch
        self._cache = cache
        self._invariant = invariant
        self._selected = False  # the values from here on are rows of logits

    @cached_property
    def _slots(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Of each row's adapter, before and after the rows of logits are taken."""
        return slots_of(self._batch, False), slots_of(self._batch, True)

    def embed(self, table: torch.Tensor) -> Value:
        return fused.embed(self._batch.token_ids, table)

    def embed_positions(self, table: torch.Tensor) -> Value:
        return fused.embed(self._batch.positions, table)

    def columns(self, xs: Sequence[Value], index: Int32Array) -> Value:
        where = torch.from_numpy(index).long().to(_float(xs[0]).device)
        picked = torch.cat([_float(x) for x in xs], -1).index_select(1, where.clamp_min(0))
        return picked.masked_fill(where < 0, 0.0)

    def norm(self, x: Value, norm: DeviceNorm, act: ActivationQuant | None) -> Value:
        assert not isinstance(x, Quantized)
        return fused.norm(x, norm.weight, norm.bias, norm.eps, norm.kind, act)

    def quantize(self, x: Value, act: ActivationQuant | None) -> Value:
        return fused.quantize(_float(x), act)

    def linear(self, x: Value, linear: DeviceLinear, residual: Value | None = None) -> Value:
        made, added = _made(x), None if residual is None else _float(residual)
        if linear.adapters is None:
            return queue_linear(made, linear, added, self._invariant)
        y = run_linear(made, linear, added, self._invariant)
        add_adapters(made, y, linear.adapters, self._slots[self._selected])
        return y

    def activation(self, x: Value, activation: Activation, act: ActivationQuant | None) -> Value:
        return fused.activation(_float(x), activation, act)

    def add(self, x: Value, y: Value) -> Value:
        return _float(x) + _float(y)

    def scale(self, x: Value, factor: float) -> Value:
        return _float(x) * factor

    def softcap(self, x: Value, cap: float) -> Value:
        return fused.softcap(_float(x), cap)

    def rope_and_cache(self, qkv: Value, attention: DeviceAttention) -> Value:
        assert not isinstance(qkv, Quantized)
        return rope_and_cache(qkv, attention, self._cache, self._batch)

    def attention(self, q: Value, attention: DeviceAttention, act: ActivationQuant | None,
                  selected: bool = False) -> Value:
        attended = attend(_made(q), attention, self._cache, self._batch, act)
        return self.select_rows(attended) if selected else attended

    def short_conv(self, x: Value, conv: Any) -> Value:
        raise NotImplementedError  # `prepare` refuses what it needs

    def gated_delta(self, x: Value, ba: Value, delta: Any) -> Value:
        raise NotImplementedError

    def state_space(self, x: Value, space: Any) -> Value:
        raise NotImplementedError

    def select_rows(self, x: Value) -> Value:
        self._selected = True
        return take_rows(_made(x), self._batch.logits_rows)

    def route(self, logits: Value, routing: Routing) -> Routed:
        return route(_float(logits), routing)

    def dispatch(self, x: Value, routed: Routed) -> Value:
        return take_rows(_made(x), routed.rows)

    def expert_linear(self, x: Value, linear: DeviceExperts, routed: Routed) -> Value:
        return run_experts(_made(x), linear, routed, self._invariant)

    def combine(self, x: Value, routed: Routed, residual: Value | None = None) -> Value:
        return combine(_float(x), routed, None if residual is None else _float(residual))

    def gate(self, x: Value, logit: Value) -> Value:
        return _float(x) * _float(logit)[:, : _float(x).shape[1]].sigmoid()


class _Inputs:
    """A step's arrays in device memory, at addresses that a shape always has, by one copy from pinned memory."""

    def __init__(self, limits: StepLimits, device: torch.device) -> None:
        self._block_size = limits.block_size
        context = max(SMALLEST_CONTEXT, triton.next_power_of_2(limits.max_model_len))
        largest = _Shape(limits.max_tokens, limits.max_seqs, limits.max_logits_rows, context, 1, False)
        size = max(part.stop for part, _ in self._layout(largest).values())
        self._pinned = torch.empty(size, dtype=torch.int32, pin_memory=is_gpu(device))
        self._host = self._pinned.numpy()
        self._device = torch.empty(size, dtype=torch.int32, device=device)
        self._copied = torch.cuda.Event() if is_gpu(device) else None

    def load(self, batch: StepInput, shape: _Shape) -> DeviceBatch:
        if self._copied is not None:
            self._copied.synchronize()  # of the step before: the host runs at most that far ahead
        layout = self._layout(shape)
        padding = {"slot_mapping": -1, "query_start_loc": batch.token_ids.size}
        for name, (part, sizes) in layout.items():
            array, host = getattr(batch, name), self._host[part].reshape(sizes)
            within = tuple(map(slice, np.minimum(array.shape, sizes)))
            host.fill(padding.get(name, 0))
            host[within] = array[within]
        end = max(part.stop for part, _ in layout.values())
        self._device[:end].copy_(self._pinned[:end], non_blocking=True)
        if self._copied is not None:
            self._copied.record()
        arrays = {name: self._device[part].view(sizes) for name, (part, sizes) in layout.items()}
        lengths = () if shape.graph else tuple(np.diff(batch.query_start_loc).tolist())
        return DeviceBatch(**arrays, max_query_len=shape.query, max_seq_len=shape.context, query_lens=lengths)

    def _layout(self, shape: _Shape) -> dict[str, tuple[slice, tuple[int, ...]]]:
        """Where each array of a StepInput that kernels read lies, and its shape."""
        sizes: dict[str, tuple[int, ...]] = {
            "M": (shape.tokens,), "S": (shape.seqs,), "S + 1": (shape.seqs + 1,), "R": (shape.rows,),
            "S, blocks": (shape.seqs, -(-shape.context // self._block_size)),
        }
        parts, start = {}, 0
        read = {field.name for field in fields(DeviceBatch)}
        for name, dims in ((name, dims) for name, _, dims in arrays_of(StepInput) if name in read):
            part = slice(start, start + math.prod(sizes[dims]))
            parts[name] = part, sizes[dims]
            start = -(-part.stop // ALIGNED) * ALIGNED
        return parts


class _Timer:
    """Seconds that the device spends inside `with`, read once it is past them."""

    def __init__(self, device: torch.device) -> None:
        self._queued = is_gpu(device)
        self._total = 0.0
        self._open: Any = 0.0
        self._pending: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    def __enter__(self) -> None:
        if self._queued:
            self.seconds()
            self._open = torch.cuda.Event(enable_timing=True)
            self._open.record()
        else:
            self._open = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        if self._queued:
            end = torch.cuda.Event(enable_timing=True)
            end.record()
            self._pending.append((self._open, end))
        else:
            self._total += time.perf_counter() - self._open

    def seconds(self) -> float:
        while self._pending and self._pending[0][1].query():
            start, end = self._pending.popleft()
            self._total += start.elapsed_time(end) / 1000
        return self._total


class _Survey:
    """Ops that compute nothing and count the linears, before and after the rows of logits are taken."""

    def __init__(self) -> None:
        self._multiply_adds = [0, 0]
        self._bytes = 0
        self._experts: list[tuple[Routing, int, int]] = []  # each linear's, its bytes, and where it stands
        self._at = 0

    @property
    def has_experts(self) -> bool:
        return bool(self._experts)

    def work(self, tokens: int, rows: int) -> Work:
        weight_bytes = self._bytes
        for routing, nbytes, at in self._experts:
            missed = 1 - routing.top_k / routing.num_experts  # by one row
            weight_bytes += round(nbytes * (1 - missed ** (tokens, rows)[at]))
        return Work(tokens * self._multiply_adds[0] + rows * self._multiply_adds[1], weight_bytes)

    def route(self, logits: None, routing: Routing) -> Routing:
        return routing

    def dispatch(self, x: None, routed: Routing) -> None: ...

    def expert_linear(self, x: None, linear: DeviceExperts, routed: Routing) -> None:
        first = linear.experts[0]
        self._multiply_adds[self._at] += routed.top_k * first.n * first.k
        self._experts.append((routed, len(linear.experts) * first.nbytes, self._at))

    def combine(self, x: None, routed: Routing, residual: None = None) -> None: ...

    def gate(self, x: None, logit: None) -> None: ...

    def linear(self, x: None, linear: DeviceLinear, residual: None = None) -> None:
        for part in (linear, *(linear.low_rank or ())):
            self._multiply_adds[self._at] += part.n * part.k
        self._bytes += linear.nbytes

    def short_conv(self, x: None, conv: Any) -> None: ...

    def gated_delta(self, x: None, ba: None, delta: Any) -> None: ...

    def state_space(self, x: None, space: Any) -> None: ...

    def select_rows(self, x: None) -> None:
        self._at = 1

    def attention(self, q: None, attention: Any, act: Any, selected: bool = False) -> None:
        self._at = 1 if selected else self._at

    def embed(self, table: Any) -> None: ...

    def embed_positions(self, table: Any) -> None: ...

    def columns(self, xs: Any, index: Int32Array) -> None: ...

    def norm(self, x: None, norm: Any, act: Any) -> None: ...

    def quantize(self, x: None, act: Any) -> None: ...

    def activation(self, x: None, activation: Any, act: Any) -> None: ...

    def add(self, x: None, y: None) -> None: ...

    def scale(self, x: None, factor: float) -> None: ...

    def softcap(self, x: None, cap: float) -> None: ...

    def rope_and_cache(self, qkv: None, attention: Any) -> None: ...


def _made(x: Value) -> torch.Tensor | Quantized:
    """Sums are added up."""
    return x.value if isinstance(x, Sums) else x


def _float(x: Value) -> torch.Tensor:
    made = _made(x)
    assert isinstance(made, torch.Tensor)
    return made
