"""What steps that try several scales share: the output error that each would lead to."""

from __future__ import annotations

from typing import Literal

import torch

from fptq_runtime.artifact.numerics import dequantize, quantize_weight
from fptq_runtime.kernels.base import ActivationQuant
from fptq_runtime.kernels.reference import quantize_activations
from fptq_runtime.quantizer.steps.base import Step, Target, relative_error, static_act

SEARCH_ROWS = 256  # of the sample


class ScaleSearch(Step):
    """A step that supposes, where it searches, that the input is then quantized as `activations` says and the weights
    rounded to nearest, to `num_bits` in groups of `group_size` (None: per channel)."""

    activations: Literal["static", "dynamic"] = "static"
    num_bits: Literal[4, 8] = 4
    group_size: Literal[32, 64, 128] | None = 128

    def best_scale(self, target: Target, scales: list[torch.Tensor]) -> torch.Tensor:
        """Of what the input could be divided by, each [K], the one with the least output error on the sample."""
        rows = target.stats.sample[:: max(1, target.stats.sample.shape[0] // SEARCH_ROWS)]
        exact = rows @ target.weight.T
        return min(scales, key=lambda scale: self._error(target, rows, exact, scale))

    def _error(self, target: Target, rows: torch.Tensor, exact: torch.Tensor, scale: torch.Tensor) -> float:
        k = scale.numel()
        group = None if self.group_size is None or k % self.group_size else self.group_size
        weight = dequantize(*quantize_weight(target.weight * scale, self.num_bits, group))
        act = static_act(target.stats.amax / scale) if self.activations == "static" else ActivationQuant()
        return relative_error(quantize_activations(rows / scale, act) @ weight.T, exact)
