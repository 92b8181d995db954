"""The native CPU backend: packs parameters, records a model once into a native program, steps it with one call."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from ml_dtypes import bfloat16

import fptq_runtime._native as _native
from fptq_runtime.config import KVCacheDtype, ModelConfig
from fptq_runtime.errors import FptqError
from fptq_runtime.kernels.base import (
    PARAMETERS,
    Activation,
    ActivationQuant,
    Array,
    AttentionSpec,
    Embedding,
    Float32Array,
    GatedDelta,
    Int32Array,
    Linear,
    LowRank,
    Norm,
    Ops,
    QuantizedWeight,
    Recurrent,
    Roofs,
    Routing,
    SampleInput,
    SampleOutput,
    ShortConv,
    StateSpace,
    StepInput,
    StepLimits,
    UInt8Array,
    Work,
    arrays_of,
)


def _contracts() -> dict[str, list[tuple[str, str, str]]]:
    """(name, dtype, shape) of all arrays that the extension reads by name; (name, dtype, offset) of a parameter."""
    parameters = [(name, dtype.name, str(at)) for name, (dtype, at, *_) in (PARAMETERS.fields or {}).items()]
    return {"PARAMETERS": parameters,
            **{contract.__name__: arrays_of(contract) for contract in (StepInput, SampleInput, SampleOutput)}}


if not hasattr(_native, "sources") or _native.contracts() != _contracts():
    raise ImportError("the native extension was built from other sources than this package")


PANEL = 64  # rows of a weight that lie side by side: every layout's panel_cols divides it


@dataclass(frozen=True)
class Prepared:
    """A native parameter; it holds the arrays that it reads."""

    native: Any
    act: ActivationQuant | None = None  # of a linear
    low_rank: tuple[Any, Any] | None = None  # of a linear: two more
    adapters: Any = None  # of a linear: what sequences add to it


class CpuBackend:
    """Runs on `threads` threads (0: `available_threads()`) over one ISA path.

    isa: "generic", "avx2", "avxvnni" or "avx512vnni"; None takes $FPTQ_ISA, or the best that this CPU has. Raises
    FptqError for a path that is unknown or that this CPU lacks.
    """

    name = "native"
    asynchronous = False

    def __init__(self, threads: int = 0, isa: str | None = None) -> None:
        if threads < 0:
            raise FptqError(f"threads must be 0 (automatic) or more, not {threads}", "threads")
        forced = os.environ.get("FPTQ_ISA", "") if isa is None else isa
        try:
            self._isa, self._int4, self._int8, self._float = _native.kernel_names(forced)
        except ValueError as error:
            raise FptqError(f"FPTQ_ISA: {error}" if isa is None else str(error)) from None
        available = available_threads()
        if threads > available:
            logging.getLogger(__name__).warning("%d threads on %d cores (what mask and quota leave): those beyond slow "
                                                "every step down", threads, available)
        with _refusals():
            self._pool = _native.ThreadPool(threads or available)
        self._sampler = _native.Sampler(self._pool, self._isa)
        self._linears: dict[str, str] = {}  # the kernel of each kind that was prepared

    def prepare(self, parameter: Any) -> Prepared:
        if isinstance(parameter, Linear):
            low_rank = None if parameter.low_rank is None else self._prepare_low_rank(parameter, *parameter.low_rank)
            return Prepared(self._prepare_linear(parameter), act=parameter.act, low_rank=low_rank)
        if isinstance(parameter, Norm):
            return Prepared(_prepare_norm(parameter))
        if isinstance(parameter, Embedding):
            return _prepare_embedding(parameter)
        if isinstance(parameter, AttentionSpec):
            with _refusals():
                return _prepare_attention(parameter)
        if isinstance(parameter, Routing):
            with _refusals():
                return Prepared(_native.Routing(**{**vars(parameter), "bias": _floats(parameter.bias)}))
        if isinstance(parameter, ShortConv | GatedDelta | StateSpace):
            with _refusals():
                return Prepared(_prepare_recurrent(parameter))
        raise TypeError(f"cannot prepare a {type(parameter).__name__}")

    def _prepare_linear(self, linear: Linear) -> Any:
        """Experts lie side by side, each in panels of its own."""
        count, size = linear.experts, linear.rows // linear.experts
        if count > 1:
            linear = _whole_panels(linear)
        weight, act = linear.weight, _act(linear.act)
        packed, kept = None, None
        kind = "linear" if count == 1 else "experts"
        if isinstance(weight, QuantizedWeight):
            if weight.type != "int":
                raise FptqError(f"{linear.name}: the native backend has no kernel for FP{weight.num_bits} weights; "
                                "use the reference backend")
            if act is None:
                self._linears[f"{kind} int{weight.num_bits}, float input"] = f"{self._float}, codes widened in cache"
            else:
                self._linears[f"{kind} int{weight.num_bits}"] = self._int4 if weight.num_bits == 4 else self._int8
            with _refusals(f"{linear.name}: "):
                packed = _native.pack_weight(np.ascontiguousarray(weight.packed), _float32(weight.scale),
                                             weight.group_size, weight.num_bits, self._pool, self._isa)
        else:
            if act is not None:
                raise FptqError(f"{linear.name}: the native backend has no kernel for float weights with quantized "
                                f"activations; quantize the weight or use the reference backend")
            self._linears[f"{kind} {weight.dtype.name}"] = self._float
            kept = _native.pack_float(_bits(np.ascontiguousarray(weight)), self._pool, self._isa)
        if count > 1:
            return _native.Experts(linear.name, packed, kept, _floats(linear.bias), act, count, size)
        return _native.Linear(linear.name, packed, kept, _floats(linear.bias), act)

    def _prepare_low_rank(self, linear: Linear, down: Array, up: Array) -> tuple[Any, Any]:
        name = f"{linear.name}.low_rank_down"
        weight = down if linear.act is None else _int8_rows(name, down)
        return (self._prepare_linear(Linear(name, weight, act=linear.act)),
                self._prepare_linear(Linear(f"{linear.name}.low_rank_up", up)))

    def adaptable(self, linear: Prepared, slots: int) -> Prepared:
        return replace(linear, adapters=_native.Adapters(linear.native, slots))

    def adapt(self, linear: Prepared, slot: int, parts: Sequence[LowRank]) -> None:
        with _refusals():
            linear.adapters.set(self._pool, slot, [(part.first, *_factors(part, linear.act is not None))
                                                   for part in parts])

    def compile(self, forward: Callable[[Ops[Any]], Any], limits: StepLimits, sharing: CpuExecutor | None = None
                ) -> CpuExecutor:
        program = _native.Program(self._pool, self._isa, **vars(limits),
                                  sharing=None if sharing is None else sharing.program)
        program.finish(forward(CaptureOps(program)))
        return CpuExecutor(program, limits.max_logits_rows)

    def sample(self, logits: Float32Array, batch: SampleInput) -> SampleOutput:
        """Raises ValueError, and draws nothing, where an array or an index is wrong."""
        out = SampleOutput.empty(batch)
        self._sampler.run(logits, batch, out)
        return out

    def token_bytes(self, model: ModelConfig, dtype: KVCacheDtype) -> int:
        return model.cached_layers * _native.kv_token_bytes(dtype, model.num_kv_heads, model.head_dim)

    def step_bytes(self, model: ModelConfig, limits: StepLimits) -> int:
        return 0

    def free_memory(self) -> None:
        return None

    def roofs(self) -> Roofs:
        return Roofs(_native.peak_gops(self._pool, self._isa), _native.read_bandwidth(self._pool))

    @property
    def fingerprint(self) -> str:
        """Of the sources alone: every ISA, compiler and number of threads gives the same bits."""
        return f"native {_native.sources()}"

    def describe(self) -> dict[str, str]:
        return {
            "backend": "native",
            "isa": self._isa,
            "threads": str(self._pool.threads),
            **self._linears,
            "attention": f"paged, {self._isa}; int8 KV: integer q·K and P·V; bf16 and float32 KV: float32 FMA",
        }


class CaptureOps:
    """Records each op into a native program; a value is the id the program gave it."""

    def __init__(self, program: _native.Program) -> None:
        self._program = program

    def embed(self, table: Prepared) -> int:
        return self._program.embed(table.native)

    def embed_positions(self, table: Prepared) -> int:
        return self._program.embed_positions(table.native)

    def columns(self, xs: Sequence[int], index: Int32Array) -> int:
        return self._program.columns(list(xs), index.tolist())

    def norm(self, x: int, norm: Prepared, act: ActivationQuant | None) -> int:
        return self._program.norm(x, norm.native, _act(act))

    def quantize(self, x: int, act: ActivationQuant | None) -> int:
        return self._program.quantize(x, _act(act))

    def linear(self, x: int, linear: Prepared, residual: int | None = None) -> int:
        y = self._program.linear(x, linear.native, residual)
        if linear.low_rank is not None:
            down, up = linear.low_rank
            y = self._program.linear(self._program.linear(x, down, None), up, y)
        return y if linear.adapters is None else self._program.adapt(x, y, linear.adapters)

    def activation(self, x: int, activation: Activation, act: ActivationQuant | None) -> int:
        return self._program.activation(x, activation.curve, activation.gated, activation.limit, _act(act))

    def add(self, x: int, y: int) -> int:
        return self._program.add(x, y)

    def scale(self, x: int, factor: float) -> int:
        return self._program.scale(x, factor)

    def softcap(self, x: int, cap: float) -> int:
        return self._program.softcap(x, cap)

    def rope_and_cache(self, qkv: int, attention: Prepared) -> int:
        return self._program.rope_and_cache(qkv, attention.native)

    def attention(self, q: int, attention: Prepared, act: ActivationQuant | None, selected: bool = False) -> int:
        return self._program.attention(q, attention.native, _act(act), selected)

    def short_conv(self, x: int, conv: Prepared) -> int:
        return self._program.short_conv(x, conv.native)

    def gated_delta(self, x: int, ba: int, delta: Prepared) -> int:
        return self._program.gated_delta(x, ba, delta.native)

    def state_space(self, x: int, space: Prepared) -> int:
        return self._program.state_space(x, space.native)

    def select_rows(self, x: int) -> int:
        return self._program.select_rows(x)

    def route(self, logits: int, routing: Prepared) -> int:
        return self._program.route(logits, routing.native)

    def dispatch(self, x: int, routed: int) -> int:
        return self._program.dispatch(x, routed)

    def expert_linear(self, x: int, linear: Prepared, routed: int) -> int:
        return self._program.experts(x, linear.native, routed)

    def combine(self, x: int, routed: int, residual: int | None = None) -> int:
        return self._program.combine(x, routed, residual)

    def gate(self, x: int, logit: int) -> int:
        return self._program.gate(x, logit)


class CpuExecutor:
    """One recorded program and its KV cache. Steps are for one thread at a time."""

    def __init__(self, program: _native.Program, max_logits_rows: int) -> None:
        self.program = program
        # For steps with `reuse`, touched as far as they need it: the kernel would zero a fresh one each time.
        self._logits = np.empty((max_logits_rows, program.logits_width), np.float32)

    @property
    def seconds(self) -> dict[str, float]:
        return self.program.seconds

    @property
    def blocks(self) -> UInt8Array:
        return self.program.blocks

    def copy_state(self, source: int, target: int) -> None:
        """Raises ValueError where there is no such slot."""
        self.program.copy_state(source, target)

    def work(self, tokens: int, rows: int) -> Work:
        return Work(*self.program.work(tokens, rows))

    def step(self, batch: StepInput, reuse: bool = False, sampled: None = None) -> Float32Array:
        """Logits [R, V]. Raises ValueError, and leaves the cache as it was, where an array or an index is wrong."""
        rows = batch.logits_rows.size
        logits = self._logits[:rows] if reuse else np.empty((rows, self.program.logits_width), np.float32)
        self.program.step(batch, logits)
        return logits


def available_threads() -> int:
    """min(CPUs of the affinity mask, their physical cores, the cgroup's CPU quota), at least 1.

    A spinning pool that exceeds any of them loses to a smaller one.
    """
    cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = {_read(Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")) or str(cpu) for cpu in cpus}
    return max(1, min(len(cpus), len(cores), int(_cgroup_quota(Path("/")))))


def _cgroup_quota(root: Path) -> float:
    """CPUs that the process's cgroup (v1 or v2) and its parents may use; infinity is 1e9."""
    quota = 1e9
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
        group = base / path.lstrip("/")
        for directory in (group, *group.parents):
            if controllers:
                limit = [_read(directory / "cpu.cfs_quota_us"), _read(directory / "cpu.cfs_period_us")]
            else:
                limit = _read(directory / "cpu.max").split()
            if len(limit) == 2 and all(part.isdigit() and int(part) for part in limit):
                quota = min(quota, int(limit[0]) / int(limit[1]))
            if directory == base:
                break
    return quota


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


@contextmanager
def _refusals(what: str = "") -> Iterator[None]:
    """Around native calls whose ValueError says what the machine or the kernels cannot do."""
    try:
        yield
    except ValueError as error:
        raise FptqError(f"{what}{error}") from None


def _act(act: ActivationQuant | None) -> float | None:
    """The native form: None is float, 0 dynamic, else the static scale."""
    if act is None:
        return None
    if act.type != "int":
        raise FptqError("the native backend has no kernel for FP8 activations; use the reference backend")
    if act.scale is None:
        return 0.0
    if not act.scale > 0:
        raise FptqError(f"a static activation scale must be positive, not {act.scale}")
    return act.scale


def _whole_panels(linear: Linear) -> Linear:
    """With rows of zeros after each expert's, so that the next one's begin a panel."""
    size = linear.rows // linear.experts
    if size % PANEL == 0:
        return linear

    def padded(array: Array) -> Array:
        apart = array.reshape(linear.experts, size, -1)
        return np.pad(apart, ((0, 0), (0, -size % PANEL), (0, 0))).reshape(-1, apart.shape[-1])

    weight = linear.weight
    if isinstance(weight, QuantizedWeight):
        return replace(linear, weight=replace(weight, packed=padded(weight.packed), scale=padded(weight.scale)))
    return replace(linear, weight=padded(weight))


def _float32(array: Array) -> Float32Array:
    return np.ascontiguousarray(array, np.float32)


def _int8_rows(name: str, weight: Array) -> QuantizedWeight:
    """The same numbers as integers times a power of two a row. Raises FptqError where they are not."""
    values = _float32(weight)
    scale = np.ldexp(np.float32(1), np.frexp(np.abs(values).max(1, keepdims=True))[1] - 7)
    codes = values / scale  # the largest of a row is 64 to 127
    if not np.array_equal(codes, codes.round()):
        raise FptqError(f"{name}: the native backend needs int8 multiples of a power of two in each row; use the "
                        "reference backend")
    octets = np.pad((codes + 128).astype(np.uint8), ((0, 0), (0, -codes.shape[1] % 4)))
    return QuantizedWeight(octets.view(np.int32), scale, 8, codes.shape[1])


def _factors(part: LowRank, codes: bool) -> tuple[Array, Array, list[float]]:
    """down, up transposed, and a scale for each of the rank. codes: both as int8 with a scale a row."""
    down, up = part.down, part.up.T
    if not codes:
        return _bits(np.ascontiguousarray(down)), _bits(np.ascontiguousarray(up)), [part.scale] * len(down)
    (down, first), (up, second) = _int8(down), _int8(up)
    return down, up, (part.scale * first * second).tolist()


def _int8(rows: Array) -> tuple[Array, Array]:
    """Codes and a scale for each row, as activations have them."""
    values = _float32(rows)
    scale = np.abs(values).max(1) / np.float32(127.5)
    codes = np.round(values / np.where(scale > 0, scale, 1)[:, None])
    return codes.clip(-128, 127).astype(np.int8), scale


def _bits(array: Array) -> Array:
    """The native form of floats: of bfloat16, the bits."""
    return array.view(np.int16) if array.dtype == bfloat16 else array


def _floats(array: Array | None) -> list[float]:
    return [] if array is None else _float32(array).ravel().tolist()


def _prepare_embedding(embedding: Embedding) -> Prepared:
    """Rows are gathered from where they lie: of a mapped file, a process holds those that were asked for."""
    return Prepared(_native.Embedding(_bits(np.ascontiguousarray(embedding.weight))))


def _prepare_norm(norm: Norm) -> Any:
    return _native.Norm(_floats(norm.weight), _floats(norm.bias), norm.eps, norm.kind == "layer")


def _prepare_recurrent(op: Recurrent) -> Any:
    if isinstance(op, ShortConv):
        return _native.ShortConv(**{**vars(op), "weight": _floats(op.weight.T), "bias": _floats(op.bias)})
    if isinstance(op, StateSpace):
        return _native.StateSpace(**{**vars(op), "a_log": _floats(op.a_log.T), "d": _floats(op.d),
                                     "dt_bias": _floats(op.dt_bias), "norm_weight": _floats(op.norm_weight)})
    return _native.GatedDelta(**{**vars(op), "a_log": _floats(op.a_log), "dt_bias": _floats(op.dt_bias),
                                 "norm_weight": _floats(op.norm_weight)})


def _prepare_attention(spec: AttentionSpec) -> Prepared:
    rope_cos, rope_sin = (None, None) if spec.rope is None else map(_float32, spec.rope)
    if spec.sliding_window is not None and spec.sliding_window < 1:
        raise FptqError(f"sliding_window must be at least 1, not {spec.sliding_window}")
    if spec.softcap is not None and not spec.softcap > 0:
        raise FptqError(f"softcap must be positive, not {spec.softcap}")
    native = _native.Attention(
        layer=spec.layer,
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        softmax_scale=spec.softmax_scale,
        sliding_window=spec.sliding_window or 0,
        rope_cos=rope_cos,
        rope_sin=rope_sin,
        alibi_slopes=_floats(spec.alibi_slopes),
        sinks=_floats(spec.sinks),
        softcap=spec.softcap or 0.0,
        q_norm=None if spec.q_norm is None else _prepare_norm(spec.q_norm),
        q_norm_own=spec.q_norm is not None and np.ndim(spec.q_norm.weight) == 2,
        k_norm=None if spec.k_norm is None else _prepare_norm(spec.k_norm),
        k_norm_own=spec.k_norm is not None and np.ndim(spec.k_norm.weight) == 2,
        norm_after_rope=spec.norm_after_rope,
    )
    return Prepared(native)
