"""SmoothQuant (arXiv 2211.10438): part of the activations' outliers moves into the weights."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field

from fptq_runtime.models.block import Model
from fptq_runtime.quantizer.folds import fold, refuse_without_norms
from fptq_runtime.quantizer.steps.base import BlockWork, Step, Target
from fptq_runtime.quantizer.steps.search import Activations, Trial, plain_act

SMALLEST = 1e-5
ALPHAS = tuple(i / 20 for i in range(2, 20))  # 0.1 to 0.95


class SmoothQuant(Step):
    """Divide the inputs of what reads a norm (qkv and up) by s = max|x|^alpha / max|w|^(1 - alpha) of each channel, the
    weights' maximum over the modules that are stacked there; 1/s goes into the norm before.

    alpha: "search" takes each input's from a grid, or leaves the input as it is, by output error on the sample. The
    published ones are 0.5 (OPT, BLOOM), 0.85 (Llama 2 and 3) and 0.8 (Mistral).
    activations: how the search supposes that the input is then quantized.
    """

    type: Literal["smoothquant"] = "smoothquant"
    alpha: Annotated[float, Field(ge=0, le=1)] | Literal["search"] = "search"
    activations: Activations = "static"

    def check(self, model: Model) -> None:
        refuse_without_norms(self.type, model)

    def apply(self, work: BlockWork) -> None:
        for name, target in work.targets.items():
            if work.norm(target) is not None:
                fold(work, name, self._scale(target))

    def _scale(self, target: Target) -> torch.Tensor:
        if self.alpha != "search":
            return smoothing_scale(target, self.alpha)
        unchanged = torch.ones_like(target.stats.amax)
        tried = [unchanged, *(smoothing_scale(target, alpha) for alpha in ALPHAS)]
        return Trial(target).best(tried, plain_act(self.activations))


def smoothing_scale(target: Target, alpha: float) -> torch.Tensor:
    """max|x|^alpha / max|w|^(1 - alpha) of each input channel. [K]"""
    inputs = target.stats.amax.clamp_min(SMALLEST)
    weights = target.weight.abs().amax(0).clamp_min(SMALLEST)
    return (inputs**alpha / weights ** (1 - alpha)).clamp_min(SMALLEST)
