"""AWQ (arXiv 2306.00978): channels with large inputs get finer weights, and each group the range that suits them."""

from __future__ import annotations

from typing import Literal

import torch

from fptq_runtime.quantizer.folds import fold, foldable_scale
from fptq_runtime.quantizer.steps.base import BlockWork, Step, Target
from fptq_runtime.quantizer.steps.search import Trial

RATIOS = torch.linspace(0, 0.95, 20).tolist()
CLIPS = torch.linspace(1, 0.55, 10).tolist()
CHUNK_FLOATS = 1 << 22


class Awq(Step):
    """Divide inputs by s = mean |x|^r and multiply the weights by it, with the r in [0, 0.95] of the least output
    error with quantized weights; goes before the step that chooses activation schemes.

    clip: then search each group's range, from 1 down to 0.55 of max |w|, for the least output error. Not of q and k,
    whose errors the softmax amplifies.
    """

    type: Literal["awq"] = "awq"
    clip: bool = True

    def apply(self, work: BlockWork) -> None:
        for target in work.targets.values():
            if work.block.spec.edge(target.name) is not None:
                fold(work, target.name, self._scale(work, target))
        if self.clip:
            for target in work.targets.values():
                target.clip = self._clip(target)
                if (values := self._values(work, target)) is not None:
                    target.clip[:-values] = 1

    def _values(self, work: BlockWork, target: Target) -> int | None:
        """How many rows at the end of a linear that feeds attention are not q's or k's."""
        edges = work.block.spec.edges
        attention = work.block.spec.attention
        if attention is None or all(edge.writer != target.name or edge.through != "attention" for edge in edges):
            return None
        return attention.value_size

    def _scale(self, work: BlockWork, target: Target) -> torch.Tensor:
        """What to divide the input by. [K]"""
        magnitude = target.stats.sample.abs().mean(0)
        scales = (magnitude.pow(ratio).clamp_min(1e-4) for ratio in RATIOS)
        tried = (foldable_scale(work.block, target.name, s / (s.max() * s.min()).sqrt()) for s in scales)
        return Trial(target).best(tried, lambda amax, x: None)

    def _clip(self, target: Target) -> torch.Tensor:
        """The fraction of max |w| for each group. [N, G]"""
        k = target.weight.shape[1]
        size = target.rounding.group(k) or k
        x = target.stats.sample.reshape(-1, k // size, size).transpose(0, 1)  # [G, rows, size]
        gram = x.transpose(1, 2) @ x
        rows = max(1, CHUNK_FLOATS // k)
        best = []
        for start in range(0, target.weight.shape[0], rows):
            part = target.weight[start : start + rows]
            clip = torch.ones(part.shape[0], k // size)
            least = torch.full_like(clip, float("inf"))
            for ratio in CLIPS:
                tried = torch.full_like(clip, ratio)
                error = (target.rounding(part, tried) - part).reshape(-1, k // size, size).transpose(0, 1)
                squared = ((error @ gram) * error).sum(-1).T
                better = squared < least
                least, clip = torch.where(better, squared, least), torch.where(better, tried, clip)
            best.append(clip)
        return torch.cat(best)
