"""The draws of a SampleInput on the device.

What orders and counts is exact, so torch does it; sums of weights are float64 in an order that the vocabulary's size
alone decides, so that a draw does not depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl

from fptq_runtime.kernels.base import GREEDY_BELOW, SampleInput, SampleOutput
from fptq_runtime.kernels.triton.device import device_watched, is_gpu

CHUNK = 2048  # weights in one partial sum
WIDE = 8192  # at once, where one program reads all of a row
NUCLEUS = 1024  # the largest logits, in whose order top_p is looked for; of a larger nucleus the least is bisected
_BELOW_ALL = -(1 << 63)


class DeviceSample:
    """token_ids: int64 [D], on the device."""

    def __init__(self, token_ids: torch.Tensor, log_probabilities: Sequence[torch.Tensor],
                 reported: npt.NDArray[np.intp], batch: SampleInput) -> None:
        self.token_ids = token_ids
        self._reported = reported
        self._out = SampleOutput.empty(batch)
        self._width = log_probabilities[-1].shape[1] if log_probabilities else 0
        flat = torch.cat([part.double().flatten() for part in (token_ids, *log_probabilities)])
        self._device, on_gpu = flat.device, is_gpu(flat.device)
        self._copied = torch.cuda.Event() if on_gpu else None
        self._flat = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=on_gpu)
        self._flat.copy_(flat, non_blocking=True)
        if self._copied is not None:
            self._copied.record()

    def result(self) -> SampleOutput:
        if self._copied is not None:
            with device_watched(self._device):
                self._copied.synchronize()
        out, reported, width = self._out, self._reported, self._width
        sizes = out.token_ids.size, reported.size, reported.size * width
        ids, own, best_ids, values = np.split(self._flat.numpy(), np.cumsum(sizes))
        out.token_ids[:], out.logprobs[reported] = ids, own
        out.top_ids[reported, :width] = best_ids.reshape(reported.size, width)
        out.top_logprobs[reported, :width] = values.reshape(reported.size, width)
        return out


def sample(logits: torch.Tensor, batch: SampleInput) -> SampleOutput | DeviceSample:
    """kernels.base's contract, float32 logits [R, V] on any device. Waits for nothing."""
    if not batch.rows.size:
        return SampleOutput.empty(batch)
    vocab = logits.shape[1]
    reported = np.flatnonzero(batch.num_logprobs >= 0)
    random = np.flatnonzero((batch.token_ids < 0) & (batch.parameters["temperature"] >= GREEDY_BELOW))
    draws = _Draws.upload(batch, reported, random, logits.device)
    x = _masked(logits.index_select(0, draws.rows), batch)  # [D, V]
    peak, best = x.max(1)  # the first of equals; NaN where one is
    y = _adjusted(x, batch)
    if y is not x:
        peak_y, best = y.max(1)
        peak = torch.where(draws.token_ids >= 0, peak, peak + 0 * peak_y)  # not finite where either is not
    token_ids = torch.where(draws.token_ids >= 0, draws.token_ids, best)
    if random.size:
        token_ids[draws.random] = _Random.of(y, draws, random, batch).draw()
    token_ids = torch.where(peak.isfinite(), token_ids, -1)
    width = min(int(batch.num_logprobs.max()), vocab)
    told = _log_probabilities(x, draws.reported, token_ids, width) if reported.size else ()
    return DeviceSample(token_ids, told, reported, batch)


def take_sampled(token_ids: torch.Tensor, sampled: torch.Tensor) -> None:
    """In int32 token_ids [M], what draws `sampled` int64 [D] gave in the place of ids below 0, of which -1 - d stands
    for draw d; 0 where that failed."""
    count = token_ids.numel()
    _take_sampled[(triton.cdiv(count, CHUNK),)](token_ids, sampled, count, CHUNK=CHUNK)


@dataclass(frozen=True)
class _Draws:
    """A SampleInput's rows on the device, in one copy."""

    parameters: torch.Tensor  # int64 [D, 8], the bits of PARAMETERS
    rows: torch.Tensor  # int64 [D]
    token_ids: torch.Tensor  # int64 [D]
    positions: torch.Tensor  # int64 [D]
    reported: torch.Tensor  # int64, draws with log-probabilities
    random: torch.Tensor  # int64, draws that are not greedy

    @classmethod
    def upload(cls, batch: SampleInput, reported: npt.NDArray[np.intp], random: npt.NDArray[np.intp],
               device: torch.device) -> _Draws:
        count = batch.rows.size
        parts = (batch.parameters.view(np.int64), batch.rows, batch.token_ids, batch.positions, reported, random)
        packed = _to_device(np.concatenate(parts, dtype=np.int64), device)
        sizes = [8 * count, count, count, count, reported.size, random.size]
        parameters, *columns = torch.split(packed, sizes)
        return cls(parameters.view(count, 8), *columns)


@dataclass(frozen=True)
class _Random:
    """Draws by weight, each a row."""

    y: torch.Tensor  # float32 [n, V], adjusted logits
    peak: torch.Tensor  # float32 [n]
    best: torch.Tensor  # int64 [n]
    seeds: torch.Tensor  # int64 [n]
    positions: torch.Tensor  # int64 [n]
    temperatures: torch.Tensor  # float64 [n]
    shares: torch.Tensor  # float64 [n], top_p
    min_ps: torch.Tensor  # float64 [n]
    top_ks: torch.Tensor  # int64 [n], 0 where off
    most: int  # the largest of top_ks
    nucleus: bool  # whether any share is below 1

    @classmethod
    def of(cls, y: torch.Tensor, draws: _Draws, random: npt.NDArray[np.intp], batch: SampleInput) -> _Random:
        vocab, host = y.shape[1], batch.parameters[random]
        top_ks = np.where(host["top_k"] < vocab, host["top_k"], 0)
        y = y if random.size == y.shape[0] else y.index_select(0, draws.random)
        own = draws.parameters.index_select(0, draws.random)
        temperature, top_p, min_p = (own[:, i].contiguous().view(torch.float64) for i in (1, 2, 3))
        top_k = own[:, 7]
        peak, best = y.max(1)
        return cls(y, peak, best, own[:, 0].contiguous(), draws.positions.index_select(0, draws.random), temperature,
                   top_p, min_p, torch.where(top_k < vocab, top_k, 0), int(top_ks.max()),
                   bool((host["top_p"] < 1).any()))

    def draw(self) -> torch.Tensor:
        """Token ids int64 [n]."""
        vocab = self.y.shape[1]
        cutoffs = torch.full_like(self.seeds, _BELOW_ALL)
        if self.most or self.nucleus:
            width = triton.next_power_of_2(max(self.most, NUCLEUS if self.nucleus else 0))  # few different ones
            width = min(width, vocab)
            largest = _keys(self.y).topk(width).values  # [n, width], descending
            kth = largest.gather(1, (self.top_ks - 1).clamp(min=0)[:, None])[:, 0]
            cutoffs = torch.where(self.top_ks > 0, kth, cutoffs)
            if self.nucleus:
                largest = largest[:, : min(NUCLEUS, vocab)].contiguous()  # whatever a neighbour's top_k is
                totals = _totals(self._sums(cutoffs))
                counts = self._nucleus(largest, cutoffs, totals)
                inside = counts < largest.shape[1]
                last = largest.gather(1, counts.clamp(max=largest.shape[1] - 1)[:, None])[:, 0]
                cutoffs = torch.where((self.shares < 1) & inside, torch.maximum(cutoffs, last), cutoffs)
                if largest.shape[1] < vocab:
                    _bisect[(self.y.shape[0],)](self.y, self.peak, self.temperatures, self.min_ps, cutoffs, self.shares,
                                                totals, last, counts, vocab, largest.shape[1], WIDE=WIDE, num_warps=16)
        sums = self._sums(cutoffs)
        token_ids = torch.empty_like(self.seeds)
        _draw[(self.y.shape[0],)](
            self.y, self.peak, self.temperatures, self.min_ps, cutoffs, sums, self.seeds, self.positions, self.best,
            token_ids, vocab, sums.shape[1], CHUNK=CHUNK, CHUNKS=triton.next_power_of_2(sums.shape[1]),
        )
        return token_ids

    def _sums(self, cutoffs: torch.Tensor) -> torch.Tensor:
        return _sums(self.y, self.peak, self.temperatures, self.min_ps, cutoffs)

    def _nucleus(self, largest: torch.Tensor, cutoffs: torch.Tensor, totals: torch.Tensor) -> torch.Tensor:
        """How many of the candidates hold less than their share together. int64 [n]"""
        counts = torch.empty_like(self.seeds)
        _count_below[(self.y.shape[0],)](largest, self.peak, self.temperatures, self.min_ps, cutoffs, self.shares,
                                         totals, counts, largest.shape[1], CHUNK=CHUNK,
                                         CHUNKS=triton.cdiv(largest.shape[1], CHUNK))
        return counts


def _to_device(array: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _masked(x: torch.Tensor, batch: SampleInput) -> torch.Tensor:
    """x [D, V], -inf in place where a mask does not allow the token."""
    if batch.masks.size:
        masks, rows = (_to_device(array.view(np.int32), x.device) for array in (batch.masks, batch.mask_rows))
        vocab = x.shape[1]
        _mask[(x.shape[0], triton.cdiv(vocab, CHUNK))](x, masks, rows, vocab, masks.shape[1], CHUNK=CHUNK)
    return x


def _adjusted(x: torch.Tensor, batch: SampleInput) -> torch.Tensor:
    """Steps 1 to 3 on a copy, or x itself where there is nothing to do."""
    if not (batch.bias_ids.size or batch.history.size):
        return x
    y, device = x.clone(), x.device
    draws = np.arange(batch.rows.size)
    if batch.bias_ids.size:
        owner = np.repeat(draws, np.diff(batch.bias_start))
        at = tuple(_to_device(np.stack([owner, batch.bias_ids]).astype(np.int64), device))
        y[at] += _to_device(batch.bias_values.copy(), device)  # no id twice in a draw
    if batch.history.size:
        tokens = np.diff(batch.history_start)
        owner = np.repeat(draws, tokens)
        drawn = np.arange(batch.history.size) >= np.repeat(batch.output_start, tokens)
        owner_at, ids, is_output = _to_device(np.stack([owner, batch.history, drawn]).astype(np.int64), device)
        floats = [batch.parameters[name] for name in ("repetition_penalty", "presence_penalty", "frequency_penalty")]
        repetition, presence, frequency = _to_device(np.stack(floats), device)[:, :, None]  # [D, 1] each
        seen = torch.zeros(x.shape, dtype=torch.bool, device=device)
        seen[owner_at, ids] = True
        divisor = repetition.float()
        y = torch.where(seen & (repetition != 1), torch.where(y > 0, y / divisor, y * divisor), y)
        counts = torch.zeros(x.shape, dtype=torch.int32, device=device)
        counts.index_put_((owner_at, ids), is_output.int(), accumulate=True)
        y = torch.where(counts > 0, y - (presence + frequency * counts).float(), y)
    return y


def _log_probabilities(x: torch.Tensor, rows: torch.Tensor, token_ids: torch.Tensor, top: int
                       ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of the given rows of x [D, V]: of their token float64 [n], and the `top` best ids and values [n, top]."""
    x = x.index_select(0, rows)
    peak = x.max(1).values
    one, none = torch.ones_like(peak, dtype=torch.float64), torch.zeros_like(peak, dtype=torch.float64)
    log_total = _totals(_sums(x, peak, one, none, torch.full_like(rows, _BELOW_ALL))).log()[:, None]

    def of(ids: torch.Tensor) -> torch.Tensor:
        return (x.gather(1, ids).double() - peak[:, None].double()) - log_total

    best = 0x7FFFFFFF - (_keys(x).topk(top).values & 0x7FFFFFFF) if top else x.new_empty((x.shape[0], 0)).long()
    return of(token_ids[rows].clamp(min=0)[:, None])[:, 0], best, of(best)


def _keys(x: torch.Tensor) -> torch.Tensor:
    """int64 that order as the logits do, the lower id first on ties. [n, V]"""
    bits = torch.where(x == 0, 0.0, x).view(torch.int32)  # -0 equals 0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.long() << 32) | (0x7FFFFFFF - torch.arange(x.shape[1], device=x.device))


def _sums(y: torch.Tensor, peak: torch.Tensor, temperatures: torch.Tensor, min_ps: torch.Tensor,
          cutoffs: torch.Tensor) -> torch.Tensor:
    """Sums of the kept weights of each CHUNK ids. float64 [n, chunks]"""
    rows, vocab = y.shape
    chunks = triton.cdiv(vocab, CHUNK)
    sums = torch.empty((rows, chunks), dtype=torch.float64, device=y.device)
    _chunk_sums[(rows, chunks)](y, peak, temperatures, min_ps, cutoffs, sums, vocab, chunks, CHUNK=CHUNK)
    return sums


def _totals(sums: torch.Tensor) -> torch.Tensor:
    """float64 [n]"""
    rows, chunks = sums.shape
    totals = torch.empty(rows, dtype=torch.float64, device=sums.device)
    _add_chunks[(rows,)](sums, totals, chunks, CHUNKS=triton.next_power_of_2(chunks))
    return totals


@triton.jit
def _mask(x, masks, rows, vocab, words, CHUNK: tl.constexpr):
    d, ids = tl.program_id(0), tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    row = tl.load(rows + d).to(tl.int64)
    inside = (ids < vocab) & (row >= 0)
    word = tl.load(masks + row * words + (ids >> 5), mask=inside, other=-1)
    forbidden = ((word >> (ids & 31)) & 1) == 0
    tl.store(x + d.to(tl.int64) * vocab + ids, float("-inf"), mask=inside & forbidden)


@triton.jit
def _weights(y, peak, temperatures, min_ps, cutoffs, d, ids, vocab):
    """Of tokens `ids` of row d their keys, and their weights, 0 where they are not kept. float64"""
    x = tl.load(y + d.to(tl.int64) * vocab + ids, mask=ids < vocab, other=float("-inf"))
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    key = ((bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) << 32) | (0x7FFFFFFF - ids).to(tl.int64)
    weights = tl.exp((x.to(tl.float64) - tl.load(peak + d).to(tl.float64)) / tl.load(temperatures + d))
    kept = (key >= tl.load(cutoffs + d)) & (weights >= tl.load(min_ps + d)) & (ids < vocab)
    return key, tl.where(kept, weights, 0.0)


@triton.jit
def _chunk_sums(y, peak, temperatures, min_ps, cutoffs, sums, vocab, chunks,
                CHUNK: tl.constexpr):
    d, c = tl.program_id(0), tl.program_id(1)
    _, weights = _weights(y, peak, temperatures, min_ps, cutoffs, d, c * CHUNK + tl.arange(0, CHUNK), vocab)
    tl.store(sums + d * chunks + c, tl.sum(weights, 0))


@triton.jit
def _add_chunks(sums, totals, chunks, CHUNKS: tl.constexpr):
    d, c = tl.program_id(0), tl.arange(0, CHUNKS)
    tl.store(totals + d, tl.sum(tl.load(sums + d * chunks + c, mask=c < chunks, other=0.0), 0))


@triton.jit
def _count_below(keys, peak, temperatures, min_ps, cutoffs, shares, totals, counts,
                 width, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    """Of candidates `keys` [n, width], the largest first: how many have a running sum below share · total."""
    d = tl.program_id(0)
    target = tl.load(shares + d) * tl.load(totals + d)
    peak_d, temperature = tl.load(peak + d).to(tl.float64), tl.load(temperatures + d)
    held = target * 0
    count = target.to(tl.int32) * 0
    for chunk in range(CHUNKS):
        i = chunk * CHUNK + tl.arange(0, CHUNK)
        key = tl.load(keys + d.to(tl.int64) * width + i, mask=i < width, other=0)
        ordered = (key >> 32).to(tl.int32)
        x = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
        weights = tl.exp((x.to(tl.float64) - peak_d) / temperature)
        kept = (key >= tl.load(cutoffs + d)) & (weights >= tl.load(min_ps + d)) & (i < width)
        weights = tl.where(kept, weights, 0.0)
        count += tl.sum(((held + tl.cumsum(weights, 0) < target) & (i < width)).to(tl.int32), 0)
        held += tl.sum(weights, 0)
    tl.store(counts + d, count.to(tl.int64))


@triton.jit
def _bisect(y, peak, temperatures, min_ps, cutoffs, shares, totals, last, counts, vocab, width, WIDE: tl.constexpr):
    """Where a nucleus has more than the `width` largest keys, whose least is `last`: raises the row's cutoff to the
    greatest key at which those that are not less hold its share."""
    d = tl.program_id(0)
    share = tl.load(shares + d)
    if (share < 1) & (tl.load(counts + d) >= width):
        target = share * tl.load(totals + d)
        low, high = tl.load(cutoffs + d), tl.load(last + d)  # from low on there is enough, from high on too little
        while high - 1 > low:
            middle = (low >> 1) + (high >> 1) + (low & high & 1)
            lanes = tl.zeros((WIDE,), tl.float64)
            for start in range(0, vocab, WIDE):
                key, weights = _weights(y, peak, temperatures, min_ps, cutoffs, d, start + tl.arange(0, WIDE), vocab)
                lanes += tl.where(key >= middle, weights, 0.0)
            held = tl.sum(lanes, 0)
            low, high = tl.where(held < target, low, middle), tl.where(held < target, middle, high)
        tl.store(cutoffs + d, low)


@triton.jit
def _take_sampled(token_ids, sampled, count, CHUNK: tl.constexpr):
    i = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    ids = tl.load(token_ids + i, mask=i < count, other=0)
    drawn = tl.load(sampled - 1 - ids, mask=ids < 0, other=0)
    tl.store(token_ids + i, tl.maximum(drawn, 0).to(tl.int32), mask=ids < 0)


@triton.jit
def _draw(y, peak, temperatures, min_ps, cutoffs, sums, seeds, positions, best,
          token_ids, vocab, chunks, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    d, c = tl.program_id(0), tl.arange(0, CHUNKS)
    held = tl.cumsum(tl.load(sums + d * chunks + c, mask=c < chunks, other=0.0), 0)
    target = _uniform(tl.load(seeds + d), tl.load(positions + d)) * tl.max(held, 0)
    chunk = tl.minimum(tl.sum((held <= target).to(tl.int32), 0), chunks - 1)
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    _, weights = _weights(y, peak, temperatures, min_ps, cutoffs, d, ids, vocab)
    running = tl.sum(tl.where(c == chunk - 1, held, 0.0), 0) + tl.cumsum(weights, 0)
    first = tl.min(tl.where((weights > 0) & (running > target), ids, 0x7FFFFFFF), 0)
    last = tl.max(tl.where(weights > 0, ids, -1), 0)  # where the two sums of a chunk round differently
    token = tl.minimum(first, last).to(tl.int64)
    tl.store(token_ids + d, tl.where(token < 0, tl.load(best + d), token))


@triton.jit
def _uniform(seed, position):
    """53 bits of Philox4x64-10 with the counter position + 1, numpy's first. float64"""
    k0 = seed.to(tl.uint64, bitcast=True)
    k1 = k0 & 0
    c0 = (position + 1).to(tl.uint64, bitcast=True)
    c1, c2, c3 = k1, k1, k1
    for _ in tl.static_range(10):
        m0 = k1 * 0 + 0xD2E7470EE14C6C93
        m1 = k1 * 0 + 0xCA5A826395121157
        high0, low0 = tl.umulhi(m0, c0), m0 * c0
        high1, low1 = tl.umulhi(m1, c2), m1 * c2
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 += 0x9E3779B97F4A7C15
        k1 += 0xBB67AE8584CAA73B
    return (c0 >> 11).to(tl.float64) * 1.1102230246251565e-16
