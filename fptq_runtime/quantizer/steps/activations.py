"""One activation scheme for every linear of the blocks."""

from __future__ import annotations

from typing import Literal

from fptq_runtime.artifact.scheme import NumberType
from fptq_runtime.kernels.base import ActivationQuant
from fptq_runtime.quantizer.steps.base import BlockWork, HeadWork, Step, static_act


class Activations(Step):
    """8-bit codes, static per tensor (scale from max |x| over the calibration set) or dynamic per token, where the head
    is always per token; or float everywhere.

    grid: what the codes are: int8, or FP8 E4M3, which gives small values beside large ones their own precision.
    """

    type: Literal["activations"] = "activations"
    scheme: Literal["static", "dynamic", "float"]
    grid: NumberType = "int"

    def apply(self, work: BlockWork) -> None:
        for target in work.targets.values():
            static = self.scheme == "static"
            target.set_act(static_act(target.stats.amax, self.grid) if static else self._dynamic(), "recipe")

    def apply_head(self, work: HeadWork) -> None:
        work.target.set_act(self._dynamic(), "head")

    def _dynamic(self) -> ActivationQuant | None:
        return None if self.scheme == "float" else ActivationQuant(None, self.grid)
