"""A whole model over the ops: stem, blocks, head."""

from __future__ import annotations

from collections.abc import Iterable

from fptq_runtime.config import ModelConfig
from fptq_runtime.kernels.base import Ops, V
from fptq_runtime.models.block import Block, Stem


class Decoder:
    """embed → blocks → head. The parts are callable one by one, which is how the quantizer walks them. The last of the
    blocks has `last` set."""

    def __init__(self, config: ModelConfig, stem: Stem, blocks: Iterable[Block], head: Block) -> None:
        self.config = config
        self.stem = stem
        self.blocks = blocks
        self.head = head

    def __call__(self, ops: Ops[V]) -> V:
        """Logits of the step's logits_rows. [R, V]"""
        logits: V = self.head.forward(ops, self._rows(ops))
        return logits

    def hidden(self, ops: Ops[V]) -> V:
        """What the head reads of the step's logits_rows: normalised, and for its readout, where it has one. [R, H]"""
        return ops.norm(self._rows(ops), self.head.norms["norm"], None)

    def _rows(self, ops: Ops[V]) -> V:
        x: V = self.stem.forward(ops)
        for block in self.blocks:
            x = block.forward(ops, x)
        return x
