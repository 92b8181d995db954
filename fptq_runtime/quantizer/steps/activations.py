"""One activation scheme for every linear of the blocks."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from fptq_runtime.artifact.scheme import NumberType
from fptq_runtime.kernels.base import ActivationQuant
from fptq_runtime.quantizer.ranges import QUANTILE, RangeMethod
from fptq_runtime.quantizer.steps.base import BlockWork, Step, Target, matches, static_act

Scheme = Literal["static", "dynamic", "float"]


class Activations(Step):
    """8-bit codes, static per tensor or dynamic per token, where the head is always per token; or float everywhere. An
    input with massive activations at the first token goes per token instead of static, unless `overrides` names it.

    range: of static inputs, on the calibration set: "minmax" covers all, the others clip (ranges.py).
    quantile: of the tokens that "percentile" covers.
    overrides: a linear by its name in the block (qkv, o, up, down; `fptq inspect` lists a model's) or a module-name
    pattern to another scheme; the first match wins.
    grid: what the codes are: int8; or "float", FP8 E4M3, which keeps the precision of small values beside large ones.
    """

    type: Literal["activations"] = "activations"
    scheme: Scheme
    range: RangeMethod = "minmax"
    quantile: float = Field(default=QUANTILE, ge=0.9, le=1)
    overrides: dict[str, Scheme] = Field(default_factory=dict)
    grid: NumberType = "int"

    @model_validator(mode="after")
    def _covers(self) -> Activations:
        if self.grid == "float" and self.range != "minmax":
            raise ValueError(f"range {self.range!r} goes with grid 'int'; grid 'float' takes 'minmax' alone")
        return self

    @property
    def reads_inputs(self) -> bool:
        return "static" in (self.scheme, *self.overrides.values())

    def patterns(self) -> tuple[str, ...]:
        return tuple(self.overrides)

    def apply(self, work: BlockWork) -> None:
        for target in work.targets.values():
            overridden = ((scheme, "override") for pattern, scheme in self.overrides.items()
                          if matches(pattern, target.names))
            scheme, reason = next(overridden, (self.scheme, "recipe"))
            if scheme == "static" and reason == "recipe" and target.stats.spiked:
                scheme, reason = "dynamic", "massive activations at the first token"
            target.set_act(self._act(target, scheme), reason)

    def _act(self, target: Target, scheme: Scheme) -> ActivationQuant | None:
        if scheme == "float":
            return None
        if scheme == "dynamic":
            return ActivationQuant(None, self.grid)
        return static_act(target.stats.amax, target.stats.sample, self.range, self.quantile, self.grid)

    def apply_head(self, work: BlockWork) -> None:
        for target in work.targets.values():
            target.set_act(None if self.scheme == "float" else ActivationQuant(None, self.grid), "head")
