"""Weight equalization: ranges of neighbouring tensors are made equal, channel by channel."""

from __future__ import annotations

from typing import Literal

import torch

from fptq_runtime.config import ModelConfig
from fptq_runtime.models.decoder import Block
from fptq_runtime.quantizer.calibrate import Kind
from fptq_runtime.quantizer.folds import can_fold, fold, fold_block, foldable_scale
from fptq_runtime.quantizer.steps.base import BlockWork, Step
from fptq_runtime.quantizer.steps.smoothquant import smoothing_scale


class Aweq(Step):
    """AWEQ (arXiv 2311.01305): the inputs of qkv and up are divided by s = sqrt(r_x / r_w) of each channel, so that
    input and weights have one range. With symmetric codes a range is 2 · max|.|, and this is SmoothQuant's scale at
    alpha 0.5. The other half of the method is `weights: bias_correction`, for linears that have a bias."""

    type: Literal["aweq"] = "aweq"

    def apply(self, work: BlockWork) -> None:
        for kind, target in work.targets.items():
            if target.norm is not None:
                fold(work, kind, smoothing_scale(target, 0.5))


class CrossLayer(Step):
    """Cross-layer equalization (DFQ, arXiv 1906.04721), which needs no data: where r1 is the largest weight of a row of
    v (or up) and r2 that of the columns of o (or down) that read it, the row is multiplied by sqrt(r2 / r1) and the
    columns are divided by it. No channel is in two pairs, so once is convergence. GELU is not homogeneous: BLOOM's
    pair is v and o alone."""

    type: Literal["cle"] = "cle"

    def transform_block(self, config: ModelConfig, index: int, block: Block) -> None:
        pairs: tuple[tuple[Kind, torch.Tensor, torch.Tensor], ...] = (
            ("o", block.qkv.weight, block.o.weight), ("down", block.up.weight, block.down.weight))
        for kind, written, read in pairs:
            if can_fold(config, kind):
                fold_block(config, block, kind, equalizing_scale(config, kind, written, read))


def equalizing_scale(config: ModelConfig, kind: Kind, written: torch.Tensor, read: torch.Tensor) -> torch.Tensor:
    """sqrt(r1 / r2) of each input channel of `read` [N, K], whose rows end `written`; 1 where either is zero. [K]"""
    columns = foldable_scale(config, kind, read.abs().amax(0))
    if kind == "o":
        rows = written[-config.num_kv_heads * config.head_dim:].abs().amax(1)
        sharing = config.num_heads // config.num_kv_heads
        rows = rows.reshape(-1, 1, config.head_dim).expand(-1, sharing, -1).flatten()
    else:
        rows = written[-read.shape[1]:].abs().amax(1)
    return torch.where((rows > 0) & (columns > 0), (rows / columns).sqrt(), torch.ones(()))
