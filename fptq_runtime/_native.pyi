from collections.abc import Sequence
from typing import Annotated, overload

import numpy
import numpy.typing
from numpy.typing import NDArray

import fptq_runtime.kernels.base


def available_isas() -> list[str]:
    """ISA paths that this build and this CPU have, best first."""

def sources() -> str:
    """
    SHA-256 of what the kernels were compiled from: of one all ISAs compute the same bits.
    """

def kernel_names(isa: str) -> list[str]:
    """
    [ISA path, int4 GEMM, int8 GEMM, float GEMM]. Empty: the best path. Raises ValueError.
    """

def kv_token_bytes(kv_dtype: str, num_kv_heads: int, head_dim: int) -> int:
    """What a layer's cache takes for a token."""

class PackedWeight:
    """int4 or int8 weight codes and scales in the kernels' layout."""

    @property
    def n(self) -> int: ...

    @property
    def k(self) -> int: ...

    @property
    def bits(self) -> int: ...

    @property
    def bf16_scales(self) -> bool: ...

class FloatWeight:
    """Float weights in the kernels' layout."""

    @property
    def n(self) -> int: ...

    @property
    def k(self) -> int: ...

@overload
def pack_weight(codes: Annotated[NDArray[numpy.int8], dict(shape=(None, None), order='C', device='cpu', writable=False)], scale: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)], group_size: int, bits: int, isa: str = '') -> PackedWeight:
    """
    codes int8 [N, K] within ±2^(bits-1), scale float32 [N, ceil(K / group_size)]; group_size a multiple of 32,
    or K for one scale per channel. Raises ValueError.
    """

@overload
def pack_weight(codes: Annotated[NDArray[numpy.int32], dict(shape=(None, None), order='C', device='cpu', writable=False)], scale: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)], group_size: int, bits: int, pool: ThreadPool | None = None, isa: str = '') -> PackedWeight:
    """The same from a checkpoint's int32 words [N, ceil(K · bits / 32)]."""

def peak_gops(pool: ThreadPool, isa: str = '') -> float:
    """
    Integer GOPS (a multiply-add is two) of the ISA's multiply instruction on registers, all threads of the pool
    together: the GEMMs' roof.
    """

def read_bandwidth(pool: ThreadPool, megabytes: int = 512) -> float:
    """
    GB/s at which the pool's threads together read a buffer once, the fastest of ten passes. Take one that no
    cache holds. Raises ValueError.
    """

def pack_float(weight: numpy.typing.NDArray[numpy.floating | numpy.int16], pool: ThreadPool | None = None, isa: str = '') -> FloatWeight:
    """
    weight [N, K]: float32, float16, or the bits of bfloat16 as int16. Raises ValueError.
    """

class QuantizedRows:
    """int8 rows as the GEMM reads them."""

    def __init__(self, x: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)], scale: float | None = None, isa: str = '') -> None:
        """x float32 [M, K]; scale: the static one, None: dynamic per row."""

    @property
    def codes(self) -> Annotated[NDArray[numpy.int8], dict(shape=(None, None))]:
        """int8 [M, K rounded up to 32]"""

    @property
    def scales(self) -> Annotated[NDArray[numpy.float32], dict(shape=(None, None))]:
        """float32 [M, 1]"""

    @property
    def sums(self) -> Annotated[NDArray[numpy.int32], dict(shape=(None, None))]:
        """int32 [M, ceil(K / 32)], of the codes"""

def gemm(weight: PackedWeight, x: QuantizedRows, out: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu')], bias: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)] | None = None, residual: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)] | None = None, rows: tuple[int, int] | None = None, panels: tuple[int, int] | None = None, isa: str = '') -> None:
    """
    out [M, N] = x · Wᵀ + bias + residual, for rows (begin, end) and weight panels (begin, end) only.
    """

@overload
def gemm_float(weight: FloatWeight, x: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)], out: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu')], bias: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)] | None = None, residual: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)] | None = None, rows: tuple[int, int] | None = None, panels: tuple[int, int] | None = None, isa: str = '') -> None: ...

@overload
def gemm_float(weight: PackedWeight, x: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)], out: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu')], bias: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)] | None = None, residual: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)] | None = None, rows: tuple[int, int] | None = None, panels: tuple[int, int] | None = None, isa: str = '') -> None:
    """The same with float32 x [M, K]."""

class ThreadPool:
    def __init__(self, threads: int) -> None: ...

    @property
    def threads(self) -> int: ...

class Embedding:
    def __init__(self, table: numpy.typing.NDArray[numpy.floating | numpy.int16]) -> None:
        """
        table [vocab, width]: float32, float16, or the bits of bfloat16 as int16; read where it lies.
        """

class Norm:
    def __init__(self, weight: Sequence[float], bias: Sequence[float], eps: float, layer: bool) -> None: ...

class Linear:
    def __init__(self, name: str, packed: PackedWeight | None, float_weight: FloatWeight | None, bias: Sequence[float], act: float | None) -> None: ...

class Adapters:
    def __init__(self, linear: Linear, slots: int) -> None: ...

    def set(self, pool: ThreadPool, slot: int, parts: list[tuple[int, numpy.typing.NDArray[numpy.floating | numpy.int16 | numpy.int8], numpy.typing.NDArray[numpy.floating | numpy.int16 | numpy.int8], list[float]]]) -> None:
        """
        parts: (first column, down [r, K], up transposed [r, N], scales [r]) each; none: the slot adds nothing. Waits for a step that runs. Raises ValueError.
        """

class Experts:
    def __init__(self, name: str, packed: PackedWeight | None, float_weight: FloatWeight | None, bias: Sequence[float], act: float | None, count: int, n: int) -> None: ...

class Routing:
    def __init__(self, *, num_experts: int, top_k: int, scoring: str, normalise: bool, scale: float, bias: Sequence[float], groups: int, top_groups: int, group_best: int, jitter: float) -> None: ...

class Attention:
    def __init__(self, *, layer: int, num_heads: int, num_kv_heads: int, head_dim: int, softmax_scale: float, sliding_window: int, rope_cos: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)] | None, rope_sin: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)] | None, alibi_slopes: Sequence[float], sinks: Sequence[float], softcap: float, q_norm: Norm | None, q_norm_own: bool, k_norm: Norm | None, k_norm_own: bool, norm_after_rope: bool) -> None: ...

class ShortConv:
    def __init__(self, name: str, channels: int, taps: int, silu: bool, gated: bool, weight: Sequence[float], bias: Sequence[float]) -> None: ...

class GatedDelta:
    def __init__(self, name: str, key_heads: int, value_heads: int, key_dim: int, value_dim: int, eps: float, a_log: Sequence[float], dt_bias: Sequence[float], norm_weight: Sequence[float]) -> None: ...

class StateSpace:
    def __init__(self, name: str, heads: int, head_dim: int, groups: int, state: int, dt_min: float, dt_max: float, eps: float, gate_last: bool, a_log: Sequence[float], d: Sequence[float], dt_bias: Sequence[float], norm_weight: Sequence[float]) -> None: ...

class Program:
    def __init__(self, pool: ThreadPool, isa: str, *, max_tokens: int, max_seqs: int, max_logits_rows: int, max_model_len: int, num_blocks: int, block_size: int, kv_dtype: str, num_layers: int, num_kv_heads: int, head_dim: int, kept_states: int = 0, sharing: Program | None = None) -> None: ...

    def embed(self, table: Embedding) -> int: ...

    def embed_positions(self, table: Embedding) -> int: ...

    def columns(self, xs: Sequence[int], index: Sequence[int]) -> int: ...

    def norm(self, x: int, norm: Norm, act: float | None) -> int: ...

    def quantize(self, x: int, act: float | None) -> int: ...

    def linear(self, x: int, linear: Linear, residual: int | None) -> int: ...

    def adapt(self, x: int, y: int, adapters: Adapters) -> int: ...

    def activation(self, x: int, curve: str, gated: bool, limit: float, act: float | None) -> int: ...

    def add(self, x: int, y: int) -> int: ...

    def scale(self, x: int, factor: float) -> int: ...

    def softcap(self, x: int, cap: float) -> int: ...

    def rope_and_cache(self, qkv: int, attention: Attention) -> int: ...

    def attention(self, q: int, attention: Attention, act: float | None, selected: bool) -> int: ...

    def short_conv(self, x: int, conv: ShortConv) -> int: ...

    def gated_delta(self, x: int, ba: int, delta: GatedDelta) -> int: ...

    def state_space(self, x: int, space: StateSpace) -> int: ...

    def select_rows(self, x: int) -> int: ...

    def route(self, logits: int, routing: Routing) -> int: ...

    def dispatch(self, x: int, routed: int) -> int: ...

    def experts(self, x: int, experts: Experts, routed: int) -> int: ...

    def combine(self, x: int, routed: int, residual: int | None) -> int: ...

    def gate(self, x: int, logit: int) -> int: ...

    def finish(self, logits: int) -> None: ...

    def copy_state(self, source: int, target: int) -> None: ...

    @property
    def logits_width(self) -> int: ...

    @property
    def blocks(self) -> Annotated[NDArray[numpy.uint8], dict(shape=(None, None))]:
        """Keys and values, [blocks, bytes]."""

    @property
    def seconds(self) -> dict[str, float]:
        """Spent in all steps so far, by kind of op."""

    def work(self, tokens: int, rows: int) -> tuple[int, int]:
        """(multiply-adds, bytes of weights) of a step's linears."""

    def step(self, batch: fptq_runtime.kernels.base.StepInput, logits: fptq_runtime.kernels.base.Float32Array) -> None:
        """
        Run a StepInput into float32 logits [R, V]. Raises ValueError before writing.
        """

class Sampler:
    def __init__(self, pool: ThreadPool, isa: str) -> None: ...

    def run(self, logits: fptq_runtime.kernels.base.Float32Array, batch: fptq_runtime.kernels.base.SampleInput, out: fptq_runtime.kernels.base.SampleOutput) -> None:
        """
        Draw a SampleInput from float32 logits [R, V] into a SampleOutput. Raises ValueError before writing.
        """

def contracts() -> dict[str, list[tuple[str, str, str]]]:
    """
    What kernels/base.py's dataclasses of arrays must hold, (name, dtype, shape) each; offset for PARAMETERS.
    """
