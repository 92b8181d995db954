"""FPTQ (arXiv 2308.15987): logarithmic activation equalization and a scheme for every input, chosen by its range."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field, PositiveFloat, model_validator

from fptq_runtime.kernels.base import ActivationQuant
from fptq_runtime.quantizer.calibrate import SAMPLE_ROWS
from fptq_runtime.quantizer.folds import fold, foldable_scale
from fptq_runtime.quantizer.ranges import QUANTILE, RangeMethod
from fptq_runtime.quantizer.steps.base import BlockWork, Step, Target, matches, static_act
from fptq_runtime.quantizer.steps.search import OUTPUTS, ChooseAct, Trial

Policy = Literal["static", "lae", "dynamic"]

SEARCHED_CEILINGS = (1.0, 0.8, 0.6, 0.5, 0.4, 0.3)  # of LAE's own
TRIALS = 4  # of a linear, on average


@dataclass(frozen=True)
class _Choice:
    equalize: bool
    dynamic: bool


class Fptq(Step):
    """With v = max |x| of a linear's input over the calibration set: v <= v0 static; v0 < v <= v1 LAE, then static;
    v > v1 dynamic per token, after LAE wherever it has an exact fold.

    floor: LAE scales below it are raised to it; 1e-5 is the paper's.
    search: LAE leaves an outlier channel at log2(2 + m), a few times its neighbours, and there it costs the weights
    of its group their precision. So s = max(1, m / t) is tried too, with t from LAE's own ceiling log2(2 + v)
    downwards, and whichever has the least output error is kept. False is the paper's.
    paper_policy: as published, no LAE above v1 and none but behind a norm; o and down go per token above v0.
    safety: where the output error that the policy leads to is more than `safety` times the error of going per token
    (with LAE or without), the input goes per token instead. None never asks.
    favour: "static" doubles v0, v1 and what safety allows (faster), "dynamic" halves them (more accurate).
    range, quantile: how large a range a static scale covers, as in `activations`; the policy asks v alone.
    overrides: a linear by its name in the block or a module-name pattern to policy, whatever the range or the error;
    the first match wins.
    """

    type: Literal["fptq"] = "fptq"
    v0: PositiveFloat = 15.0
    v1: PositiveFloat = 150.0
    floor: PositiveFloat = 1.0
    search: bool = True
    paper_policy: bool = False
    safety: float | None = Field(default=1.25, ge=1.0)
    favour: Literal["static", "dynamic", "none"] = "none"
    range: RangeMethod = "minmax"
    quantile: float = Field(default=QUANTILE, ge=0.9, le=1)
    overrides: dict[str, Policy] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _ordered(self) -> Fptq:
        if self.v0 > self.v1:
            raise ValueError(f"v0 ({self.v0:g}) must not be above v1 ({self.v1:g})")
        return self

    def patterns(self) -> tuple[str, ...]:
        return tuple(self.overrides)

    def products(self, n: int, k: int, rows: int) -> float:
        return TRIALS * k * min(n, OUTPUTS) * min(rows, SAMPLE_ROWS)

    def apply(self, work: BlockWork) -> None:
        for target in work.targets.values():
            self._apply(work, target)

    def apply_head(self, work: BlockWork) -> None:
        for target in work.targets.values():
            target.set_act(ActivationQuant(), "head")

    def _apply(self, work: BlockWork, target: Target) -> None:
        policy, reason = self._policy(target)
        equalizable = work.block.spec.edge(target.name) is not None and (
            not self.paper_policy or (policy == "lae" and work.norm(target) is not None)
        )
        dynamic = policy == "dynamic" or (policy == "lae" and not equalizable)
        choice = _Choice(policy != "static" and equalizable, dynamic)
        trial, unscaled = Trial(target), torch.ones(())
        scale = self._scale(work, target, dynamic, trial) if choice.equalize else unscaled
        if self.safety is not None and reason != "override":
            alternatives = {_Choice(choice.equalize, True), _Choice(False, True)}
            errors = {c: trial.error(scale if c.equalize else unscaled, self._act(c.dynamic))
                      for c in {choice, *alternatives}}
            best = min(alternatives, key=lambda c: errors[c])
            ratio = errors[choice] / max(errors[best], 1e-12)
            if ratio > 1 + (self.safety - 1) * self._leniency:
                choice, reason = best, f"{reason}, but {ratio:.2f}x the error"
        if choice.equalize:
            fold(work, target.name, scale)
        target.set_act(self._act(choice.dynamic)(target.stats.amax, target.stats.sample), reason)

    def _act(self, dynamic: bool) -> ChooseAct:
        return lambda amax, x: ActivationQuant() if dynamic else static_act(amax, x, self.range, self.quantile)

    def _scale(self, work: BlockWork, target: Target, dynamic: bool, trial: Trial) -> torch.Tensor:
        """What to divide the input by. [K]"""
        amax = target.stats.amax
        scales = [log_scale(amax, self.floor)]
        if self.search:
            ceiling = torch.log2(2 + amax.max())
            scales += [(amax / (ceiling * fraction)).clamp_min(1) for fraction in SEARCHED_CEILINGS]
        scales = [foldable_scale(work.block, target.name, scale) for scale in scales]
        return trial.best(scales, self._act(dynamic)) if self.search else scales[0]

    @property
    def _leniency(self) -> float:
        return {"static": 2.0, "dynamic": 0.5, "none": 1.0}[self.favour]

    def _policy(self, target: Target) -> tuple[Policy, str]:
        for pattern, policy in self.overrides.items():
            if matches(pattern, target.names):
                return policy, "override"
        if target.range <= self.v0 * self._leniency:
            return "static", "v <= v0"
        if target.range <= self.v1 * self._leniency:
            return "lae", "v0 < v <= v1"
        return "dynamic", "v > v1"


def log_scale(amax: torch.Tensor, floor: float) -> torch.Tensor:
    """LAE: s = m / log2(2 + m) with m = max |x| of each channel. [K]"""
    return (amax / torch.log2(2 + amax)).clamp_min(floor)
