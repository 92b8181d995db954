"""What steps that try several scales share: the output error that each would lead to."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

import torch

from fptq_runtime.kernels.base import ActivationQuant
from fptq_runtime.kernels.reference import quantize_activations
from fptq_runtime.quantizer.steps.base import Target, relative_error, static_act

Activations = Literal["static", "dynamic"]
ChooseAct = Callable[[torch.Tensor, torch.Tensor], ActivationQuant | None]  # of max |x| [K] and rows of x [rows, K]

OUTPUTS = 1024  # rows of the weight that errors are measured on


class Trial:
    """The output error of one linear with its input divided by a scale and quantized, and its weights rounded as the
    recipe does; of a large linear, on some of its outputs and of the sampled rows, at even distances."""

    def __init__(self, target: Target) -> None:
        self._amax, self._rounding = target.stats.amax, target.rounding  # [K]
        self.weight = target.weight[:: target.weight.shape[0] // OUTPUTS | 1]  # [outputs, K]
        self.sample = target.sample_rows(self.weight)  # [rows, K]
        self._exact = self.sample @ self.weight.T  # [rows, outputs]

    def error(self, scale: torch.Tensor, act: ChooseAct) -> float:
        """scale [K], or [] for one that all channels share."""
        x = self.sample / scale
        output = quantize_activations(x, act(self._amax / scale, x)) @ self._rounding(self.weight * scale).T
        return relative_error(output, self._exact)

    def best(self, scales: Iterable[torch.Tensor], act: ChooseAct) -> torch.Tensor:
        """The one of least error."""
        return min(scales, key=lambda scale: self.error(scale, act))


def plain_act(activations: Activations) -> ChooseAct:
    """Static over the whole range, or dynamic."""
    return lambda amax, x: static_act(amax) if activations == "static" else ActivationQuant()
