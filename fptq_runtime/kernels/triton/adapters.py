"""What the adapters of a step's sequences add to a linear: two kernels, at addresses that a graph may keep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import triton
import triton.language as tl

from fptq_runtime.kernels.base import LowRank
from fptq_runtime.kernels.reference import to_torch
from fptq_runtime.kernels.triton.values import DeviceBatch, Quantized

MAX_RANK = 4096  # of all parts of a linear together
_RANKS, _BLOCK = 16, 128  # of a program, and columns of a step
_PROGRAMS = 4  # that share a row's ranks


@dataclass
class DeviceAdapters:
    """table int64 [slots + 1, 3]: the addresses of down [R, K] and of up [R, N], float32 and the parts of a linear one
    after the other, and R. held: these tensors."""

    n: int
    k: int
    table: torch.Tensor
    held: list[tuple[torch.Tensor, ...]] = field(default_factory=list)

    @classmethod
    def empty(cls, n: int, k: int, slots: int, device: torch.device) -> DeviceAdapters:
        table = torch.zeros((slots + 1, 3), dtype=torch.int64, device=device)
        return cls(n, k, table, [() for _ in range(slots + 1)])

    def set(self, slot: int, parts: Sequence[LowRank]) -> None:
        """Raises ValueError where the parts have too many ranks."""
        ranks = [len(part.down) for part in parts]
        if sum(ranks) > MAX_RANK:
            raise ValueError(f"an adapter's ranks of one linear are {sum(ranks)} together; at most {MAX_RANK} may be")
        device = self.table.device
        down, up = torch.zeros((sum(ranks), self.k)), torch.zeros((sum(ranks), self.n))
        for i, part in enumerate(parts):
            rows = slice(sum(ranks[:i]), sum(ranks[: i + 1]))
            down[rows] = to_torch(part.down).float()
            up[rows, part.first : part.first + len(part.up)] = part.scale * to_torch(part.up).float().T
        made = down.to(device), up.to(device)
        self.table[slot] = torch.tensor([*(tensor.data_ptr() for tensor in made), sum(ranks)])
        self.held[slot] = made  # what was there is let go of behind the steps that are queued


def slots_of(batch: DeviceBatch, selected: bool) -> torch.Tensor:
    """Of each row of a step, or of its logits rows; int32."""
    assert batch.adapters is not None
    rows = torch.arange(batch.token_ids.numel(), dtype=torch.int32, device=batch.token_ids.device)
    sequences = torch.searchsorted(batch.query_start_loc, rows, right=True) - 1
    slots = batch.adapters.index_select(0, sequences.clamp_(max=batch.adapters.numel() - 1))
    return slots.index_select(0, batch.logits_rows) if selected else slots


def add_adapters(x: torch.Tensor | Quantized, y: torch.Tensor, adapters: DeviceAdapters, slots: torch.Tensor) -> None:
    """y [rows, N] += up · down · x [rows, K], each row in one order by its own slot."""
    rows = y.shape[0]
    if rows == 0:
        return
    quantized = isinstance(x, Quantized) and x.codes.dtype == torch.int8
    if isinstance(x, Quantized):
        values = x.codes if quantized else x.codes.float() * x.scale.reshape(-1, 1)
        scale = x.scale
    else:
        values, scale = x, y
    products = torch.empty((rows, MAX_RANK), dtype=torch.float32, device=y.device)
    _down_kernel[(rows, _PROGRAMS)](values, scale, slots, adapters.table, products, adapters.k, MAX_RANK,
                                    QUANTIZED=quantized, STATIC=scale.numel() == 1, RANKS=_RANKS, BLOCK=_BLOCK,
                                    PROGRAMS=_PROGRAMS)
    _up_kernel[(rows, triton.cdiv(adapters.n, _BLOCK))](products, slots, adapters.table, y, adapters.n, MAX_RANK,
                                                        RANKS=_RANKS, BLOCK=_BLOCK)


@triton.jit
def _down_kernel(x, scale, slots, table, products, width, most, QUANTIZED: tl.constexpr, STATIC: tl.constexpr,
                 RANKS: tl.constexpr, BLOCK: tl.constexpr, PROGRAMS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row).to(tl.int64)
    count = tl.load(table + 3 * slot + 2).to(tl.int32)
    down = tl.load(table + 3 * slot).to(tl.pointer_type(tl.float32))
    for first in range(tl.program_id(1) * RANKS, count, PROGRAMS * RANKS):
        rank = first + tl.arange(0, RANKS)
        total = tl.zeros([RANKS], tl.float32)
        for start in range(0, width, BLOCK):
            column = start + tl.arange(0, BLOCK)
            v = tl.load(x + row * width + column, mask=column < width, other=0).to(tl.float32)
            inside = (rank < count)[:, None] & (column < width)[None, :]
            w = tl.load(down + rank.to(tl.int64)[:, None] * width + column[None, :], mask=inside, other=0.0)
            total += tl.sum(w * v[None, :], 1)
        if QUANTIZED:
            if STATIC:
                total *= tl.load(scale)
            else:
                total *= tl.load(scale + row)
        tl.store(products + row * most + rank, total, mask=rank < count)


@triton.jit
def _up_kernel(products, slots, table, y, width, most, RANKS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(slots + row).to(tl.int64)
    count = tl.load(table + 3 * slot + 2).to(tl.int32)
    up = tl.load(table + 3 * slot + 1).to(tl.pointer_type(tl.float32))
    if count > 0:
        total = tl.zeros([BLOCK], tl.float32)
        for first in range(0, count, RANKS):
            rank = first + tl.arange(0, RANKS)
            t = tl.load(products + row * most + rank, mask=rank < count, other=0.0)
            inside = (rank < count)[:, None] & (column < width)[None, :]
            w = tl.load(up + rank.to(tl.int64)[:, None] * width + column[None, :], mask=inside, other=0.0)
            total += tl.sum(w * t[:, None], 0)
        before = tl.load(y + row * width + column, mask=column < width, other=0.0)
        tl.store(y + row * width + column, before + total, mask=column < width)
