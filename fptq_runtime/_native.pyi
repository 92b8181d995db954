"""What csrc/bindings.cpp and csrc/bind_gemm.cpp define."""

from typing import Any

import numpy as np
import numpy.typing as npt

from fptq_runtime.kernels.base import SampleInput, SampleOutput, StepInput

_Matrix = npt.NDArray[Any]
_Floats = npt.NDArray[np.float32]
_Span = tuple[int, int]

def available_isas() -> list[str]: ...
def kernel_names(isa: str) -> list[str]: ...
def kv_token_bytes(kv_dtype: str, num_kv_heads: int, head_dim: int) -> int: ...

class PackedWeight:
    @property
    def n(self) -> int: ...
    @property
    def k(self) -> int: ...
    @property
    def bits(self) -> int: ...
    @property
    def bf16_scales(self) -> bool: ...

class FloatWeight:
    @property
    def n(self) -> int: ...
    @property
    def k(self) -> int: ...

class QuantizedRows:
    def __init__(self, x: _Floats, scale: float | None = None, isa: str = "") -> None: ...
    @property
    def codes(self) -> npt.NDArray[np.int8]: ...
    @property
    def scales(self) -> _Floats: ...
    @property
    def sums(self) -> npt.NDArray[np.int32]: ...

def pack_weight(
    codes: _Matrix, scale: _Floats, group_size: int, bits: int, pool: ThreadPool | None = None, isa: str = ""
) -> PackedWeight: ...
def pack_float(weight: _Matrix, pool: ThreadPool | None = None, isa: str = "") -> FloatWeight: ...
def gemm(
    weight: PackedWeight,
    x: QuantizedRows,
    out: _Floats,
    bias: _Floats | None = None,
    residual: _Floats | None = None,
    rows: _Span | None = None,
    panels: _Span | None = None,
    isa: str = "",
) -> None: ...
def gemm_float(
    weight: FloatWeight | PackedWeight,
    x: _Floats,
    out: _Floats,
    bias: _Floats | None = None,
    residual: _Floats | None = None,
    rows: _Span | None = None,
    panels: _Span | None = None,
    isa: str = "",
) -> None: ...

class ThreadPool:
    def __init__(self, threads: int) -> None: ...
    @property
    def threads(self) -> int: ...

def peak_gops(pool: ThreadPool, isa: str = "") -> float: ...
def read_bandwidth(pool: ThreadPool, megabytes: int = 512) -> float: ...

class Embedding:
    def __init__(self, address: int, dtype: str, vocab: int, width: int) -> None: ...

class Norm:
    def __init__(self, weight: list[float], bias: list[float], eps: float, layer: bool) -> None: ...

class Linear:
    def __init__(
        self,
        name: str,
        packed: PackedWeight | None,
        float_weight: FloatWeight | None,
        bias: list[float],
        act: float | None,
    ) -> None: ...

class Attention:
    def __init__(
        self,
        layer: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        softmax_scale: float,
        sliding_window: int,
        rope_dim: int,
        rope_cos: int,
        rope_sin: int,
        rope_positions: int,
        alibi_slopes: list[float],
        sinks: list[float],
        softcap: float,
        q_norm: Norm | None,
        q_norm_own: bool,
        k_norm: Norm | None,
        k_norm_own: bool,
        norm_after_rope: bool,
    ) -> None: ...

class Program:
    def __init__(
        self,
        pool: ThreadPool,
        isa: str,
        *,
        max_tokens: int,
        max_seqs: int,
        max_logits_rows: int,
        max_model_len: int,
        num_blocks: int,
        block_size: int,
        kv_dtype: str,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
    ) -> None: ...
    @property
    def logits_width(self) -> int: ...
    @property
    def seconds(self) -> dict[str, float]: ...
    def work(self, tokens: int, rows: int) -> tuple[int, int]: ...
    def embed(self, table: Embedding) -> int: ...
    def embed_positions(self, table: Embedding) -> int: ...
    def norm(self, x: int, norm: Norm, act: float | None) -> int: ...
    def quantize(self, x: int, act: float | None) -> int: ...
    def linear(self, x: int, linear: Linear, residual: int | None) -> int: ...
    def activation(self, x: int, curve: str, gated: bool, limit: float, act: float | None) -> int: ...
    def add(self, x: int, y: int) -> int: ...
    def scale(self, x: int, factor: float) -> int: ...
    def softcap(self, x: int, cap: float) -> int: ...
    def rope_and_cache(self, qkv: int, attention: Attention) -> int: ...
    def attention(self, q: int, attention: Attention, act: float | None, selected: bool) -> int: ...
    def select_rows(self, x: int) -> int: ...
    def finish(self, logits: int) -> None: ...
    def step(self, batch: StepInput, logits: _Floats) -> None: ...

class Sampler:
    def __init__(self, pool: ThreadPool, isa: str) -> None: ...
    def run(self, logits: _Floats, batch: SampleInput, out: SampleOutput) -> None: ...

def contracts() -> dict[str, list[tuple[str, str, str]]]: ...
