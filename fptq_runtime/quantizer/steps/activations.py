"""One activation scheme for every linear of the blocks."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fptq_runtime.kernels.base import ActivationQuant
from fptq_runtime.quantizer.ranges import QUANTILE, RangeMethod
from fptq_runtime.quantizer.steps.base import BlockWork, HeadWork, Step, Target, static_act


class Activations(Step):
    """int8, static per tensor or dynamic per token, where the head is always per token; or float everywhere.

    range: of static inputs, on the calibration set: "minmax" covers all, the others clip (ranges.py).
    quantile: of the tokens that "percentile" covers.
    """

    type: Literal["activations"] = "activations"
    scheme: Literal["static", "dynamic", "float"]
    range: RangeMethod = "minmax"
    quantile: float = Field(default=QUANTILE, ge=0.9, le=1)

    def apply(self, work: BlockWork) -> None:
        for target in work.targets.values():
            target.set_act(self._act(target), "recipe")

    def _act(self, target: Target) -> ActivationQuant | None:
        if self.scheme == "float":
            return None
        if self.scheme == "dynamic":
            return ActivationQuant()
        return static_act(target.stats.amax, target.stats.sample, self.range, self.quantile)

    def apply_head(self, work: HeadWork) -> None:
        work.target.set_act(None if self.scheme == "float" else ActivationQuant(), "head")
