"""One activation scheme for every linear of the blocks."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fptq_runtime.kernels.base import ActivationQuant
from fptq_runtime.quantizer.calibrate import BLOCK_KINDS
from fptq_runtime.quantizer.steps.base import BlockWork, HeadWork, Step, matches, static_act

Scheme = Literal["static", "dynamic", "float"]


class Activations(Step):
    """int8, static per tensor (scale from max |x| over the calibration set) or dynamic per token, where the head is
    always per token; or float everywhere.

    overrides: a kind of linear (qkv, o, up, down) or a module-name pattern to another scheme; the first match wins.
    """

    type: Literal["activations"] = "activations"
    scheme: Scheme
    overrides: dict[str, Scheme] = Field(default_factory=dict)

    def patterns(self) -> tuple[str, ...]:
        return tuple(pattern for pattern in self.overrides if pattern not in BLOCK_KINDS)

    def apply(self, work: BlockWork) -> None:
        for target in work.targets.values():
            overridden = ((scheme, "override") for pattern, scheme in self.overrides.items()
                          if matches(pattern, (target.kind, *target.modules)))
            scheme, reason = next(overridden, (self.scheme, "recipe"))
            act = {"static": static_act(target.stats.amax), "dynamic": ActivationQuant(), "float": None}[scheme]
            target.set_act(act, reason)

    def apply_head(self, work: HeadWork) -> None:
        work.target.set_act(None if self.scheme == "float" else ActivationQuant(), "head")
