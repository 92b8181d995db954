"""What a recipe's step is, and what it works on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from pydantic import BaseModel, ConfigDict

from fptq_runtime.artifact.numerics import ScaleRule, absmax_scale, dequantize, quantize_weight
from fptq_runtime.artifact.scheme import NumberType
from fptq_runtime.errors import FptqError
from fptq_runtime.kernels.base import ActivationQuant, Linear, Norm, QuantizedWeight
from fptq_runtime.kernels.reference import dequantized, quantize_activations
from fptq_runtime.memory import available_memory
from fptq_runtime.models.block import Block, Model, Stem
from fptq_runtime.models.decoder import Decoder
from fptq_runtime.models.loader import Checkpoint
from fptq_runtime.models.tokenizer import Tokenizer
from fptq_runtime.quantizer.calibrate import HiddenStates, InputStats, observe_block
from fptq_runtime.quantizer.ranges import QUANTILE, RangeMethod, choose_range
from fptq_runtime.quantizer.samples import CalibrationSet

GROUP_SIZES = (128, 64, 32)  # what kernels here and elsewhere take
ERROR_PRODUCTS = 1 << 32  # multiply-adds that one measured output of a linear may cost


class QuantizationError(FptqError):
    """A model that this recipe cannot quantize. One line, for the user."""


class RecipeError(FptqError):
    """A recipe that does not exist, is malformed or does not fit the model. One line, for the user."""


@dataclass(frozen=True)
class Rounding:
    """How the recipe rounds a linear's weights where it takes the nearest; num_bits 16 is not at all."""

    num_bits: Literal[4, 8, 16] = 4
    group_size: int | None = 128
    type: NumberType = "int"
    scales: ScaleRule = "float"

    def group(self, k: int) -> int | None:
        """Of k inputs: the largest of 128, 64 and 32 that divides them and is no larger than was asked for; None, per
        channel, where none does."""
        if self.group_size is None:
            return None
        return next((size for size in GROUP_SIZES if size <= self.group_size and k % size == 0), None)

    def codes(self, weight: torch.Tensor, clip: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes [N, K] and bfloat16 scale [N, G] of weight [N, K], with ranges of `clip` [N, G] times max |w|."""
        group = self.group(weight.shape[1])
        return quantize_weight(weight, self.num_bits, group, clip, torch.bfloat16, self.type, self.scales)

    def __call__(self, weight: torch.Tensor, clip: torch.Tensor | None = None) -> torch.Tensor:
        """What `codes` are read as. float32 [N, K]"""
        return weight if self.num_bits == 16 else dequantize(*self.codes(weight, clip))


@dataclass
class Target:
    """One linear to quantize. Steps change `linear` (folds, then its quantized weight and `act`) and `stats`, which
    follows every transform of the input."""

    name: str  # in its block
    linear: Linear
    modules: tuple[str, ...]  # the checkpoint's names of what is fused here
    stats: InputStats
    rounding: Rounding = Rounding()
    clip: torch.Tensor | None = None  # [N, G], the fraction of max |w| that a step found for each group of weights
    range: float = field(init=False)  # max |x| before any transform
    equalized: bool = False
    reason: str = ""  # why the activations are quantized as they are
    activation_error: float = 0.0
    error: float = 0.0

    def __post_init__(self) -> None:
        self.range = self.stats.range

    @property
    def names(self) -> tuple[str, ...]:
        """What a recipe's patterns may call it."""
        return called(self.name, self.modules)

    @property
    def has_moments(self) -> bool:
        return all(stats.moments is not None for stats in self.stats.parts() if stats.rows)

    def parts(self) -> list[Target]:
        """Each expert with what it alone reads, to be rounded by itself; a linear that is none, itself."""
        count = self.linear.experts
        if count == 1:
            return [self]
        clips = [None] * count if self.clip is None else self.clip.chunk(count)
        width = len(self.modules) // count
        return [Target(self.name, self.linear.expert(i), self.modules[i * width : (i + 1) * width], stats,
                       self.rounding, clip, reason=self.reason)
                for i, (stats, clip) in enumerate(zip(self.stats.experts, clips, strict=True))]

    def join(self, parts: Sequence[Target]) -> None:
        """Take what became of `parts`. Errors are those of the rows that each one read."""
        if parts[0] is self:
            return
        weights: list[Any] = [part.linear.weight for part in parts]
        self.linear.weight = replace(weights[0], packed=torch.cat([weight.packed for weight in weights]),
                                     scale=torch.cat([weight.scale for weight in weights]))
        if self.linear.bias is not None:
            biases: list[Any] = [part.linear.bias for part in parts]
            self.linear.bias = torch.cat(biases)
        rows = [part.stats.rows for part in parts]
        for name in ("error", "activation_error"):
            errors = [getattr(part, name) * count for part, count in zip(parts, rows, strict=True)]
            setattr(self, name, sum(errors) / sum(rows))
        self.reason = "; ".join(dict.fromkeys(part.reason for part in parts))

    @property
    def weight(self) -> torch.Tensor:
        """The float32 weight [N, K]; a step that needs it runs before the weights are quantized."""
        return float_weight(self.linear)

    def set_act(self, act: ActivationQuant | None, reason: str) -> None:
        """How this linear's input is quantized, and why."""
        self.linear.act = act
        self.reason = reason

    def set_weight(self, quantized: QuantizedWeight, correct_bias: bool = False,
                   low_rank: tuple[torch.Tensor, torch.Tensor] | None = None) -> None:
        """Replace the float weight, by `low_rank` (as in `Linear`) too where given, and measure the errors against it.
        correct_bias: where the linear has a bias, take from it what the new weights add to the mean output."""
        rows, act = self.sample_rows(self.weight), self.linear.act
        coded, exact = quantize_activations(rows, act), rows @ self.weight.T
        if act is not None:
            self.activation_error = relative_error(coded @ self.weight.T, exact)
        read = dequantized(quantized)
        if low_rank is not None:
            down, up = low_rank
            read = read + up.float() @ down.float()
        output = coded @ read.T
        if correct_bias and self.linear.bias is not None:
            added = (read - self.weight) @ self.stats.mean  # [N]
            self.linear.bias = self.linear.bias - added
            output = output - added
        self.error = relative_error(output, exact)
        self.linear.weight, self.linear.low_rank = quantized, low_rank

    def keep_float(self, dtype: torch.dtype) -> None:
        """Leave weight and input in float, the weight as `dtype`. Raises QuantizationError where it overflows."""
        kept = self.weight.to(dtype)
        if not bool(torch.isfinite(kept).all()):
            raise QuantizationError(f"{self.linear.name}: weights up to {float(self.weight.abs().max()):g} overflow "
                                    f"{str(dtype).removeprefix('torch.')}; use bf16")
        self.set_act(None, "float")
        rows = self.sample_rows(self.weight)
        self.error = relative_error(rows @ kept.float().T, rows @ self.weight.T)
        self.linear.weight = kept

    def sample_rows(self, weight: torch.Tensor) -> torch.Tensor:
        """As many sampled rows as may be multiplied with such a weight [N, K] to measure an error. [rows, K]"""
        return self.stats.sample[:: self.stats.sample.shape[0] * weight.numel() // ERROR_PRODUCTS | 1]


def float_weight(linear: Linear) -> torch.Tensor:
    """[N, K]. Raises QuantizationError where it is quantized."""
    if isinstance(linear.weight, QuantizedWeight):
        raise QuantizationError(f"{linear.name} is quantized already; transforms go before `weights`")
    weight: torch.Tensor = linear.weight
    return weight


def relative_error(output: torch.Tensor, exact: torch.Tensor) -> float:
    """Mean over rows of |y - exact|² / |exact|². Both [rows, N]"""
    difference = (output - exact).square().sum(-1)
    return float((difference / exact.square().sum(-1).clamp_min(1e-12)).mean()) if len(exact) else 0.0


def static_act(amax: torch.Tensor, sample: torch.Tensor | None = None, method: RangeMethod = "minmax",
               quantile: float = QUANTILE, type: NumberType = "int") -> ActivationQuant:
    """The per-tensor scheme for an input of which amax [K] is the largest magnitude of each channel and `sample`
    [rows, K] some rows; "minmax" needs no sample, and covers all."""
    covered = amax.max()
    if method != "minmax":
        assert sample is not None
        covered = torch.tensor(choose_range(method, float(covered), sample, quantile))
    return ActivationQuant(float(absmax_scale(covered, 8, type)), type)


@dataclass(frozen=True)
class TuneWork:
    """A float model before its blocks are walked. `steps` are the recipe's. `directory` is the step's to keep state in;
    it outlives an interrupted run and is removed with a finished one."""

    checkpoint: Checkpoint
    tokenizer: Tokenizer
    steps: tuple[Step, ...]
    calibrated: CalibrationSet
    directory: Path
    progress: bool


@dataclass(frozen=True)
class RefineWork:
    """A whole quantized model before it is written, for the reference backend but for its linears and norms, which a
    step may change. `checkpoint` is the float model, `windows` the calibration samples."""

    checkpoint: Checkpoint
    decoder: Decoder
    windows: Sequence[Sequence[int]]
    progress: bool


@dataclass
class BlockWork:
    """A block, or the head, in the quantizer's hands. `states` are the calibration samples on their way into it,
    through quantized blocks; `exact` the same through float ones, where a step `wants_exact`."""

    model: Model
    block: Block
    targets: Mapping[str, Target]  # by the names of the block's linears that are quantizable
    states: HiddenStates
    exact: HiddenStates | None = None

    @property
    def is_head(self) -> bool:
        return self.block.spec is self.model.head

    def norm(self, target: Target) -> Norm | None:
        """The norm that writes this linear's input; None where something else does."""
        edge = self.block.spec.edge(target.name)
        if edge is None or edge.through is not None:
            return None
        norm: Norm = self.block.norms[edge.writer]
        return norm


def observe(model: Model, block: Block, states: HiddenStates, weights: Rounds | None = None,
            exact: HiddenStates | None = None) -> BlockWork:
    """A float block with what its linears read, observed on `states`. weights: the step that will round them, which
    decides how. exact: the states through float blocks, where a step `wants_exact`; they go on through this one, but
    not through the head."""
    head = block.spec is model.head
    stats = observe_block(states, block, moments=weights is not None and weights.wants_moments(head),
                          exact=None if head else exact)
    targets = {name: Target(name, block.linears[name], block.spec.modules(name), stats[name])
               for name in block.spec.quantizable}
    if weights is not None:
        for target in targets.values():
            target.rounding = weights.rounding(target.names, head)
    return BlockWork(model, block, targets, states)


class Rounds(Protocol):
    def wants_moments(self, head: bool) -> bool:
        """Whether `InputStats.moments` are needed of a block's, or the head's, linears."""
        ...

    def rounding(self, names: tuple[str, ...], head: bool) -> Rounding:
        """Of a linear by its `Target.names`."""
        ...


class Step(BaseModel):
    """One step of a recipe: its settings, and what it does to each block and to the head.

    A method is a subclass with a `type` of its own, listed in recipe.py. `tune` sees the whole model, before all
    else. The `transform_*` of all steps run next, on the float part as the checkpoint has it and before its inputs are
    observed: exact changes that need no data. Then `apply` of all steps, with what was observed. The head is a block
    like the others, but what a step does to it is its own question, `apply_head`. `refine` sees the whole again.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    @property
    def wants_exact(self) -> bool:
        """Whether `BlockWork.exact` is needed: more passes over the calibration samples."""
        return False

    @property
    def reads_inputs(self) -> bool:
        """Whether what calibration observes decides anything but the reported errors."""
        return type(self).apply is not Step.apply

    @property
    def parameter_bytes(self) -> int:
        """Of memory that each parameter of the whole model takes at once."""
        return 0

    def products(self, n: int, k: int, rows: int) -> float:
        """About how many multiply-adds it takes for a block's linear [n, k] that reads so many calibration rows,
        beside running the block."""
        return 0

    def trained_tokens(self, calibrated: int) -> int:
        """How many the whole model is trained on, of that many to calibrate on."""
        return 0

    def moments_bytes(self, k: int) -> int:
        """Of memory that it keeps of the k inputs of a linear."""
        return 0

    def check(self, model: Model) -> None:
        """Raise QuantizationError, naming the family, where this step cannot work on such a model."""

    def tune(self, work: TuneWork) -> Checkpoint | None:
        """Train the model before anything else is done. Returns the float checkpoint to quantize instead, or None."""
        return None

    def transform_config(self, model: Model, config: dict[str, Any]) -> dict[str, Any]:
        """The config.json that the transforms lead to."""
        return config

    def transform_stem(self, model: Model, stem: Stem) -> None:
        """Change the embedding. Parameters are replaced, never written into: they may be mapped from a file."""

    def transform_block(self, model: Model, block: Block) -> None:
        """Change the norms and linears of a block or of the head. Raises QuantizationError."""

    def apply(self, work: BlockWork) -> None:
        """Change a block. Raises QuantizationError."""

    def apply_head(self, work: BlockWork) -> None:
        """Change the head. Raises QuantizationError."""

    def refine(self, work: RefineWork) -> None:
        """Change what rounding left free, in all blocks together, before anything is written."""

    def patterns(self) -> tuple[str, ...]:
        """Patterns of `Target.names` among the settings; each must name a linear of the model."""
        return ()


def called(name: str, modules: tuple[str, ...]) -> tuple[str, ...]:
    """What patterns may call a linear: "experts.up" and "shared.up" are "up" too."""
    return name, name.rpartition(".")[2], *modules


def matches(pattern: str, names: tuple[str, ...]) -> bool:
    """Shell-style, as in "down", "*.down_proj" or "model.layers.[01].*"."""
    return any(fnmatchcase(name, pattern) for name in names)


def refuse_too_large(step: str, checkpoint: Checkpoint, parameter_bytes: int, device: str = "cpu") -> None:
    """Raises QuantizationError where so many bytes a parameter are more than the device has."""
    needed = parameter_bytes * checkpoint.num_parameters
    available = torch.cuda.mem_get_info()[0] if device == "cuda" else available_memory()
    if available is not None and needed > available:
        raise QuantizationError(f"{step} needs {needed >> 20} MB of memory for this model, and {available >> 20} MB "
                                f"are available on {device}; quantize it without training")

