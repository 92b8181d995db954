"""What passes between the ops of the Triton backend."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Quantized:
    """A linear's input: x[m, k] = codes[m, k] · scale[m], or · scale[0] where it is static."""

    codes: torch.Tensor  # int8 or float8_e4m3fn [M, K], contiguous
    scale: torch.Tensor  # float32 [M] or [1]


@dataclass(frozen=True)
class DeviceBatch:
    """StepInput on the device; int32 throughout.

    Rows beyond those of the step are padding: their slot is -1 and no sequence holds them; sequences beyond those of
    the step have no rows and length 0. max_query_len and max_seq_len bound every sequence's rows and length, on the
    host. query_lens: each sequence's rows, ascending; empty where that is not so, or all have one.
    """

    token_ids: torch.Tensor  # [M]
    positions: torch.Tensor  # [M]
    slot_mapping: torch.Tensor  # [M]
    query_start_loc: torch.Tensor  # [S + 1]
    seq_lens: torch.Tensor  # [S]
    block_tables: torch.Tensor  # [S, max blocks]
    logits_rows: torch.Tensor  # [R]
    max_query_len: int
    max_seq_len: int
    query_lens: tuple[int, ...] = ()
    adapters: torch.Tensor | None = None  # [S], of a step


def take_rows(x: torch.Tensor | Quantized, rows: torch.Tensor) -> torch.Tensor | Quantized:
    if isinstance(x, torch.Tensor):
        return x.index_select(0, rows)
    codes = x.codes.view(torch.int8).index_select(0, rows).view(x.codes.dtype)  # torch selects no rows of FP8
    return Quantized(codes, x.scale if x.scale.numel() == 1 else x.scale.index_select(0, rows))


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"
