"""Rope, the paged KV cache, and attention over it.

One arithmetic for every query row, however it came: keys are taken in chunks at absolute positions, chunks are summed
in ascending order into segments of four, segments in ascending order into the result.

A chunk of a row: scores in units of log 2 are s = q · k · scale; m = ceil(max s), p = 2^(s - m), l = Σ p, o = Σ p v.
Parts are joined by m' = max of both, l and o times 2^(m - m'). m is an integer, so these factors are powers of two and
scaling never rounds: which maximum a part was scaled to, and when, leaves no trace in the sums. l is summed in steps
of 2^-21, as integers; a sink joins it once, at the end. With an int8 cache, q · k is an integer; p · v's scale is
rounded to steps of 1 / 32512 of the largest of the row and chunk, and o is then a sum of integers too. Nothing is left
that a tile's shape, the hardware's instruction or the order of threads could change.

Float caches: q and p are taken as the sum of two bf16 numbers (bf16), or products are float32 (float32). Their sums
are the hardware's, in tiles that are the same whatever the step.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass, replace
from typing import Literal

import torch
import triton
import triton.language as tl

from fptq_runtime.config import KVCacheDtype
from fptq_runtime.errors import FptqError
from fptq_runtime.kernels.base import ActivationQuant, Array, AttentionSpec, StepLimits
from fptq_runtime.kernels.triton.device import capability, is_gpu
from fptq_runtime.kernels.triton.fused import (
    DYNAMIC,
    FLOAT,
    ROUND,
    ROUND_BITS,
    DeviceNorm,
    codes_of,
    floats,
    is_fp8,
    mode_of,
    octets,
    prepare_norm,
    quantize,
    result,
    tanh,
    token_scale,
)
from fptq_runtime.kernels.triton.sums import Sums, arguments, summed
from fptq_runtime.kernels.triton.values import DeviceBatch, Quantized, interpreted

SEGMENT = 4  # chunks; with 128 keys each, 32 k tokens are 64 parts to join
P_STEPS = tl.constexpr(2097152.0)  # 2^21, so that p · 2^21 + 1.5 · 2^23 keeps the integer in its mantissa
VALUE_STEPS = tl.constexpr(32512.0)  # 127 · 256: the high byte of a rounded weight stays within int8
TINY = tl.constexpr(2.0**-80)  # below, sums may have lost parts; the result is 0

_FEW_TILES = 264  # two programs for each of an H100's processors
_FEW_SEQUENCES = 64  # up to so many share a compilation

_TYPES: dict[KVCacheDtype, torch.dtype] = {"int8": torch.int8, "bf16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class DeviceAttention:
    spec: AttentionSpec  # its numbers; its arrays are these:
    rope: tuple[torch.Tensor, torch.Tensor] | None  # float32 [max positions, R / 2]
    slopes: torch.Tensor | None  # float32 [num_heads], times log2 e
    q_norm: DeviceNorm | None
    k_norm: DeviceNorm | None
    sinks: torch.Tensor | None  # float32 [num_heads], times log2 e

    @property
    def rotated(self) -> int:
        """Dimensions of a head that rope turns; 0 without rope."""
        return 0 if self.rope is None else 2 * self.rope[0].shape[1]


class DeviceCache:
    """Keys and values of every layer. An int8 cache holds values dimension by dimension, so that the sum over keys
    runs along memory, as integer tensor cores ask, and one float scale a token, KV head and K or V."""

    def __init__(self, limits: StepLimits, device: torch.device) -> None:
        """Raises FptqError where a block is not a power of two of at least 16 tokens."""
        size, dim = limits.block_size, limits.head_dim
        if size < 16 or size & (size - 1):
            raise FptqError(f"the GPU's KV cache needs blocks of a power of two, 16 tokens or more, not {size}",
                            "block_size")
        self.dtype: KVCacheDtype = limits.kv_dtype
        self.block_size = size
        self.parts_bytes = parts_bytes(device)
        pages = (limits.num_layers, limits.num_blocks, limits.num_kv_heads)
        values = (*pages, dim, size) if limits.kv_dtype == "int8" else (*pages, size, dim)
        self.keys = torch.zeros((*pages, size, dim), dtype=_TYPES[limits.kv_dtype], device=device)
        self.values = torch.zeros(values, dtype=_TYPES[limits.kv_dtype], device=device)
        scales = (*pages, size) if limits.kv_dtype == "int8" else (limits.num_layers, 4)  # unread, aligned alike
        self.key_scales = torch.zeros(scales, dtype=torch.float32, device=device)
        self.value_scales = torch.zeros(scales, dtype=torch.float32, device=device)


def parts_bytes(device: torch.device) -> int:
    """The most memory for the parts of one call's split sums: a 32nd of the device's, which is 256 sequences of 500 k
    tokens on an H200, or 128 of 180 k with 24 GB."""
    return int(torch.cuda.get_device_properties(device).total_memory) >> 5 if is_gpu(device) else 4 << 30


def part_bytes(rows: int, heads: int, head_dim: int, kv_dtype: KVCacheDtype, max_seq_len: int) -> int:
    """Of so many rows, all of a context's segments."""
    return 4 * rows * heads * -(-max_seq_len // (SEGMENT * chunk_keys(kv_dtype, head_dim))) * (head_dim + 2)


def cache_bytes_per_token(kv_dtype: KVCacheDtype, num_layers: int, num_kv_heads: int, head_dim: int) -> int:
    """Of K and V together."""
    per_head = head_dim * _TYPES[kv_dtype].itemsize + (4 if kv_dtype == "int8" else 0)
    return 2 * num_layers * num_kv_heads * per_head


def prepare_attention(spec: AttentionSpec, device: torch.device,
                      shared: dict[int, tuple[Array, torch.Tensor]] | None = None) -> DeviceAttention:
    """`shared` keeps tables on the device by their arrays' id, so that layers with the same rope hold it once.

    Raises FptqError for an odd head_dim.
    """
    if spec.head_dim % 2:
        raise FptqError(f"head_dim {spec.head_dim} is odd")
    tables = {} if shared is None else shared
    rope = None if spec.rope is None else (_table(spec.rope[0], tables, device), _table(spec.rope[1], tables, device))
    q_norm, k_norm = (None if norm is None else prepare_norm(norm, device) for norm in (spec.q_norm, spec.k_norm))
    return DeviceAttention(spec, rope, _in_log2(spec.alibi_slopes, device), q_norm, k_norm,
                           _in_log2(spec.sinks, device))


def _table(array: Array, tables: dict[int, tuple[Array, torch.Tensor]], device: torch.device) -> torch.Tensor:
    if id(array) not in tables:
        tables[id(array)] = array, floats(array, device)  # with the array, so that nothing else gets its id
    return tables[id(array)][1]


def _in_log2(array: Array | None, device: torch.device) -> torch.Tensor | None:
    return None if array is None else floats(array, device) * math.log2(math.e)


Span = Literal["none", "shared", "own", "row"]


def _span(norm: DeviceNorm | None, head_dim: int) -> Span:
    """What a q/k norm takes together: a head, by a weight that heads share or by its own; or all heads, as one row."""
    if norm is None:
        return "none"
    if norm.weight.ndim == 2:
        return "own"
    return "shared" if norm.weight.numel() == head_dim else "row"


def rope_and_cache(qkv: torch.Tensor | Sums, attention: DeviceAttention, cache: DeviceCache,
                   batch: DeviceBatch) -> torch.Tensor | Quantized:
    """Split q | k | v rows float32 [M, (heads + 2 · kv heads) · dim], q/k norm, rope, write k and v to their slots (-1:
    nothing). Returns q for `attention`: float32 [M, heads · dim], or codes with scales [M, heads] for an int8 cache."""
    spec = attention.spec
    device = batch.positions.device
    rows, heads, kv_heads, dim = qkv.shape[0], spec.num_heads, spec.num_kv_heads, spec.head_dim
    int8 = cache.dtype == "int8"
    q = torch.empty((rows, heads * dim), dtype=torch.int8 if int8 else torch.float32, device=device)
    q_scale = torch.empty((rows, heads) if int8 else (1,), dtype=torch.float32, device=device)
    half = triton.next_power_of_2(dim // 2)
    q_norm, k_norm = attention.q_norm, attention.k_norm
    spans = _span(q_norm, dim), _span(k_norm, dim)
    by_row = "row" in spans
    if by_row:
        tile = triton.next_power_of_2(max(heads, kv_heads))
        programs, warps = 3 * rows, min(max(tile * half // 512, 4), 16)
    else:
        tile, warps = 2048 // half if interpreted() else max(512 // half, 1), 4
        programs = triton.cdiv(rows * heads, tile) + 2 * triton.cdiv(rows * kv_heads, tile)
    cos, sin = attention.rope or (q, q)
    if rows:
        _rope_and_cache_kernel[(programs,)](
            **arguments(qkv), positions=batch.positions, slots=batch.slot_mapping, cos=cos, sin=sin,
            q_weight=q if q_norm is None else q_norm.weight, q_bias=None if q_norm is None else q_norm.bias,
            q_eps=0.0 if q_norm is None else q_norm.eps,
            k_weight=q if k_norm is None else k_norm.weight, k_bias=None if k_norm is None else k_norm.bias,
            k_eps=0.0 if k_norm is None else k_norm.eps,
            q_out=q, q_scale=q_scale, keys=cache.keys[spec.layer], key_scales=cache.key_scales[spec.layer],
            values=cache.values[spec.layer], value_scales=cache.value_scales[spec.layer], HEADS=heads,
            KV_HEADS=kv_heads, DIM=dim, HALF=half, TILE=tile, BY_ROW=by_row, BLOCK_SIZE=cache.block_size,
            ROPE=attention.rotated, Q_NORM=spans[0], K_NORM=spans[1],
            Q_LAYER=q_norm is not None and q_norm.kind == "layer",
            K_LAYER=k_norm is not None and k_norm.kind == "layer",
            NORM_LAST=spec.norm_after_rope, KV=cache.dtype, num_warps=warps, enable_fp_fusion=False)
    return Quantized(q, q_scale) if int8 else q


@dataclass(frozen=True)
class Tiling:
    """How a call is cut up; neither may change a row's bits."""

    rows: int  # query tokens times query heads of a tile
    heads: int  # of one KV head that share a tile
    split: bool  # a segment to a program, joined by a second kernel
    warps: int
    stages: int


def chunk_keys(kv_dtype: KVCacheDtype, head_dim: int) -> int:
    """Keys of a chunk: a function of the cache alone, for a row's bits depend on it."""
    if kv_dtype == "float32":
        return 32
    return 64 if kv_dtype == "bf16" or head_dim > 128 else 128


def choose_tiling(attention: DeviceAttention, cache: DeviceCache, rows: int, sequences: int, max_query_len: int,
                  max_seq_len: int) -> Tiling:
    """From the host's integers alone. Small tiles where a step decodes, large ones where keys are read by many rows.

    Splits where tiles are too few to fill the machine, or one long sequence would keep a few programs busy after all
    others are done; not where that takes too much memory."""
    spec = attention.spec
    group = spec.num_heads // spec.num_kv_heads
    segments = triton.cdiv(max_seq_len, SEGMENT * chunk_keys(cache.dtype, spec.head_dim))
    held = part_bytes(rows, spec.num_heads, spec.head_dim, cache.dtype, max_seq_len) <= cache.parts_bytes
    wide = spec.head_dim > 128
    if cache.dtype != "int8":  # one shape for all steps
        tile, warps, stages = (16, 4, 1) if cache.dtype == "float32" else (32, 8 if wide else 4, 2)
    elif max_query_len <= _decoding(spec):
        tile, warps, stages = 16, 4, 5
    else:
        wgmma = capability(cache.keys.device) >= 90  # tiles of 64 rows, 16 a warp: more warps would repeat them
        tile, warps, stages = 64 if wgmma and not wide else 32, 8 if wide else 4, 2
    heads = _divisor(group, tile if cache.dtype != "int8" else 64)
    tile = max(tile, triton.next_power_of_2(heads))
    tiles = sequences if max_query_len <= tile // heads else rows // (tile // heads) + sequences
    busy = tiles * (spec.num_heads // heads) >= _FEW_TILES and max_query_len * heads > 16
    return Tiling(tile, heads, segments > 1 and held and not busy, warps, stages)


def _decoding(spec: AttentionSpec) -> int:
    """Up to so many tokens of a sequence fit a decoding tile."""
    return 16 // min(spec.num_heads // spec.num_kv_heads, 16)


def attention(q: torch.Tensor | Quantized, attention: DeviceAttention, cache: DeviceCache, batch: DeviceBatch,
              act: ActivationQuant | None, tiling: Tiling | None = None) -> torch.Tensor | Quantized:
    """Paged causal attention of what `rope_and_cache` returned, then quantize. [M, heads · dim]; padded rows are 0.
    Sequences that decode beside prompts have a launch of their own.

    tiling: what to run instead of `choose_tiling`'s, for tests and measurements; float caches' bits depend on `rows`.
    """
    spec = attention.spec
    codes = q.codes if isinstance(q, Quantized) else q
    rows, sequences, lengths = codes.shape[0], batch.seq_lens.shape[0], batch.query_lens
    width = spec.num_heads * spec.head_dim
    if not rows or not sequences:
        return quantize(torch.zeros((rows, width), device=codes.device), act)
    decoding = bisect_right(lengths, _decoding(spec)) if tiling is None and cache.dtype == "int8" else 0
    if not 0 < decoding < len(lengths):
        return _attend(q, attention, cache, batch, act, tiling, None, 0)
    out = torch.zeros((rows, width), dtype=torch.float32, device=codes.device)
    first = sum(lengths[:decoding])
    for part, of_sequences, of_rows, longest in (
            (slice(None, decoding), slice(None, decoding + 1), slice(None, first), lengths[decoding - 1]),
            (slice(decoding, None), slice(decoding, None), slice(first, None), batch.max_query_len)):
        own = replace(batch, positions=batch.positions[of_rows], slot_mapping=batch.slot_mapping[of_rows],
                      query_start_loc=batch.query_start_loc[of_sequences], seq_lens=batch.seq_lens[part],
                      block_tables=batch.block_tables[part], max_query_len=longest)
        _attend(q, attention, cache, own, None, None, out, of_rows.start or 0)
    return quantize(out, act)


def _attend(q: torch.Tensor | Quantized, attention: DeviceAttention, cache: DeviceCache, batch: DeviceBatch,
            act: ActivationQuant | None, tiling: Tiling | None, out: torch.Tensor | None,
            first: int) -> torch.Tensor | Quantized:
    """One launch and, where it splits, a second. The batch has the rows from `first` on; `out` [M, heads · dim], zeros,
    gets them where it is given, and act is None."""
    spec = attention.spec
    heads, dim = spec.num_heads, spec.head_dim
    codes, q_scale = (q.codes, q.scale) if isinstance(q, Quantized) else (q, q)
    rows, sequences = batch.positions.shape[0], batch.seq_lens.shape[0]
    tiling = tiling or choose_tiling(attention, cache, rows, sequences, batch.max_query_len, batch.max_seq_len)
    chunk = chunk_keys(cache.dtype, dim)
    tokens = tiling.rows // tiling.heads
    one_tile = batch.max_query_len <= tokens
    tiles = sequences if one_tile else rows // tokens + sequences
    segments = triton.cdiv(max(batch.max_seq_len, 1), SEGMENT * chunk) if tiling.split else 1
    if tiling.split:
        target = torch.empty((rows, heads, segments, dim), dtype=torch.float32, device=codes.device)
        sums = torch.empty((rows, heads, segments, 2), dtype=torch.float32, device=codes.device)  # m, l
    else:
        target = sums = torch.zeros((rows, heads * dim), dtype=torch.float32, device=codes.device) if out is None \
            else out[first : first + rows]
    _attention_kernel[(tiles, heads // tiling.heads, segments)](
        q=codes[first:], q_scale=q_scale[first:], keys=cache.keys[spec.layer], key_scales=cache.key_scales[spec.layer],
        values=cache.values[spec.layer], value_scales=cache.value_scales[spec.layer], block_tables=batch.block_tables,
        query_start_loc=batch.query_start_loc, seq_lens=batch.seq_lens,
        slopes=codes if attention.slopes is None else attention.slopes, sinks=attention.sinks, out=target, sums=sums,
        scale=spec.softmax_scale / spec.softcap if spec.softcap else spec.softmax_scale * math.log2(math.e),
        cap=(spec.softcap or 0.0) * math.log2(math.e), sequences=sequences,
        table_stride=batch.block_tables.stride(0),
        HEADS=heads, KV_HEADS=spec.num_kv_heads, TILE_HEADS=tiling.heads, DIM=dim,
        WIDTH=max(triton.next_power_of_2(dim), 32), BLOCK_SIZE=cache.block_size, CHUNK=chunk, SEGMENT=SEGMENT,
        ROWS=tiling.rows, SEQUENCES=1 if one_tile else max(triton.next_power_of_2(sequences), _FEW_SEQUENCES),
        WINDOW=spec.sliding_window or 0, ALIBI=attention.slopes is not None, SOFTCAP=spec.softcap is not None,
        KV=cache.dtype, ONE_TILE=one_tile, SPLIT=tiling.split, AS_FLOAT=interpreted(), STAGES=tiling.stages,
        num_warps=tiling.warps, enable_fp_fusion=False)
    if not tiling.split:
        return target if out is not None else quantize(target, act)
    return _merged(target, sums, attention, batch, SEGMENT * chunk, act, None if out is None else out[first:])


def _merged(parts: torch.Tensor, sums: torch.Tensor, attention: DeviceAttention, batch: DeviceBatch, segment: int,
            act: ActivationQuant | None, out: torch.Tensor | None) -> torch.Tensor | Quantized:
    """Join the segments of each row, into `out` where it is given. One program joins and quantizes a row where that is
    little to read."""
    rows, heads, segments, dim = parts.shape
    whole_row = segments * heads * dim <= 1 << 16 and (act is not None and act.scale is None)
    tile = heads if whole_row or interpreted() else 1
    now = act if whole_row or (act is not None and act.scale is not None) else None
    made, scale = result(rows, heads * dim, now, parts.device) if out is None else (out, out)
    _merge_kernel[(rows, heads // tile)](
        parts=parts, sums=sums, positions=batch.positions, slots=batch.slot_mapping, slopes=attention.slopes,
        sinks=attention.sinks, out=octets(made), scale=scale, segments=segments, HEADS=heads, TILE=tile,
        PADDED=triton.next_power_of_2(tile), DIM=dim, WIDTH=triton.next_power_of_2(dim),
        SEGMENTS=triton.next_power_of_2(segments), SEGMENT_KEYS=segment, WINDOW=attention.spec.sliding_window or 0,
        MODE=mode_of(now), FP8=is_fp8(now), num_warps=8 if whole_row else 2, enable_fp_fusion=False)
    return quantize(made, act) if now is None else Quantized(made, scale)


def attention_bytes(attention: DeviceAttention, kv_dtype: KVCacheDtype, query_lens: list[int],
                    seq_lens: list[int]) -> int:
    """What a call must read and write at least: each visible key and value once, q, and a float32 result."""
    spec = attention.spec
    window = spec.sliding_window
    keys = sum(length if window is None else min(length, window + rows - 1)
               for rows, length in zip(query_lens, seq_lens, strict=True))
    q_bytes = spec.head_dim + 4 if kv_dtype == "int8" else 4 * spec.head_dim
    return (keys * cache_bytes_per_token(kv_dtype, 1, spec.num_kv_heads, spec.head_dim)
            + sum(query_lens) * spec.num_heads * (q_bytes + 4 * spec.head_dim))


def rope_and_cache_bytes(attention: DeviceAttention, kv_dtype: KVCacheDtype, rows: int) -> int:
    """What a call must read and write at least: q | k | v rows, cos and sin, q again, the cache's new rows."""
    spec = attention.spec
    q_bytes = spec.head_dim + 4 if kv_dtype == "int8" else 4 * spec.head_dim
    read = 4 * ((spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim + attention.rotated)
    return rows * (read + spec.num_heads * q_bytes
                   + cache_bytes_per_token(kv_dtype, 1, spec.num_kv_heads, spec.head_dim))


def _divisor(group: int, most: int) -> int:
    """The largest that divides the group into tiles."""
    return max(heads for heads in range(1, min(group, most) + 1) if group % heads == 0)


@triton.jit
def _rounded_bf16(x):
    """Half to even, so that the cast is exact: the interpreter's truncates."""
    bits = x.to(tl.int32, bitcast=True)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
    return tl.where(x == x, rounded, x)


@triton.jit
def _pairs(DIM: tl.constexpr, HALF: tl.constexpr, ROPE: tl.constexpr):
    """The two dimensions of each of DIM / 2 pairs, [HALF]: those that rope turns together come first."""
    low = tl.arange(0, HALF)
    high = low + DIM // 2
    if ROPE > 0 and ROPE < DIM:
        turned = low < ROPE // 2
        low += tl.where(turned, 0, ROPE // 2)
        high = low + tl.where(turned, ROPE // 2, (DIM - ROPE) // 2)
    return low, high


@triton.jit
def _total(x, SPAN: tl.constexpr):
    """Of each head [TILE, HALF], or of the whole row that they are. [TILE]"""
    total = tl.sum(x, 1)
    if SPAN == "row":
        total = tl.zeros_like(total) + tl.sum(total, 0)
    return total


@triton.jit
def _normalised(first, second, weight, bias, eps, head, mask, low, high, DIM: tl.constexpr, HEADS: tl.constexpr,
                SPAN: tl.constexpr, LAYER: tl.constexpr):
    if SPAN != "none":
        COUNT: tl.constexpr = HEADS * DIM if SPAN == "row" else DIM
        if LAYER:
            mean = (_total(first + second, SPAN) / COUNT)[:, None]
            first, second = tl.where(mask, first - mean, 0.0), tl.where(mask, second - mean, 0.0)
        mean = _total(first * first + second * second, SPAN) / COUNT
        factor = tl.div_rn(mean * 0.0 + 1.0, tl.sqrt_rn(mean + eps))[:, None]
        own = head * (0 if SPAN == "shared" else DIM)
        low_at, high_at = own[:, None] + low[None, :], own[:, None] + high[None, :]
        first = first * factor * tl.load(weight + low_at, mask=mask, other=0.0)
        second = second * factor * tl.load(weight + high_at, mask=mask, other=0.0)
        if bias is not None:
            first += tl.load(bias + low_at, mask=mask, other=0.0)
            second += tl.load(bias + high_at, mask=mask, other=0.0)
    return first, second


@triton.jit
def _load_halves(y_sums, y_row_scale, y_x_scale, y_bias, y_residual, rows, positions, cos, sin, weight, bias, eps, row,
                 head, real, low, high, FIRST: tl.constexpr,
                 HEADS: tl.constexpr, ALL: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr, ROPE: tl.constexpr,
                 SPAN: tl.constexpr, LAYER: tl.constexpr, NORM_LAST: tl.constexpr, SEGMENTS: tl.constexpr,
                 UNIT: tl.constexpr, X_SCALE: tl.constexpr):
    """Both of each pair [TILE, HALF] of the rows' heads, counted from FIRST of ALL, after norm and rope."""
    columns = tl.arange(0, HALF)
    mask = real[:, None] & (columns < DIM // 2)[None, :]
    column = ((FIRST + head) * DIM)[:, None]
    m = tl.where(real, row, 0)[:, None]
    first = summed(m, column + low[None, :], mask, y_sums, y_row_scale, y_x_scale, y_bias, y_residual, rows, ALL * DIM,
                   SEGMENTS, UNIT, X_SCALE)
    second = summed(m, column + high[None, :], mask, y_sums, y_row_scale, y_x_scale, y_bias, y_residual, rows,
                    ALL * DIM, SEGMENTS, UNIT, X_SCALE)
    if not NORM_LAST:
        first, second = _normalised(first, second, weight, bias, eps, head, mask, low, high, DIM, HEADS, SPAN, LAYER)
    if ROPE:
        position = tl.load(positions + row, mask=real, other=0).to(tl.int64)
        at = (position * (ROPE // 2))[:, None] + columns[None, :]
        turned = mask & (columns < ROPE // 2)[None, :]
        c = tl.load(cos + at, mask=turned, other=0.0)
        s = tl.load(sin + at, mask=turned, other=0.0)
        if ROPE == DIM:
            first, second = first * c - second * s, second * c + first * s
        else:
            first, second = (tl.where(turned, first * c - second * s, first),
                             tl.where(turned, second * c + first * s, second))
    if NORM_LAST:
        first, second = _normalised(first, second, weight, bias, eps, head, mask, low, high, DIM, HEADS, SPAN, LAYER)
    return first, second


@triton.jit
def _store_halves(first, second, target, scales, low, high, mask, real, STRIDE: tl.constexpr, KV: tl.constexpr):
    """To `target` [TILE], where dimensions lie STRIDE apart, in a cache's type."""
    low_at, high_at = target[:, None] + low[None, :] * STRIDE, target[:, None] + high[None, :] * STRIDE
    if KV == "int8":
        scale = tl.maximum(token_scale(first, 1, False), token_scale(second, 1, False),
                           propagate_nan=tl.PropagateNan.ALL)
        tl.store(scales, scale, mask=real)
        wide = tl.zeros_like(first) + scale[:, None]
        tl.store(low_at, codes_of(first, wide, False), mask=mask)
        tl.store(high_at, codes_of(second, wide, False), mask=mask)
    else:
        if KV == "bf16":
            first, second = _rounded_bf16(first).to(tl.bfloat16), _rounded_bf16(second).to(tl.bfloat16)
        tl.store(low_at, first, mask=mask)
        tl.store(high_at, second, mask=mask)


@triton.jit
def _rows_and_heads(tile, TILE: tl.constexpr, HEADS: tl.constexpr, BY_ROW: tl.constexpr):
    """Of a program, [TILE]: the heads of one row, or so many pairs of a row and a head. Beyond HEADS is none."""
    index = tl.arange(0, TILE)
    if BY_ROW:
        row, head = tile.to(tl.int64) + index * 0, index.to(tl.int64)
    else:
        pair = tile.to(tl.int64) * TILE + index
        row, head = pair // HEADS, pair % HEADS
    return row, head


@triton.jit(do_not_specialize=["rows"])
def _rope_and_cache_kernel(
    y_sums, y_row_scale, y_x_scale, y_bias, y_residual, rows, positions, slots, cos, sin, q_weight, q_bias, q_eps,
    k_weight, k_bias, k_eps, q_out, q_scale, keys, key_scales, values, value_scales, SEGMENTS: tl.constexpr,
    UNIT: tl.constexpr, X_SCALE: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr,
    HALF: tl.constexpr, TILE: tl.constexpr, BY_ROW: tl.constexpr, BLOCK_SIZE: tl.constexpr, ROPE: tl.constexpr,
    Q_NORM: tl.constexpr, K_NORM: tl.constexpr, Q_LAYER: tl.constexpr, K_LAYER: tl.constexpr, NORM_LAST: tl.constexpr,
    KV: tl.constexpr,
):
    """A program takes heads of q, or of k, or of v."""
    ALL: tl.constexpr = HEADS + 2 * KV_HEADS
    q_tiles = rows if BY_ROW else tl.cdiv(rows * HEADS, TILE)
    kv_tiles = rows if BY_ROW else tl.cdiv(rows * KV_HEADS, TILE)
    tile = tl.program_id(0)
    low, high = _pairs(DIM, HALF, ROPE)
    inside = (tl.arange(0, HALF) < DIM // 2)[None, :]
    if tile < q_tiles:
        row, head = _rows_and_heads(tile, TILE, HEADS, BY_ROW)
        real = (row < rows) & (head < HEADS)
        first, second = _load_halves(
            y_sums, y_row_scale, y_x_scale, y_bias, y_residual, rows, positions, cos, sin, q_weight, q_bias, q_eps, row,
            head, real, low, high, FIRST=0, HEADS=HEADS, ALL=ALL, DIM=DIM, HALF=HALF, ROPE=ROPE, SPAN=Q_NORM,
            LAYER=Q_LAYER, NORM_LAST=NORM_LAST, SEGMENTS=SEGMENTS, UNIT=UNIT, X_SCALE=X_SCALE)
        at = row * HEADS + head
        _store_halves(first, second, q_out + at * DIM, q_scale + at, low, high, real[:, None] & inside, real, 1,
                      "int8" if KV == "int8" else "float32")
    else:
        is_key = tile < q_tiles + kv_tiles
        row, head = _rows_and_heads(tile - q_tiles - tl.where(is_key, 0, kv_tiles), TILE, KV_HEADS, BY_ROW)
        slot = tl.load(slots + row, mask=(row < rows) & (head < KV_HEADS), other=-1)
        real = slot >= 0
        mask = real[:, None] & inside
        block = (slot // BLOCK_SIZE).to(tl.int64) * KV_HEADS + head
        token = block * BLOCK_SIZE + slot % BLOCK_SIZE
        if is_key:
            first, second = _load_halves(
                y_sums, y_row_scale, y_x_scale, y_bias, y_residual, rows, positions, cos, sin, k_weight, k_bias, k_eps,
                row, head, real, low, high, FIRST=HEADS, HEADS=KV_HEADS, ALL=ALL, DIM=DIM, HALF=HALF, ROPE=ROPE,
                SPAN=K_NORM, LAYER=K_LAYER, NORM_LAST=NORM_LAST, SEGMENTS=SEGMENTS, UNIT=UNIT, X_SCALE=X_SCALE)
            _store_halves(first, second, keys + token * DIM, key_scales + token, low, high, mask, real, 1, KV)
        else:
            first, second = _load_halves(
                y_sums, y_row_scale, y_x_scale, y_bias, y_residual, rows, positions, cos, sin, k_weight, k_bias, k_eps,
                row, head, real, low, high, FIRST=HEADS + KV_HEADS, HEADS=KV_HEADS, ALL=ALL, DIM=DIM, HALF=HALF, ROPE=0,
                SPAN="none", LAYER=False, NORM_LAST=False, SEGMENTS=SEGMENTS, UNIT=UNIT, X_SCALE=X_SCALE)
            if KV == "int8":
                _store_halves(first, second, values + block * (DIM * BLOCK_SIZE) + slot % BLOCK_SIZE,
                              value_scales + token, low, high, mask, real, BLOCK_SIZE, KV)
            else:
                _store_halves(first, second, values + token * DIM, value_scales + token, low, high, mask, real, 1, KV)


@triton.jit
def _power_of_two(x):
    """2^x, exactly, for integral x <= 0 or -inf; 0 below 2^-126."""
    return ((tl.maximum(x, -127.0).to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _float_dot(a, b, acc, KV: tl.constexpr, AS_FLOAT: tl.constexpr):
    """a [.., K] float32 · b [K, ..] of the cache's type."""
    if KV == "float32":
        acc = tl.dot(a, b, acc, input_precision="ieee")
    else:
        high = (a.to(tl.int32, bitcast=True) & -0x10000).to(tl.float32, bitcast=True)
        low = ((a - high).to(tl.int32, bitcast=True) & -0x10000).to(tl.float32, bitcast=True)
        if AS_FLOAT:  # the interpreter has no product of bfloat16
            acc = tl.dot(low, b.to(tl.float32), tl.dot(high, b.to(tl.float32), acc))
        else:
            acc = tl.dot(low.to(tl.bfloat16), b, tl.dot(high.to(tl.bfloat16), b, acc))
    return acc


@triton.jit
def _segment_sums(
    query, row_scale, slope, position, begin, end, length, kv_head, table, keys, key_scales, values, value_scales,
    scale, cap, KV_HEADS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, WINDOW: tl.constexpr, ALIBI: tl.constexpr, SOFTCAP: tl.constexpr,
    KV: tl.constexpr, AS_FLOAT: tl.constexpr, STAGES: tl.constexpr,
):
    """m, l [ROWS] and o [ROWS, WIDTH] of chunks begin to end; l in steps of 1 / P_STEPS.

    query [ROWS, WIDTH] at `position` [ROWS], of which -1 sees nothing. row_scale: of an int8 query, times scale.
    SOFTCAP: scores are cap · tanh of what scale makes of them.
    """
    INT8: tl.constexpr = KV == "int8"
    RUN: tl.constexpr = 16  # keys that lie side by side, for any block size
    d = tl.arange(0, WIDTH)
    m = tl.full([ROWS], float("-inf"), tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    o = tl.zeros([ROWS, WIDTH], tl.float32)
    for chunk in tl.range(begin, end, num_stages=STAGES):
        key = chunk * CHUNK + tl.arange(0, CHUNK)
        in_cache = key < length
        block = tl.load(table + key // BLOCK_SIZE, mask=key // BLOCK_SIZE * BLOCK_SIZE < length, other=0)
        block = block.to(tl.int64) * KV_HEADS + kv_head
        offset = key % BLOCK_SIZE
        page = tl.max_contiguous(tl.multiple_of(block * BLOCK_SIZE + offset, RUN), RUN)
        visible = key[None, :] <= position[:, None]
        if WINDOW:
            visible = visible & (key[None, :] > position[:, None] - WINDOW)
        k_at = keys + page[None, :] * DIM + d[:, None]
        if INT8:
            k = tl.load(k_at) if DIM == WIDTH else tl.load(k_at, mask=(d < DIM)[:, None], other=0)
            key_scale = tl.load(key_scales + page, mask=in_cache, other=0.0)
            s = tl.dot(query, k, out_dtype=tl.int32).to(tl.float32) * key_scale[None, :] * row_scale[:, None]
        else:  # a float cache may hold NaN where nothing was written for this sequence
            k = tl.load(k_at, mask=(d < DIM)[:, None] & in_cache[None, :], other=0.0)
            s = _float_dot(query, k, tl.zeros([ROWS, CHUNK], tl.float32), KV, AS_FLOAT) * scale
        if SOFTCAP:
            s = tanh(s) * cap
        if ALIBI:  # counted from the query: a row's constant changes nothing, and these are small where weights are not
            s += slope[:, None] * (key[None, :] - position[:, None]).to(tl.float32)
        s = tl.where(visible, s, float("-inf"))
        m_chunk = tl.ceil(tl.max(s, 1))
        p = tl.exp2(s - tl.where(m_chunk == float("-inf"), 0.0, m_chunk)[:, None])
        steps = tl.fma(p, tl.full(p.shape, P_STEPS, tl.float32), tl.full(p.shape, ROUND, tl.float32))
        mass_chunk = tl.sum(steps.to(tl.int32, bitcast=True) - ROUND_BITS, 1).to(tl.float32)
        m, old, new = _joined(m, m_chunk)
        mass = mass * old + mass_chunk * new
        if INT8:
            v_run = tl.max_contiguous(tl.multiple_of(block * (BLOCK_SIZE * DIM) + offset, RUN), RUN)
            v_at = values + v_run[:, None] + d[None, :] * BLOCK_SIZE
            v = tl.load(v_at) if DIM == WIDTH else tl.load(v_at, mask=(d < DIM)[None, :], other=0)
            value_scale = tl.load(value_scales + page, mask=in_cache, other=0.0)
            w = p * value_scale[None, :]
            largest = tl.max(w.to(tl.int32, bitcast=True), 1).to(tl.float32, bitcast=True)  # as integers: NaN stays
            inverse = tl.div_rn(largest * 0.0 + VALUE_STEPS, tl.where(largest == 0.0, 1.0, largest))
            steps = tl.fma(w, tl.zeros_like(w) + inverse[:, None], tl.full(w.shape, ROUND, tl.float32))
            weight = steps.to(tl.int32, bitcast=True) - ROUND_BITS
            high = (weight + 128) >> 8
            total = tl.dot(high.to(tl.int8), v, out_dtype=tl.int32) * 256
            total = tl.dot((weight - high * 256).to(tl.int8), v, total, out_dtype=tl.int32)
            factor = tl.div_rn(largest, largest * 0.0 + VALUE_STEPS) * new
            o = tl.fma(total.to(tl.float32), tl.zeros_like(o) + factor[:, None], o * old[:, None])
        else:
            v = tl.load(values + page[:, None] * DIM + d[None, :], mask=in_cache[:, None] & (d < DIM)[None, :],
                        other=0.0)
            o_chunk = _float_dot(p, v, tl.zeros([ROWS, WIDTH], tl.float32), KV, AS_FLOAT)
            o = o * old[:, None] + o_chunk * new[:, None]
    return m, mass, o


@triton.jit(do_not_specialize=["sequences", "table_stride"],
            do_not_specialize_on_alignment=["q_scale", "block_tables", "query_start_loc", "seq_lens"])
def _attention_kernel(
    q, q_scale, keys, key_scales, values, value_scales, block_tables, query_start_loc, seq_lens, slopes, sinks, out,
    sums, scale, cap, sequences, table_stride, HEADS: tl.constexpr, KV_HEADS: tl.constexpr,
    TILE_HEADS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK_SIZE: tl.constexpr, CHUNK: tl.constexpr,
    SEGMENT: tl.constexpr, ROWS: tl.constexpr, SEQUENCES: tl.constexpr, WINDOW: tl.constexpr, ALIBI: tl.constexpr,
    SOFTCAP: tl.constexpr, KV: tl.constexpr, ONE_TILE: tl.constexpr, SPLIT: tl.constexpr, AS_FLOAT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A program takes TOKENS query tokens of a sequence times TILE_HEADS query heads of one KV head. SPLIT: and one
    segment of keys, of which it leaves o and (m, l), each [rows, HEADS, segments]; else `out` is the result. Rows are
    counted from the first of these sequences."""
    TOKENS: tl.constexpr = ROWS // TILE_HEADS
    tile_head = tl.program_id(1)
    kv_head = tile_head // (HEADS // KV_HEADS // TILE_HEADS)
    origin = tl.load(query_start_loc)
    if ONE_TILE:
        sequence = tl.program_id(0)
        first_row = tl.load(query_start_loc + sequence) - origin
        first_token = 0
    else:  # sequence s has its tiles from its first row // TOKENS + s on; the last, which have most keys, first
        tile = tl.num_programs(0) - 1 - tl.program_id(0)
        index = tl.arange(0, SEQUENCES)
        starts = (tl.load(query_start_loc + index, mask=index < sequences, other=0) - origin) // TOKENS + index
        sequence = tl.sum(((starts <= tile) & (index < sequences)).to(tl.int32), 0) - 1
        first_row = tl.load(query_start_loc + sequence) - origin
        first_token = (tile - first_row // TOKENS - sequence) * TOKENS
    tokens = tl.load(query_start_loc + sequence + 1) - origin - first_row
    if first_token >= tokens:
        return
    length = tl.load(seq_lens + sequence)
    before = length - tokens
    begin = 0
    if WINDOW:
        begin = tl.maximum(before + first_token - WINDOW + 1, 0) // CHUNK
    end = (before + tl.minimum(first_token + TOKENS, tokens) - 1) // CHUNK + 1
    if SPLIT:
        begin = tl.maximum(begin, tl.program_id(2) * SEGMENT)
        end = tl.minimum(end, (tl.program_id(2) + 1) * SEGMENT)
        if begin >= end:
            return

    r = tl.arange(0, ROWS)
    d = tl.arange(0, WIDTH)
    token = first_token + r // TILE_HEADS
    head = tile_head * TILE_HEADS + r % TILE_HEADS
    valid = (r < TOKENS * TILE_HEADS) & (token < tokens)
    position = tl.where(valid, before + token, -1)
    row_head = (first_row + token).to(tl.int64) * HEADS + head
    inside = valid[:, None] & (d < DIM)[None, :]
    query = tl.load(q + row_head[:, None] * DIM + d[None, :], mask=inside, other=0)
    row_scale = position.to(tl.float32)
    slope = row_scale
    if KV == "int8":
        row_scale = tl.load(q_scale + row_head, mask=valid, other=0.0) * scale
    if ALIBI:
        slope = tl.load(slopes + head, mask=valid, other=0.0)
    table = block_tables + sequence.to(tl.int64) * table_stride
    if SPLIT:
        m, mass, o = _segment_sums(
            query, row_scale, slope, position, begin, end, length, kv_head, table, keys, key_scales, values,
            value_scales, scale, cap, KV_HEADS=KV_HEADS, DIM=DIM, WIDTH=WIDTH, BLOCK_SIZE=BLOCK_SIZE, CHUNK=CHUNK,
            ROWS=ROWS, WINDOW=WINDOW, ALIBI=ALIBI, SOFTCAP=SOFTCAP, KV=KV, AS_FLOAT=AS_FLOAT, STAGES=STAGES)
        part = row_head * tl.num_programs(2) + tl.program_id(2)
        tl.store(sums + part * 2, m, mask=valid)
        tl.store(sums + part * 2 + 1, mass, mask=valid)
        tl.store(out + part[:, None] * DIM + d[None, :], o, mask=inside)
    else:
        target = out + row_head[:, None] * DIM + d[None, :]
        m_all = tl.full([ROWS], float("-inf"), tl.float32)
        mass_all = tl.zeros([ROWS], tl.float32)
        for segment in range(begin // SEGMENT, (end + SEGMENT - 1) // SEGMENT):
            m, mass, o = _segment_sums(
                query, row_scale, slope, position, tl.maximum(begin, segment * SEGMENT),
                tl.minimum(end, (segment + 1) * SEGMENT), length, kv_head, table, keys, key_scales, values,
                value_scales, scale, cap, KV_HEADS=KV_HEADS, DIM=DIM, WIDTH=WIDTH, BLOCK_SIZE=BLOCK_SIZE, CHUNK=CHUNK,
                ROWS=ROWS, WINDOW=WINDOW, ALIBI=ALIBI, SOFTCAP=SOFTCAP, KV=KV, AS_FLOAT=AS_FLOAT, STAGES=STAGES)
            m_all, old, new = _joined(m_all, m)
            mass_all = mass_all * old + mass * new
            tl.debug_barrier()
            o_all = tl.load(target, mask=inside, other=0.0) * old[:, None] + o * new[:, None]  # for want of registers
            if (segment + 1) * SEGMENT >= end:
                if sinks is not None:
                    sink = tl.load(sinks + head, mask=valid, other=0.0)
                    if ALIBI:
                        sink -= slope * position.to(tl.float32)
                    mass_all = _with_sink(mass_all, m_all, sink)
                o_all = _result(o_all, mass_all)
            tl.debug_barrier()
            tl.store(target, o_all, mask=inside)


@triton.jit
def _joined(m, other):
    """The maximum of both, and the factors of what was summed under each. Products with them are exact."""
    both = tl.maximum(m, other)
    reference = tl.where(both == float("-inf"), 0.0, both)
    return both, _power_of_two(m - reference), _power_of_two(other - reference)


@triton.jit
def _with_sink(mass, m, sink):
    """l of all a row's keys and its head's sink, which is in units of log 2, counted from the query as ALiBi is."""
    return mass + tl.exp2(sink - tl.where(m == float("-inf"), 0.0, m)) * P_STEPS


@triton.jit
def _result(o, mass):
    """[ROWS, WIDTH] of o and l [ROWS]."""
    mass = tl.where(mass == 0.0, 1.0, mass)
    return tl.where(tl.abs(o) < TINY, 0.0, tl.div_rn(o * P_STEPS, tl.zeros_like(o) + mass[:, None]))


@triton.jit(do_not_specialize=["segments"], do_not_specialize_on_alignment=["positions", "slots"])
def _merge_kernel(
    parts, sums, positions, slots, slopes, sinks, out, scale, segments, HEADS: tl.constexpr, TILE: tl.constexpr,
    PADDED: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, SEGMENTS: tl.constexpr, SEGMENT_KEYS: tl.constexpr,
    WINDOW: tl.constexpr, MODE: tl.constexpr, FP8: tl.constexpr,
):
    """A program joins the segments of TILE heads of a row; those that hold no key for it were never written."""
    row = tl.program_id(0).to(tl.int64)
    heads = tl.arange(0, PADDED)
    d = tl.arange(0, WIDTH)
    index = tl.arange(0, SEGMENTS)
    position = tl.load(positions + row)
    first = 0
    if WINDOW:
        first = tl.maximum(position - WINDOW + 1, 0) // SEGMENT_KEYS
    end = tl.where(tl.load(slots + row) < 0, 0, position // SEGMENT_KEYS + 1)
    row_head = row * HEADS + tl.program_id(1) * TILE + heads
    real = heads < TILE
    inside = real[:, None] & (d < DIM)[None, :]
    written = real[:, None] & ((index >= first) & (index < end))[None, :]
    m = tl.max(tl.load(sums + (row_head[:, None] * segments + index[None, :]) * 2, mask=written,
                       other=float("-inf")), 1)
    m = tl.where(m == float("-inf"), 0.0, m)
    mass = tl.zeros([PADDED], tl.float32)
    o = tl.zeros([PADDED, WIDTH], tl.float32)
    for segment in tl.range(first, end, loop_unroll_factor=8):
        part = row_head * segments + segment
        factor = _power_of_two(tl.load(sums + part * 2, mask=real, other=0.0) - m)
        mass += tl.load(sums + part * 2 + 1, mask=real, other=0.0) * factor
        o += tl.load(parts + part[:, None] * DIM + d[None, :], mask=inside, other=0.0) * factor[:, None]
    if sinks is not None:
        head = tl.program_id(1) * TILE + heads
        sink = tl.load(sinks + head, mask=real, other=0.0)
        if slopes is not None:
            sink -= tl.load(slopes + head, mask=real, other=0.0) * position.to(tl.float32)
        mass = _with_sink(mass, m, sink)
    x = tl.where(inside & (end > 0), _result(o, mass), 0.0)
    target = out + row_head[:, None] * DIM + d[None, :]
    if MODE == FLOAT:
        tl.store(target, x, mask=inside)
    else:
        if MODE == DYNAMIC:
            row_scale = token_scale(x, None, FP8)
            tl.store(scale + row, row_scale)
        else:
            row_scale = tl.load(scale)
        tl.store(target, codes_of(x, tl.zeros_like(x) + row_scale, FP8), mask=inside)
