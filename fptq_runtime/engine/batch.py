"""From a schedule to the arrays of one step."""

from __future__ import annotations

import numpy as np

from fptq_runtime.engine.scheduler import SchedulerOutput
from fptq_runtime.kernels.base import Int32Array, StepInput


def build_step_input(output: SchedulerOutput, block_size: int) -> StepInput:
    """Sequences in scheduled order; the logits rows are those the schedule asks for, in the same order."""
    items = output.scheduled
    lengths = np.array([item.num_tokens for item in items], dtype=np.int32)  # [S]
    starts = np.array([item.start for item in items], dtype=np.int32)
    num_logits = np.array([item.num_logits for item in items], dtype=np.int32)
    query_start_loc = np.zeros(len(items) + 1, dtype=np.int32)
    np.cumsum(lengths, out=query_start_loc[1:])
    token_ids: list[int] = []
    width = max(len(item.request.block_table) for item in items)
    block_tables = np.zeros((len(items), width), dtype=np.int32)
    for row, item in enumerate(items):
        token_ids += item.request.token_ids[item.start : item.start + item.num_tokens]
        block_tables[row, : len(item.request.block_table)] = item.request.block_table
    sequence = np.repeat(np.arange(len(items)), lengths)  # [M]
    positions = _ranges(starts, lengths)
    blocks = block_tables[sequence, positions // block_size]
    return StepInput(
        token_ids=np.array(token_ids, dtype=np.int32),
        positions=positions,
        slot_mapping=blocks * np.int32(block_size) + positions % np.int32(block_size),
        query_start_loc=query_start_loc,
        seq_lens=starts + lengths,
        block_tables=block_tables,
        logits_rows=_ranges(query_start_loc[1:] - num_logits, num_logits),
    )


def _ranges(starts: Int32Array, lengths: Int32Array) -> Int32Array:
    """starts[0], starts[0] + 1, … lengths[0] of them, then the same for each next."""
    ends = np.cumsum(lengths, dtype=np.int32)
    ranges: Int32Array = np.arange(ends[-1], dtype=np.int32) + np.repeat(starts - (ends - lengths), lengths)
    return ranges
