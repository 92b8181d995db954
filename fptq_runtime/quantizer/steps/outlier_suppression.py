"""Outlier Suppression+ (arXiv 2304.09145): channels are centred, then those that stand out are scaled down."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import PositiveInt

from fptq_runtime.models.block import Model
from fptq_runtime.quantizer.folds import can_shift, fold, refuse_without_norms, shift
from fptq_runtime.quantizer.steps.base import BlockWork, Step, Target
from fptq_runtime.quantizer.steps.search import Activations, Trial, plain_act

SMALLEST_THRESHOLD = 1.0
RESOLUTION = 0.5


class OutlierSuppression(Step):
    """The inputs of qkv and up: x' = (x - z) / s with z = (max + min) / 2 of each channel and
    s = max(1, max|x - z| / t), whose threshold t is searched by output error from the largest |x - z| down to 1.

    shift: z goes into the norm's bias and into the bias of what reads it. Where either has none (Llama and
    most others; a bias that config.json does not announce would not be loaded elsewhere) channels are scaled only.
    thresholds: how many to try; None is the paper's max(100, max|x - z| / 0.5).
    activations: how the search supposes that the input is then quantized.
    """

    type: Literal["os+"] = "os+"
    shift: bool = True
    thresholds: PositiveInt | None = None
    activations: Activations = "static"

    def check(self, model: Model) -> None:
        refuse_without_norms(self.type, model)

    def apply(self, work: BlockWork) -> None:
        for name, target in work.targets.items():
            if work.norm(target) is None:
                continue
            if self.shift and can_shift(work, target):
                shift(work, target, (target.stats.high + target.stats.low) / 2)
            fold(work, name, self._scale(target))

    def _scale(self, target: Target) -> torch.Tensor:
        """[K]"""
        amax = target.stats.amax
        largest = max(float(amax.max()), SMALLEST_THRESHOLD)
        steps = self.thresholds or max(100, int(largest / RESOLUTION))
        tried = torch.linspace(largest, SMALLEST_THRESHOLD, steps).tolist()
        scales = ((amax / threshold).clamp_min(1) for threshold in tried)
        return Trial(target).best(scales, plain_act(self.activations))
