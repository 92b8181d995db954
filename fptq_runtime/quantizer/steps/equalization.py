"""Weight equalization: ranges of neighbouring tensors are made equal, channel by channel."""

from __future__ import annotations

from typing import Literal

import torch

from fptq_runtime.models.block import Block, Edge, Model
from fptq_runtime.quantizer.folds import by_heads, fold, fold_block, foldable_scale, refuse_without_norms
from fptq_runtime.quantizer.steps.base import BlockWork, QuantizationError, Step
from fptq_runtime.quantizer.steps.smoothquant import smoothing_scale


class Aweq(Step):
    """AWEQ (arXiv 2311.01305): the inputs of what reads a norm (qkv and up) are divided by s = sqrt(r_x / r_w) of each
    channel, so that input and weights have one range. With symmetric codes a range is 2 · max|.|, and this is
    SmoothQuant's scale at alpha 0.5. The other half of the method is `weights: bias_correction`, for linears
    that have a bias."""

    type: Literal["aweq"] = "aweq"

    def check(self, model: Model) -> None:
        refuse_without_norms(self.type, model)

    def apply(self, work: BlockWork) -> None:
        for name, target in work.targets.items():
            if work.norm(target) is not None:
                fold(work, name, smoothing_scale(target, 0.5))


class CrossLayer(Step):
    """Cross-layer equalization (DFQ, arXiv 1906.04721), which needs no data: where r1 is the largest weight of a row of
    v (or up) and r2 that of the columns of o (or down) that read it, the row is multiplied by sqrt(r2 / r1) and the
    columns are divided by it. No channel is in two pairs, so once is convergence. GELU is not homogeneous: without a
    gate v and o are the only pair."""

    type: Literal["cle"] = "cle"

    def check(self, model: Model) -> None:
        if not any(edge.through is not None for block in model.blocks for edge in block.edges):
            raise QuantizationError(f"cle does not work on {model.config.architecture}: no linear of its blocks reads "
                                    "what another wrote; leave the step out")

    def transform_block(self, model: Model, block: Block) -> None:
        for edge in block.spec.edges:
            if edge.through is not None:
                [reader] = edge.readers
                fold_block(block, reader, equalizing_scale(block, edge))


def equalizing_scale(block: Block, edge: Edge) -> torch.Tensor:
    """sqrt(r1 / r2) of each input channel of the edge's reader, r1 of the row that writes it, r2 of the column; 1 where
    either is zero. [K]"""
    [reader] = edge.readers
    written, read = block.linears[edge.writer].weight, block.linears[reader].weight
    columns = foldable_scale(block, reader, read.abs().amax(0))
    if edge.through == "attention":
        shared = by_heads(block, columns)
        rows = written[-shared[:, 0].numel():].abs().amax(1).reshape(shared.shape[0], 1, -1).expand_as(shared).flatten()
    else:
        rows = written[-columns.numel():].abs().amax(1)
    return torch.where((rows > 0) & (columns > 0), (rows / columns).sqrt(), torch.ones(()))
