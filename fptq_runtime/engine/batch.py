"""From a schedule to the arrays of one step."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np

from fptq_runtime.engine.scheduler import ScheduledSequence
from fptq_runtime.kernels.base import Int32Array, StepInput


def build_step_input(items: Sequence[ScheduledSequence], block_size: int) -> StepInput:
    """Sequences in scheduled order; the logits rows are those the schedule asks for, in the same order.

    In plain Python: most steps have few tokens a sequence, for which each call of numpy costs more than the work."""
    token_ids, positions, slots, logits_rows = array("i"), array("i"), array("i"), array("i")
    query_start_loc, seq_lens = array("i", [0]), array("i")
    block_tables = np.zeros((len(items), max(len(item.sequence.block_table) for item in items)), dtype=np.int32)
    for row, item in enumerate(items):
        sequence, start, end = item.sequence, item.start, item.start + item.num_rows
        table = sequence.block_table
        block_tables[row, : len(table)] = table
        token_ids.extend(sequence.token_ids[start : start + item.num_tokens])
        token_ids.extend(item.draft.token_ids)
        positions.extend(range(start, end))
        slots.extend([table[p // block_size] * block_size + p % block_size for p in range(start, end)])
        rows = len(token_ids)
        query_start_loc.append(rows)
        seq_lens.append(end)
        logits_rows.extend(range(rows - item.num_logits, rows))
    return StepInput(
        token_ids=_int32(token_ids),
        positions=_int32(positions),
        slot_mapping=_int32(slots),
        query_start_loc=_int32(query_start_loc),
        seq_lens=_int32(seq_lens),
        block_tables=block_tables,
        logits_rows=_int32(logits_rows),
        state_slots=np.array([item.sequence.state_slot for item in items], np.int32),
        adapters=np.array([item.sequence.adapter.slot for item in items], dtype=np.int32),
    )


def _int32(values: array[int]) -> Int32Array:
    return np.frombuffer(values, dtype=np.int32)
