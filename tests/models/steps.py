"""Drives an executor with one sequence, as a scheduler would."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fptq_runtime.config import KVCacheDtype, ModelConfig
from fptq_runtime.kernels.base import Backend, Executor, Float32Array, StepInput, StepLimits
from fptq_runtime.models.decoder import Decoder

BLOCK = 16


def limits_for(config: ModelConfig, length: int, kv_dtype: KVCacheDtype = "float32") -> StepLimits:
    return StepLimits(
        max_tokens=length, max_seqs=4, max_logits_rows=length, max_model_len=length, num_blocks=-(-length // BLOCK) + 1,
        block_size=BLOCK, kv_dtype=kv_dtype, num_layers=config.num_layers, num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
    )


def run_chunks(executor: Executor, token_ids: Sequence[int], chunks: Sequence[int]) -> Float32Array:
    """Logits of every position [T, V], the tokens fed in chunks of the given sizes. Blocks lie in reverse order."""
    assert sum(chunks) == len(token_ids)
    table = np.arange(-(-len(token_ids) // BLOCK), dtype=np.int32)[::-1].copy()
    logits, start = [], 0
    for size in chunks:
        positions = np.arange(start, start + size, dtype=np.int32)
        logits.append(executor.step(StepInput(
            token_ids=np.asarray(token_ids[start : start + size], dtype=np.int32),
            positions=positions,
            slot_mapping=(table[positions // BLOCK] * BLOCK + positions % BLOCK).astype(np.int32),
            query_start_loc=np.array([0, size], dtype=np.int32),
            seq_lens=np.array([start + size], dtype=np.int32),
            block_tables=table[None],
            logits_rows=np.arange(size, dtype=np.int32),
            state_slots=np.array([2], dtype=np.int32),
        )))
        start += size
    return np.concatenate(logits)


def logits_by_chunks(decoder: Decoder, backend: Backend, token_ids: Sequence[int], chunks: Sequence[int],
                     kv_dtype: KVCacheDtype = "float32") -> Float32Array:
    executor = backend.compile(decoder, limits_for(decoder.config, len(token_ids), kv_dtype))
    return run_chunks(executor, token_ids, chunks)
