"""What steps that try several scales share: the output error that each would lead to."""

from __future__ import annotations

from typing import Literal

import torch

from fptq_runtime.artifact.numerics import dequantize, quantize_weight
from fptq_runtime.kernels.base import ActivationQuant
from fptq_runtime.kernels.reference import quantize_activations
from fptq_runtime.quantizer.steps.base import Step, Target, relative_error, static_act
from fptq_runtime.quantizer.steps.weights import usable_group

SEARCH_TOKENS = 256  # of the sample
SEARCH_OUTPUTS = 1024  # rows of the weight


class ScaleSearch(Step):
    """A step that supposes, where it searches, that the input is then quantized as `activations` says and the weights
    rounded to nearest, to `num_bits` in groups of `group_size` (None: per channel). Tokens and outputs are taken at
    even distances, so that a large layer costs what a small one does."""

    activations: Literal["static", "dynamic"] = "static"
    num_bits: Literal[4, 8] = 4
    group_size: Literal[32, 64, 128] | None = 128

    def best_scale(self, target: Target, scales: list[torch.Tensor]) -> torch.Tensor:
        """Of what the input could be divided by, each [K], the one with the least output error."""
        x, weight = _thinned(target.stats.sample, SEARCH_TOKENS), _thinned(target.weight, SEARCH_OUTPUTS)
        exact = x @ weight.T

        def error(scale: torch.Tensor) -> float:
            group = usable_group(scale.numel(), self.group_size)
            quantized = dequantize(*quantize_weight(weight * scale, self.num_bits, group))
            act = static_act(target.stats.amax / scale) if self.activations == "static" else ActivationQuant()
            return relative_error(quantize_activations(x / scale, act) @ quantized.T, exact)

        return min(scales, key=error)


def _thinned(rows: torch.Tensor, most: int) -> torch.Tensor:
    return rows[:: -(-rows.shape[0] // most)]
