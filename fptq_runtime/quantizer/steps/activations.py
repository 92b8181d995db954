"""One activation scheme for every linear of the blocks."""

from __future__ import annotations

from typing import Literal

from fptq_runtime.kernels.base import ActivationQuant
from fptq_runtime.quantizer.steps.base import BlockWork, HeadWork, Step, static_act


class Activations(Step):
    """int8, static per tensor (scale from max |x| over the calibration set) or dynamic per token, where the head is
    always per token; or float everywhere."""

    type: Literal["activations"] = "activations"
    scheme: Literal["static", "dynamic", "float"]

    def apply(self, work: BlockWork) -> None:
        for target in work.targets.values():
            static = self.scheme == "static"
            act = None if self.scheme == "float" else static_act(target.stats.amax) if static else ActivationQuant()
            target.set_act(act, "recipe")

    def apply_head(self, work: HeadWork) -> None:
        work.target.set_act(None if self.scheme == "float" else ActivationQuant(), "head")
