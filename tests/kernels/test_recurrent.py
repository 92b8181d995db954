"""Recurrent ops of every ISA: against torch and transformers, and the same bits whatever the batch and the chunks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers.models.falcon_h1.modeling_falcon_h1 import FalconH1RMSNormGated, mamba2_chunk_scan
from transformers.models.mamba.modeling_mamba import mamba_selective_scan
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5RMSNormGated, torch_recurrent_gated_delta_rule

pytest.importorskip("fptq_runtime._native", reason="the native extension is not built")

from fptq_runtime import _native
from fptq_runtime.kernels.base import (
    Embedding,
    Float32Array,
    GatedDelta,
    Recurrent,
    ShortConv,
    StateSpace,
    StepInput,
    StepLimits,
)
from fptq_runtime.kernels.cpu import CpuBackend
from fptq_runtime.kernels.reference import ReferenceBackend
from tests.kernels.small import Batcher

ISAS = _native.available_isas()
TOKENS = 40
LIMITS = StepLimits(max_tokens=TOKENS, max_seqs=5, max_logits_rows=TOKENS, max_model_len=TOKENS, num_blocks=20,
                    block_size=16, kv_dtype="float32", num_layers=1, num_kv_heads=1, head_dim=8)


def compiled(op: Recurrent, table: Float32Array, isa: str, threads: int = 1) -> Any:
    """An executor in which token t reads row t of the table; of a `GatedDelta` the row ends with b | a."""
    return compiled_by(CpuBackend(threads, isa), op, table, LIMITS)


def compiled_by(backend: Any, op: Recurrent, table: Float32Array, limits: StepLimits) -> Any:
    embedding, prepared = backend.prepare(Embedding(table)), backend.prepare(op)
    if isinstance(op, ShortConv):
        return backend.compile(lambda ops: ops.select_rows(ops.short_conv(ops.embed(embedding), prepared)), limits)
    if isinstance(op, StateSpace):
        return backend.compile(lambda ops: ops.select_rows(ops.state_space(ops.embed(embedding), prepared)), limits)
    width = 2 * (op.key_size + op.value_size)
    wide, narrow = (backend.prepare(Embedding(np.ascontiguousarray(part)))
                    for part in (table[:, :width], table[:, width:]))
    return backend.compile(lambda ops: ops.select_rows(ops.gated_delta(ops.embed(wide), ops.embed(narrow), prepared)),
                           limits)


def a_conv(channels: int, taps: int, more: int = 0, **options: bool) -> tuple[ShortConv, Float32Array]:
    rng = np.random.default_rng(channels)
    bias = rng.standard_normal(channels).astype(np.float32) if taps % 2 else None
    width = 3 * channels if options.get("gated") else channels + more
    conv = ShortConv("conv", channels, taps, **options, weight=rng.standard_normal((channels, taps), np.float32),
                     bias=bias)
    return conv, rng.standard_normal((TOKENS, width), np.float32)


def a_delta(key_heads: int, value_heads: int, key_dim: int, value_dim: int) -> tuple[GatedDelta, Float32Array]:
    rng = np.random.default_rng(value_dim)
    delta = GatedDelta("delta", key_heads, value_heads, key_dim, value_dim, 1e-3,
                       rng.uniform(-3, 2, value_heads).astype(np.float32), rng.standard_normal(value_heads, np.float32),
                       rng.standard_normal(value_dim, np.float32))
    width = 2 * (delta.key_size + delta.value_size) + 2 * value_heads
    return delta, rng.standard_normal((TOKENS, width), np.float32)


def a_space(heads: int, head_dim: int, groups: int, state: int, **options: Any) -> tuple[StateSpace, Float32Array]:
    rng = np.random.default_rng(heads)
    own, normed = options.pop("own", False), options.pop("normed", False)
    space = StateSpace("space", heads, head_dim, groups, state, eps=1e-3, **options,
                       a_log=rng.uniform(-2, 2, (heads, state) if own else heads).astype(np.float32),
                       d=rng.standard_normal(heads, np.float32), dt_bias=rng.standard_normal(heads, np.float32),
                       norm_weight=rng.standard_normal(heads * head_dim, np.float32) if normed else None)
    return space, rng.standard_normal((TOKENS, space.convolved + space.channels + heads), np.float32)


CONVS = [a_conv(300, 3, gated=True), a_conv(5, 4, gated=True), a_conv(516, 4, 40, silu=True), a_conv(16, 1),
         a_conv(33, 5, 7)]
DELTAS = [a_delta(2, 6, 24, 40), a_delta(1, 2, 128, 128), a_delta(3, 3, 5, 7)]
SPACES = [a_space(6, 40, 2, 24, normed=True), a_space(4, 64, 1, 128, dt_min=0.3, dt_max=0.9),
          a_space(8, 5, 4, 7, normed=True, gate_last=True), a_space(150, 1, 1, 16, own=True)]
OPS: list[tuple[Recurrent, Float32Array]] = [*CONVS, *DELTAS, *SPACES]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("conv", "table"), CONVS)
def test_convolutions_match_torch(conv: ShortConv, table: Float32Array, isa: str) -> None:
    got = compiled(conv, table, isa).step(StepInput.whole([range(TOKENS)]))
    x, size = torch.from_numpy(table).double(), conv.channels
    read = x[:, :size] * x[:, size : 2 * size] if conv.gated else x[:, :size]
    weight = torch.from_numpy(conv.weight).double()[:, None]
    bias = None if conv.bias is None else torch.from_numpy(conv.bias).double()
    y = F.conv1d(F.pad(read.T, (conv.taps - 1, 0))[None], weight, bias, groups=size)[0].T
    y = F.silu(y) if conv.silu else y
    expected = y * x[:, 2 * size :] if conv.gated else torch.cat((y, x[:, size:]), 1)
    np.testing.assert_allclose(got, expected.numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("delta", "table"), DELTAS)
def test_gated_deltas_match_transformers(delta: GatedDelta, table: Float32Array, isa: str) -> None:
    got = compiled(delta, table, isa).step(StepInput.whole([range(TOKENS)]))
    keys, values, heads = delta.key_size, delta.value_size, delta.value_heads
    q, k, v, z, b, a = torch.from_numpy(table).split([keys, keys, values, values, heads, heads], -1)
    by_heads = [x.view(1, TOKENS, count, -1) for x, count in ((q, delta.key_heads), (k, delta.key_heads), (v, heads))]
    g = -torch.from_numpy(delta.a_log).exp() * F.softplus(a + torch.from_numpy(delta.dt_bias))
    made, _ = torch_recurrent_gated_delta_rule(*by_heads, g=g[None], beta=b.sigmoid()[None],
                                               use_qk_l2norm_in_kernel=True)
    norm = Qwen3_5RMSNormGated(delta.value_dim, delta.eps)
    norm.weight.data = torch.from_numpy(delta.norm_weight)
    with torch.no_grad():
        expected = norm(made[0], z.view(TOKENS, heads, -1)).flatten(1)
    np.testing.assert_allclose(got, expected.numpy(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("space", "table"), SPACES)
def test_state_spaces_match_transformers(space: StateSpace, table: Float32Array, isa: str) -> None:
    """Mamba's and Mamba-2's."""
    got = compiled(space, table, isa).step(StepInput.whole([range(TOKENS)]))
    inner, part = space.channels, space.groups * space.state
    x, b, c, z, dt = torch.from_numpy(table).split([inner, part, part, inner, space.heads], -1)
    a, d, bias = -torch.from_numpy(space.a_log).exp(), torch.from_numpy(space.d), torch.from_numpy(space.dt_bias)
    if a.ndim == 2:
        expected = mamba_selective_scan(x.T[None], dt.T[None], a, b.T[None], c.T[None], D=d, z=z.T[None],
                                        delta_bias=bias, delta_softplus=True)[0].T
    else:
        by_heads = x.reshape(1, TOKENS, space.heads, -1), dt[None], a
        groups = [each.reshape(1, TOKENS, space.groups, -1) for each in (b, c)]
        made = mamba2_chunk_scan(*by_heads, *groups, chunk_size=16, D=d, dt_bias=bias, dt_softplus=True,
                                 dt_limit=(space.dt_min, space.dt_max)).reshape(TOKENS, inner)
        expected = made * F.silu(z)
        if space.norm_weight is not None:
            norm = FalconH1RMSNormGated(inner, space.eps, space.groups, space.gate_last)
            norm.weight.data = torch.from_numpy(space.norm_weight)
            expected = norm(made[None], z[None])[0].detach()
    np.testing.assert_allclose(got, expected.numpy(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("op", "table"), OPS)
def test_bits_do_not_depend_on_isa_or_company_or_chunks(op: Recurrent, table: Float32Array, isa: str) -> None:
    """Sequences in random parts with others, on two threads, in slots that others had before: as whole ones on the best
    ISA."""
    rng, executor = np.random.default_rng(0), compiled(op, table, isa, threads=2)
    whole = compiled(op, table, ISAS[0]).step(StepInput.whole([range(TOKENS)]))
    batcher, running, ended = Batcher(LIMITS, rng), [], 0
    while ended < 12:
        if len(running) < LIMITS.max_seqs:
            running.append(batcher.sequence(range(rng.integers(1, TOKENS + 1))))
        chosen = rng.permutation(len(running))[: rng.integers(1, len(running) + 1)]
        parts = [(running[i], int(rng.integers(1, min(8, len(running[i].token_ids) - running[i].computed) + 1)))
                 for i in chosen]
        spans = [range(sequence.computed, sequence.computed + count) for sequence, count in parts]
        got = executor.step(batcher.step(parts))
        assert np.array_equal(got, np.concatenate([whole[list(span)] for span in spans]))
        for sequence in [sequence for sequence in running if sequence.computed == len(sequence.token_ids)]:
            running.remove(sequence)
            batcher.release(sequence)
            ended += 1


@pytest.mark.parametrize(("change", "words"), [
    (lambda step: {"state_slots": step.state_slots + 4}, r"state_slots\[1\] is 5, not within 0..4"),
    (lambda step: {"state_slots": step.state_slots - 1}, r"state_slots\[0\] is -1"),
    (lambda step: {"state_slots": step.state_slots * 0}, r"state_slots\[1\] is 0, another sequence's too"),
    (lambda step: {"state_slots": step.state_slots[::-1].copy()}, r"state_slots\[0\] is 1, where 3 tokens were seen"),
    (lambda step: {"state_slots": step.state_slots[:1]}, r"state_slots must be a contiguous int32 array"),
])
def test_states_of_others_are_refused(change: Callable[[StepInput], dict[str, Any]], words: str) -> None:
    executor, batcher = compiled(*CONVS[0], ISAS[0]), Batcher(LIMITS, np.random.default_rng(0))
    first, second = batcher.sequence(range(9)), batcher.sequence(range(9))
    batcher.free_slots = []
    first.state_slot, second.state_slot = 0, 1
    executor.step(batcher.step([(first, 2), (second, 3)]))
    step = batcher.step([(first, 1), (second, 1)])
    with pytest.raises(ValueError, match=words):
        executor.step(StepInput(**{**vars(step), **change(step)}))
    executor.step(step)  # nothing was written


@pytest.mark.parametrize(("op", "table"), [CONVS[0], DELTAS[0], SPACES[0]])
def test_a_copied_state_goes_on_as_its_source_does(op: Recurrent, table: Float32Array) -> None:
    limits = replace(LIMITS, kept_states=2)
    for backend in (CpuBackend(1), ReferenceBackend()):
        executor = compiled_by(backend, op, table, limits)
        batcher = Batcher(limits, np.random.default_rng(0))
        first, second = batcher.sequence(range(30)), batcher.sequence(range(30))
        batcher.free_slots = []
        first.state_slot, second.state_slot = 0, 1
        executor.step(batcher.step([(first, 12)]))
        executor.copy_state(0, 6)
        expected = executor.step(batcher.step([(first, 18)]))
        executor.copy_state(6, 1)
        second.computed = 12
        assert np.array_equal(executor.step(batcher.step([(second, 18)])), expected)
    for source, target in ((7, 0), (0, -1)):
        with pytest.raises(ValueError, match=r"is (7|-1), not within 0..6"):
            compiled_by(CpuBackend(1), op, table, limits).copy_state(source, target)
