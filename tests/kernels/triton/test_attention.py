"""The paged cache and attention against double precision, and the bits of a row however it is computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest
import torch

from fptq_runtime.artifact import numerics
from fptq_runtime.config import KVCacheDtype
from fptq_runtime.kernels.base import ActivationQuant, AttentionSpec, Norm, StepInput, StepLimits
from fptq_runtime.kernels.reference import ReferenceBackend, ReferenceCache, ReferenceOps, round_kv
from fptq_runtime.kernels.triton import attention as kernels
from fptq_runtime.kernels.triton import fused
from fptq_runtime.kernels.triton.attention import DeviceAttention, DeviceCache, Tiling
from fptq_runtime.kernels.triton.values import DeviceBatch, Quantized
from fptq_runtime.models.layers import alibi_slopes
from fptq_runtime.models.rope import RopeConfig, rope_tables
from tests.kernels.small import Batcher

CPU = torch.device("cpu")
ACTS = (ActivationQuant(), ActivationQuant(0.02), ActivationQuant(None, "float"))
KV_DTYPES: list[KVCacheDtype] = ["int8", "bf16", "float32"]


def make_spec(heads: int, kv_heads: int, dim: int, window: int | None = None, alibi: bool = False,
              rope: bool = False, qk_norm: bool = False, layer: int = 0) -> AttentionSpec:
    def norm(seed: int) -> Norm | None:
        return Norm("rms", np.random.default_rng(seed).random(dim, np.float32), None, 1e-6) if qk_norm else None

    return AttentionSpec(layer, heads, kv_heads, dim, dim**-0.5, window,
                         rope_tables(RopeConfig(10000.0, dim), 2048) if rope else None,
                         alibi_slopes(heads) if alibi else None, norm(1), norm(2))


def make_limits(spec: AttentionSpec, kv_dtype: KVCacheDtype, block_size: int, num_blocks: int,
                layers: int = 1) -> StepLimits:
    return StepLimits(2048, 16, 2048, 2048, num_blocks, block_size, kv_dtype, layers, spec.num_kv_heads, spec.head_dim)


def random_qkv(spec: AttentionSpec, rows: int, seed: int) -> torch.Tensor:
    width = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
    return torch.randn((rows, width), generator=torch.Generator().manual_seed(seed))


def to_device(step: StepInput, padded_rows: int = 0, padded_sequences: int = 0) -> DeviceBatch:
    """With padding as a bucket has it, and host bounds above what is needed."""
    def padded(values: Any, count: int, with_value: int) -> torch.Tensor:
        return torch.from_numpy(np.concatenate([values, np.full(count, with_value, np.int32)]).astype(np.int32))

    rows = len(step.token_ids)
    tables = np.zeros((len(step.seq_lens) + padded_sequences, step.block_tables.shape[1] + 1), np.int32)
    tables[: len(step.seq_lens), :-1] = step.block_tables
    lengths = np.diff(step.query_start_loc).tolist()
    longest = max(lengths)
    return DeviceBatch(
        padded(step.token_ids, padded_rows, 0), padded(step.positions, padded_rows, 0),
        padded(step.slot_mapping, padded_rows, -1), padded(step.query_start_loc, padded_sequences, rows),
        padded(step.seq_lens, padded_sequences, 0), torch.from_numpy(tables), torch.from_numpy(step.logits_rows),
        longest if longest == 1 else longest + 3, int(step.seq_lens.max()) + 70,
        tuple(lengths) if lengths == sorted(lengths) and not padded_sequences else ())


def spoiled(cache: DeviceCache) -> DeviceCache:
    """As if it had been used: NaN wherever a float may lie."""
    for tensor in (cache.keys, cache.values, cache.key_scales, cache.value_scales):
        tensor.fill_(torch.nan if tensor.is_floating_point() else 93)
    return cache


def dense(value: torch.Tensor | Quantized) -> torch.Tensor:
    return value if isinstance(value, torch.Tensor) else (
        value.codes.float().unflatten(-1, (value.scale.shape[-1], -1)) * value.scale[..., None]).flatten(-2)


def cached(cache: DeviceCache, layer: int, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [T, kv heads, dim] as floats."""
    block, offset = slots // cache.block_size, slots % cache.block_size
    keys = cache.keys[layer][block, :, offset].float()
    if cache.dtype != "int8":
        return keys, cache.values[layer][block, :, offset].float()
    values = cache.values[layer][block, :, :, offset].float()
    return (keys * cache.key_scales[layer][block, :, offset, None],
            values * cache.value_scales[layer][block, :, offset, None])


def exact(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor, spec: AttentionSpec,
          kv_dtype: KVCacheDtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention in double of q [Q, heads, dim], and how far each result may be off. keys, values [T, kv heads, dim].

    An int8 cache rounds p · value scale to steps of 1 / 32512 of the largest of a chunk, and p to 2^-21.
    """
    repeats = spec.num_heads // spec.num_kv_heads
    k, v = (x.double().repeat_interleave(repeats, 1) for x in (keys, values))
    scores = torch.einsum("qhd,thd->hqt", q.double(), k) * spec.softmax_scale
    if spec.softcap is not None:
        scores = (scores / spec.softcap).tanh() * spec.softcap
    at = torch.arange(k.shape[0])
    if spec.alibi_slopes is not None:
        scores += torch.from_numpy(spec.alibi_slopes).double()[:, None, None] * at
    hidden = at > positions[:, None]
    if spec.sliding_window is not None:
        hidden |= at <= positions[:, None] - spec.sliding_window
    scores = scores.masked_fill(hidden, -torch.inf)
    if spec.sinks is not None:
        sinks = torch.from_numpy(spec.sinks).double()[:, None, None].expand(-1, scores.shape[1], 1)
        scores = torch.cat((scores, sinks), -1)
    p = scores.softmax(-1)[..., : k.shape[0]]
    out = torch.einsum("hqt,thd->qhd", p, v)
    off = {"float32": 1e-5, "bf16": 1e-4, "int8": 2e-6}[kv_dtype] * v.abs().amax() + torch.zeros_like(out)
    chunk = kernels.chunk_keys(kv_dtype, spec.head_dim)
    if kv_dtype == "int8":
        value_scale = numerics.token_scale(values).double().repeat_interleave(repeats, 1)[..., 0].T[:, None]
        weight = p * value_scale
        for first in range(0, k.shape[0], chunk):
            part = slice(first, first + chunk)
            step = weight[:, :, part].amax(-1) / 32512  # [h, Q]
            codes = (v[part] / value_scale[:, 0, part].T[..., None]).abs()
            seen = (p[:, :, part] > 0).double()
            off += 0.51 * step.T[..., None] * torch.einsum("hqt,thd->qhd", seen, codes)
    return out, off + chunk * 2.0**-21 * out.abs()


def check_step(spec: AttentionSpec, device_attention: DeviceAttention, cache: DeviceCache, reference: ReferenceCache,
               step: StepInput, qkv: torch.Tensor, padded: int = 0, acts: Sequence[ActivationQuant] = ()) -> None:
    """One layer of one step against the reference: q and the cache to the bit where float order allows."""
    rows = len(step.token_ids)
    batch = to_device(step, padded, min(padded, 2))
    filled = torch.cat([qkv, torch.full((padded, qkv.shape[1]), 7.0)])
    q = kernels.rope_and_cache(filled, device_attention, cache, batch)
    expected_q = ReferenceOps(step, reference).rope_and_cache(qkv, ReferenceBackend().prepare(spec))
    rounded = expected_q.unflatten(-1, (spec.num_heads, -1))
    rounded = round_kv(rounded, "int8") if cache.dtype == "int8" else rounded
    tolerance = 0.0 if spec.q_norm is None else 2e-2 if cache.dtype == "int8" else 1e-6  # a code may tip
    torch.testing.assert_close(dense(q)[:rows].unflatten(-1, (spec.num_heads, -1)), rounded, rtol=0, atol=tolerance)
    slots = torch.from_numpy(step.slot_mapping).long()
    keys, values = cached(cache, spec.layer, slots)
    torch.testing.assert_close(values, reference.values[spec.layer, slots], rtol=0, atol=0)
    if cache.dtype == "bf16" and tolerance:  # where the last bit of a float sum decides, either neighbour
        plain = ReferenceOps(step, None)
        plain.rope_and_cache(qkv, ReferenceBackend().prepare(spec))
        assert plain._own_kv is not None
        low, high = (round_kv(plain._own_kv[0] + sign * 4 * tolerance, "bf16") for sign in (-1, 1))
        assert ((low <= keys) & (keys <= high)).all()
    else:
        torch.testing.assert_close(keys, reference.keys[spec.layer, slots], rtol=0, atol=4 * tolerance)

    got = kernels.attention(q, device_attention, cache, batch, None)
    assert isinstance(got, torch.Tensor)
    assert not got[rows:].any()
    for s, length in enumerate(step.seq_lens.tolist()):
        first, last = step.query_start_loc[s : s + 2].tolist()
        positions = torch.arange(length)
        at = torch.from_numpy(step.block_tables[s]).long()[positions // cache.block_size] * cache.block_size
        keys, values = cached(cache, spec.layer, at + positions % cache.block_size)
        own = dense(q)[first:last].unflatten(-1, (spec.num_heads, -1))
        expected, off = exact(own, keys, values, positions[length - (last - first) :], spec, cache.dtype)
        error = (got[first:last].unflatten(-1, (spec.num_heads, -1)) - expected).abs()
        assert (error <= off).all(), (error - off).max()
    for act in acts:
        value = kernels.attention(q, device_attention, cache, batch, act)
        codes = fused.quantize(got, act)
        assert isinstance(value, Quantized) and isinstance(codes, Quantized)
        torch.testing.assert_close(value.codes.float(), codes.codes.float(), rtol=0, atol=0)
        torch.testing.assert_close(value.scale, codes.scale, rtol=0, atol=0)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("seed", range(3))
def test_random_steps(seed: int, kv_dtype: KVCacheDtype) -> None:
    """Steps that mix prompts and single tokens, with padding, in two layers of a cache full of stale NaN."""
    rng = np.random.default_rng([seed, len(kv_dtype)])
    kv_heads = int(rng.integers(1, 3))
    heads = kv_heads * int(rng.choice([1, 2, 3, 4]))
    dim = int(rng.choice([8, 20, 32, 64]))
    specs = [make_spec(heads, kv_heads, dim, [None, 37][seed % 2], seed == 2, seed != 2, seed == 1, layer)
             for layer in range(2)]
    limits = make_limits(specs[0], kv_dtype, [16, 32, 128][seed], [40, 20, 6][seed], layers=2)
    cache, reference = spoiled(DeviceCache(limits, CPU)), ReferenceCache(limits)
    batcher = Batcher(limits, rng)
    sequences = [batcher.sequence(range(n)) for n in (150, 40, 20)]
    shared: dict[int, Any] = {}
    attentions = [kernels.prepare_attention(spec, CPU, shared) for spec in specs]
    for number, counts in enumerate([(70, 33, 0), (1, 1, 1), (20, 1, 7), (1, 0, 0)]):
        step = batcher.step([(s, count) for s, count in zip(sequences, counts, strict=True) if count])
        for spec, prepared in zip(specs, attentions, strict=True):
            qkv = random_qkv(spec, len(step.token_ids), 10 * number + spec.layer)
            check_step(spec, prepared, cache, reference, step, qkv, int(rng.integers(0, 4)),
                       ACTS if number % 2 else ())


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "block_size"), [
    (7, 1, 80, 64), (18, 1, 96, 16), (50, 1, 8, 32), (2, 2, 256, 16), (8, 2, 128, 128),
])
def test_shapes(heads: int, kv_heads: int, dim: int, block_size: int, kv_dtype: KVCacheDtype) -> None:
    spec = make_spec(heads, kv_heads, dim, rope=True)
    limits = make_limits(spec, kv_dtype, block_size, 256 // block_size)
    cache, reference = spoiled(DeviceCache(limits, CPU)), ReferenceCache(limits)
    batcher = Batcher(limits, np.random.default_rng(dim))
    sequence = batcher.sequence(range(45))
    prepared = kernels.prepare_attention(spec, CPU)
    for count in (44, 1):
        check_step(spec, prepared, cache, reference, batcher.step([(sequence, count)]), random_qkv(spec, count, count))


def tables(rotated: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """cos and sin of positions below 2048."""
    angles = np.arange(2048)[:, None] * 10000.0 ** (-np.arange(rotated // 2) / (rotated / 2))
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def random_norm(kind: Literal["rms", "layer"], *shape: int, bias: bool = True) -> Norm:
    rng = np.random.default_rng(len(shape))
    weight, offset = 0.2 + 0.3 * rng.random(shape, np.float32), 0.3 * rng.standard_normal(shape, np.float32)
    return Norm(kind, weight, offset if kind == "layer" and bias else None, 1e-5)


OTHERS: dict[str, dict[str, Any]] = {
    "partial rope": {"rope": tables(20)},
    "one rotated pair": {"rope": tables(2), "q_norm": random_norm("layer", 24, bias=False),
                         "k_norm": random_norm("rms", 24)},
    "own weights": {"q_norm": random_norm("rms", 6, 24), "k_norm": random_norm("rms", 2, 24), "rope": tables(24)},
    "own weights and biases, rope first": {"q_norm": random_norm("layer", 6, 24), "rope": tables(8),
                                           "k_norm": random_norm("layer", 2, 24), "norm_after_rope": True},
    "all heads": {"q_norm": random_norm("rms", 6 * 24), "k_norm": random_norm("rms", 2 * 24), "rope": tables(24)},
    "all heads of q, layer norm, rope first": {"q_norm": random_norm("layer", 6 * 24), "norm_after_rope": True,
                                               "k_norm": random_norm("layer", 24), "rope": tables(12)},
    "softcap": {"softcap": 2.5, "sliding_window": 30},
    "sinks": {"sinks": np.array([0.5, -3, 4, 90, -200, 1], np.float32), "sliding_window": 30},
    "all of it": {"softcap": 3.0, "sinks": np.linspace(-2, 3, 6, dtype=np.float32), "rope": tables(16),
                  "alibi_slopes": alibi_slopes(6), "q_norm": random_norm("layer", 6 * 24),
                  "k_norm": random_norm("layer", 2, 24)},
}


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("name", OTHERS)
def test_what_other_families_ask(name: str, kv_dtype: KVCacheDtype) -> None:
    """Head sizes and counts that are no powers of two, in a prompt, a longer one beside it, and a single token."""
    spec = replace(make_spec(6, 2, 24), **OTHERS[name])
    limits = make_limits(spec, kv_dtype, 16, 16)
    cache, reference = spoiled(DeviceCache(limits, CPU)), ReferenceCache(limits)
    batcher = Batcher(limits, np.random.default_rng(5))
    first, second = batcher.sequence(range(9)), batcher.sequence(range(50))
    prepared = kernels.prepare_attention(spec, CPU)
    for parts in ([(first, 5), (second, 44)], [(second, 1), (first, 1)]):
        step = batcher.step(parts)
        check_step(spec, prepared, cache, reference, step, random_qkv(spec, len(step.token_ids), 1), 2, ACTS[:1])


@pytest.mark.parametrize("kv_dtype", ["int8", "float32"])
def test_bits_with_sinks_and_capped_scores_depend_on_no_step(kv_dtype: KVCacheDtype) -> None:
    """Whole without a split, or split over segments: the sink joins at one place of the sum."""
    spec = replace(make_spec(4, 1, 16), **OTHERS["all of it"] | {
        "sinks": np.array([1, -2, 5, 0.3], np.float32), "alibi_slopes": alibi_slopes(4), "rope": tables(8),
        "q_norm": random_norm("rms", 4, 16), "k_norm": random_norm("layer", 16)})
    length = kernels.SEGMENT * kernels.chunk_keys(kv_dtype, 16) + 21
    qkv = random_qkv(spec, length, 3)
    cache, prepared = DeviceCache(make_limits(spec, kv_dtype, 16, 1), CPU), kernels.prepare_attention(spec, CPU)
    tiling = kernels.choose_tiling(prepared, cache, length, 1, length, length)
    assert kernels.choose_tiling(prepared, cache, 3, 3, 1, length).split
    whole = run(spec, kv_dtype, qkv, [length], 32, replace(tiling, split=False))
    parts = run(spec, kv_dtype, qkv, [length - 23, 20, 1, 2], 16, others=1)
    torch.testing.assert_close(parts, whole, rtol=0, atol=0)


def run(spec: AttentionSpec, kv_dtype: KVCacheDtype, qkv: torch.Tensor, steps: list[int], block_size: int,
        tiling: Tiling | None = None, others: int = 0, first_step: int = 0) -> torch.Tensor:
    """Outputs from `first_step` on of one sequence computed `steps` tokens at a time, beside others that get one token
    each step."""
    limits = make_limits(spec, kv_dtype, block_size, 4096 // block_size)
    cache, prepared = spoiled(DeviceCache(limits, CPU)), kernels.prepare_attention(spec, CPU)
    batcher = Batcher(limits, np.random.default_rng(block_size))
    sequence, beside = batcher.sequence(range(qkv.shape[0])), [batcher.sequence(range(64)) for _ in range(others)]
    out, done = [], 0
    for number, count in enumerate(steps):
        batch = to_device(batcher.step([*((other, 1) for other in beside), (sequence, count)]), others)
        rows = torch.cat([random_qkv(spec, others, done), qkv[done : done + count], random_qkv(spec, others, done)])
        q = kernels.rope_and_cache(rows, prepared, cache, batch)
        done += count
        if number >= first_step:
            value = kernels.attention(q, prepared, cache, batch, None, tiling)
            assert isinstance(value, torch.Tensor)
            out.append(value[others : others + count])
    return torch.cat(out)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("window", [None, 170])
def test_bits_depend_on_neither_steps_nor_batch_nor_blocks(window: int | None, kv_dtype: KVCacheDtype) -> None:
    """More than one segment of keys: a whole prompt, chunks and single tokens, alone and beside others."""
    spec = make_spec(4, 1, 16, window, rope=True)
    length = kernels.SEGMENT * kernels.chunk_keys(kv_dtype, 16) + 41
    qkv = random_qkv(spec, length, 3)
    cache = DeviceCache(make_limits(spec, kv_dtype, 16, 1), CPU)
    tiling = kernels.choose_tiling(kernels.prepare_attention(spec, CPU), cache, length, 1, length, length)
    whole = run(spec, kv_dtype, qkv, [length], 32, replace(tiling, split=False))
    parts = run(spec, kv_dtype, qkv, [length - 43, 38, 1, 1, 3], 16, others=1)
    torch.testing.assert_close(parts, whole, rtol=0, atol=0)


def test_bits_of_an_int8_cache_do_not_depend_on_tiles() -> None:
    spec = make_spec(4, 1, 16, alibi=True)
    length = 2 * kernels.SEGMENT * 128 + 9
    qkv = random_qkv(spec, length, 4)
    expected = run(spec, "int8", qkv, [length - 8, 8], 128, first_step=1)
    for tiling in (Tiling(16, 4, True, 4, 3), Tiling(32, 2, False, 4, 2), Tiling(64, 1, True, 4, 2)):
        got = run(spec, "int8", qkv, [length - 8, 8], 64, tiling, first_step=1)
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_a_long_sequence_is_split_whatever_its_company() -> None:
    """One of 100 k tokens among 256: padded, its context is all of theirs. What bounds it is memory."""
    spec = make_spec(32, 8, 128)
    cache, prepared = DeviceCache(make_limits(spec, "int8", 16, 1), CPU), kernels.prepare_attention(spec, CPU)

    def splits(rows: int) -> bool:
        return kernels.choose_tiling(prepared, cache, rows, rows, 1, 131072).split

    assert all(map(splits, (1, 31, 32, 64, 256)))
    cache.parts_bytes = kernels.part_bytes(31, 32, 128, "int8", 131072)
    assert splits(31)
    assert not splits(32)


def test_sequences_that_decode_beside_a_prompt_have_a_launch_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The small tile, split, for these; the large one for the prompt; each row as it is alone."""
    spec, lengths = make_spec(4, 1, 16), (530, 7, 24)
    limits = make_limits(spec, "int8", 128, 16)
    prepared, chosen = kernels.prepare_attention(spec, CPU), []
    choose = kernels.choose_tiling

    def noted(*args: Any) -> Tiling:
        chosen.append(choose(*args))
        return chosen[-1]

    monkeypatch.setattr(kernels, "choose_tiling", noted)
    outs = []
    for together in (False, True):
        cache = DeviceCache(limits, CPU)
        batcher = Batcher(limits, np.random.default_rng(0))
        sequences, qkv = [batcher.sequence(range(n)) for n in lengths], [random_qkv(spec, n, n) for n in lengths]
        rows = []
        for counts in ((529, 6, 0), (1, 1, 24)):
            items = [(sequence, own[sequence.computed : sequence.computed + count], count)
                     for sequence, own, count in zip(sequences, qkv, counts, strict=True) if count]
            for part in ([items] if together else [[item] for item in items]):
                batch = to_device(batcher.step([(sequence, count) for sequence, _, count in part]))
                chosen.clear()
                q = kernels.rope_and_cache(torch.cat([own for _, own, _ in part]), prepared, cache, batch)
                if counts[2]:  # what came before is in the cache
                    rows.append(kernels.attention(q, prepared, cache, batch, None))
        outs.append(torch.cat(rows))
        if together:
            assert [(tiling.rows, tiling.split) for tiling in chosen] == [(16, True), (64, True)]
    torch.testing.assert_close(outs[0], outs[1], rtol=0, atol=0)


def test_a_single_token_step_splits_and_a_prompt_does_not() -> None:
    """So that the tests of bits compare the two."""
    spec = make_spec(32, 8, 128)
    cache, prepared = DeviceCache(make_limits(spec, "int8", 16, 1), CPU), kernels.prepare_attention(spec, CPU)
    assert kernels.choose_tiling(prepared, cache, 1, 1, 1, 32768).split
    assert kernels.choose_tiling(prepared, cache, 16, 16, 1, 8192).split
    assert not kernels.choose_tiling(prepared, cache, 2048, 1, 2048, 8192).split
    assert not kernels.choose_tiling(prepared, cache, 1, 1, 1, 512).split


def test_int8_scores_are_exact() -> None:
    """One unit of q · K is worth e^(1/8) of weight here, so an integer that is off by one shows."""
    rng = np.random.default_rng(0)
    q, k = rng.integers(-2, 3, (2, 200, 64)).astype(np.float32)
    q[:, 0], q[:, 1], k[:, 0], k[:, 1] = 127.5, 0, 0, -127.5    # scales of 1
    v = rng.standard_normal((200, 64)).astype(np.float32)
    spec = replace(make_spec(1, 1, 64, 5), softmax_scale=0.125)
    qkv = torch.from_numpy(np.concatenate([q, k, v], axis=1))
    got = run(spec, "int8", qkv, [200], 32)
    rounded = [round_kv(torch.from_numpy(x)[:, None], "int8") for x in (q, k, v)]
    expected, off = exact(*rounded, torch.arange(200), spec, "int8")
    assert ((got[:, None] - expected).abs() <= off).all()
    assert off.max() < 1e-3 * (np.exp(0.125) - 1) * expected.abs().max()


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_slot_minus_one_writes_nothing(kv_dtype: KVCacheDtype) -> None:
    spec = make_spec(2, 1, 8)
    cache = DeviceCache(make_limits(spec, kv_dtype, 16, 2), CPU)
    minus = torch.full((3,), -1, dtype=torch.int32)
    zeros = torch.zeros(3, dtype=torch.int32)
    batch = DeviceBatch(zeros, zeros, minus, zeros[:2], zeros[:1], zeros[:1, None], zeros[:1], 1, 1)
    prepared = kernels.prepare_attention(spec, CPU)
    q = kernels.rope_and_cache(random_qkv(spec, 3, 0), prepared, cache, batch)
    assert not any(x.any() for x in (cache.keys, cache.values, cache.key_scales, cache.value_scales))
    out = kernels.attention(q, prepared, cache, batch, None)
    assert isinstance(out, torch.Tensor)
    assert not out.any()


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_a_nan_stays_in_its_own_sequence(kv_dtype: KVCacheDtype) -> None:
    spec = make_spec(2, 1, 16)
    limits = make_limits(spec, kv_dtype, 16, 8)
    cache, prepared = DeviceCache(limits, CPU), kernels.prepare_attention(spec, CPU)
    batcher = Batcher(limits, np.random.default_rng(0))
    batch = to_device(batcher.step([(batcher.sequence(range(20)), 20), (batcher.sequence(range(20)), 20)]))
    qkv = random_qkv(spec, 40, 0)
    qkv[5] = torch.nan
    value = kernels.attention(kernels.rope_and_cache(qkv, prepared, cache, batch), prepared, cache, batch, None)
    assert isinstance(value, torch.Tensor)
    assert value[5:20].isnan().all()
    assert not value[20:].isnan().any()


def test_layers_share_tables() -> None:
    rope = rope_tables(RopeConfig(10000.0, 16), 64)
    shared: dict[int, Any] = {}
    first, second = (kernels.prepare_attention(replace(make_spec(2, 1, 16, layer=layer), rope=rope), CPU, shared)
                     for layer in range(2))
    assert first.rope is not None and second.rope is not None
    assert first.rope[0] is second.rope[0]


def test_what_is_refused() -> None:
    spec = make_spec(2, 1, 16)
    with pytest.raises(ValueError, match="power of two"):
        DeviceCache(make_limits(spec, "int8", 24, 2), CPU)
    with pytest.raises(ValueError, match="odd"):
        kernels.prepare_attention(replace(spec, head_dim=15), CPU)


def test_bytes() -> None:
    assert kernels.cache_bytes_per_token("int8", 32, 8, 128) == 32 * 8 * 2 * 132
    assert kernels.cache_bytes_per_token("bf16", 2, 1, 64) == 2 * 2 * 128
    prepared = kernels.prepare_attention(make_spec(4, 2, 16, window=10), CPU)
    assert kernels.attention_bytes(prepared, "int8", [1, 3], [100, 5]) == (10 + 5) * 2 * 2 * 20 + 4 * 4 * (20 + 64)
    assert kernels.rope_and_cache_bytes(prepared, "float32", 2) == 2 * (4 * 8 * 16 + 4 * 64 + 2 * 2 * 64)
    turned = kernels.prepare_attention(replace(make_spec(4, 2, 16), rope=tables(8)), CPU)
    assert kernels.rope_and_cache_bytes(turned, "float32", 2) == 2 * (4 * (8 * 16 + 8) + 4 * 64 + 2 * 2 * 64)
