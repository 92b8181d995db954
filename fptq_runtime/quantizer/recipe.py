"""A recipe: the ordered steps that make a float model a quantized one, from a preset or a YAML file."""

from __future__ import annotations

import difflib
import inspect
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fptq_runtime.quantizer.steps.activations import Activations
from fptq_runtime.quantizer.steps.awq import Awq
from fptq_runtime.quantizer.steps.base import RecipeError
from fptq_runtime.quantizer.steps.distill import Distill
from fptq_runtime.quantizer.steps.equalization import Aweq, CrossLayer
from fptq_runtime.quantizer.steps.fptq import Fptq
from fptq_runtime.quantizer.steps.gptq import Gptq
from fptq_runtime.quantizer.steps.outlier_suppression import OutlierSuppression
from fptq_runtime.quantizer.steps.qat import Qat
from fptq_runtime.quantizer.steps.rotation import Rotation
from fptq_runtime.quantizer.steps.smoothquant import SmoothQuant
from fptq_runtime.quantizer.steps.splitting import ChannelSplitting
from fptq_runtime.quantizer.steps.weights import Weights

MAX_RECIPE_BYTES = 1 << 20

AnyStep = Annotated[
    Qat | Rotation | CrossLayer | ChannelSplitting | Fptq | SmoothQuant | OutlierSuppression | Aweq | Awq | Activations
    | Weights | Gptq | Distill,
    Field(discriminator="type"),
]


class Recipe(BaseModel):
    """Steps run in order on each block, then on the head; the last must quantize the weights, `distill` apart."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    steps: tuple[AnyStep, ...] = Field(min_length=1)

    def __init__(self, **data: Any) -> None:
        """Raises RecipeError where pydantic would list every problem."""
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise RecipeError(_one_line(error)) from None
        refining = isinstance(self.steps[-1], Distill)
        rounding = self.steps[:-1] if refining else self.steps
        quantizing = [isinstance(step, Weights) for step in rounding]
        if quantizing.count(True) != 1 or not quantizing[-1] or any(isinstance(step, Distill) for step in rounding):
            raise RecipeError("a recipe ends with one step that quantizes the weights, 'weights' or 'gptq', and then "
                              "'distill' where their scales are to be trained")
        if refining and self.weights.scales != "float":
            raise RecipeError(f"distill finds scales of any size; scales {self.weights.scales!r} goes without it")
        if sum(isinstance(step, Rotation) for step in self.steps) > 1:
            raise RecipeError("two rotations are one: leave out all 'rotation' steps but one")
        if not any(isinstance(step, Fptq | Activations) for step in self.steps):
            raise RecipeError("a recipe needs a step that chooses activation schemes: 'fptq' or 'activations'")
        if any(isinstance(step, Qat) for step in self.steps):
            self._check_trained()

    def _check_trained(self) -> None:
        """Training rounds as these steps do; whatever moved the grid afterwards would undo it."""
        if [type(step) for step in self.steps] != [Qat, Activations, Weights]:
            raise RecipeError("a recipe that trains has three steps: 'qat', 'activations', 'weights'")
        if self.weights.clip != "none" or self.weights.bias_correction or self.weights.lorc:
            raise RecipeError("after 'qat', 'weights' takes no clip (qat has its own), bias_correction or lorc")

    @property
    def reads_inputs(self) -> bool:
        """Whether it matters what it is calibrated on."""
        return any(step.reads_inputs for step in self.steps)

    @property
    def weights(self) -> Weights:
        """The step that quantizes them."""
        return next(step for step in self.steps if isinstance(step, Weights))


PRESETS = (
    Recipe(name="fptq-max", steps=(
        Rotation(optional=True), Activations(scheme="dynamic"),
        Gptq(group_size=64, asymmetric=0.25, refits=2, descents=4), Distill())),
    Recipe(name="fptq-best", steps=(
        Rotation(optional=True), Fptq(safety=1.0), Gptq(asymmetric=0.25, refits=2))),
    Recipe(name="fptq", steps=(Rotation(optional=True), Fptq(), Gptq(asymmetric=0.25))),
    Recipe(name="fptq-gpu", steps=(
        Rotation(optional=True), Fptq(safety=1.0), Gptq(asymmetric=0.25, scales="two-level"))),
    Recipe(name="rtn", steps=(Activations(scheme="static"), Weights())),
    Recipe(name="rtn-dynamic", steps=(Activations(scheme="dynamic"), Weights())),
    Recipe(name="os+", steps=(
        OutlierSuppression(), Activations(scheme="static", overrides={"down": "dynamic"}), Weights())),
    Recipe(name="aweq", steps=(Aweq(), Activations(scheme="dynamic"), Weights(bias_correction=True))),
    Recipe(name="cle", steps=(CrossLayer(), Activations(scheme="dynamic"), Weights())),
    Recipe(name="ocs", steps=(ChannelSplitting(), Activations(scheme="dynamic"), Weights())),
    Recipe(name="qat", steps=(Qat(), Activations(scheme="dynamic"), Weights())),
    Recipe(name="zeroquant-fp", steps=(
        Activations(scheme="dynamic", grid="float"), Gptq(grid="float", scales="m2", lorc=8))),
    Recipe(name="gptq", steps=(Activations(scheme="float"), Gptq(head_bits=16))),
    Recipe(name="awq", steps=(Awq(), Activations(scheme="float"), Weights(head_bits=16))),
    Recipe(name="smoothquant", steps=(
        SmoothQuant(), Activations(scheme="static", overrides={"down": "dynamic"}),
        Weights(num_bits=8, group_size=None))),
    Recipe(name="w8a8-static", steps=(Rotation(optional=True), Activations(scheme="static", range="mse"),
                                      Weights(num_bits=8, group_size=None, clip="mse"))),
    Recipe(name="w8a8-dynamic", steps=(Rotation(optional=True), Activations(scheme="dynamic"),
                                       Weights(num_bits=8, group_size=None, clip="mse"))),
    Recipe(name="w8-dynamic-range", steps=(Activations(scheme="dynamic"), Weights(num_bits=8, group_size=None))),
    Recipe(name="bf16", steps=(Activations(scheme="float"), Weights(num_bits=16, head_bits=16))),
    Recipe(name="fp16", steps=(Activations(scheme="float"), Weights(num_bits=16, head_bits=16, dtype="fp16"))),
)


def load_recipe(name_or_path: str | Path) -> Recipe:
    """A preset by name, or a YAML file of `steps` (and optionally `name`). Raises RecipeError."""
    presets = {preset.name: preset for preset in PRESETS}
    path = Path(name_or_path)
    if str(name_or_path) in presets:
        return presets[str(name_or_path)]
    if not path.is_file():
        close = difflib.get_close_matches(str(name_or_path), presets, 1)
        meant = f"; did you mean {close[0]!r}?" if close else ""
        raise RecipeError(f"{str(name_or_path)!r} is neither a preset ({', '.join(presets)}) nor a file{meant}")
    try:
        if path.stat().st_size > MAX_RECIPE_BYTES:
            raise RecipeError(f"{path} is too large to be a recipe")
        data = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise RecipeError(f"{path} is not readable YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise RecipeError(f"{path} must hold a mapping with 'steps'")
    try:
        return Recipe(**{"name": path.stem, **data})
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from None


def recipe_text(recipe: Recipe) -> str:
    """As a YAML file, each step below what it does and what its settings mean."""
    lines = [f"name: {recipe.name}", "steps:"]
    for step in recipe.steps:
        documented = [each for each in type(step).__mro__ if "type" in vars(each).get("__annotations__", {})]
        for kind in reversed(documented):
            lines += ["", *(f"# {line}".rstrip() for line in inspect.cleandoc(kind.__doc__ or "").splitlines())]
        first, *more = yaml.safe_dump(step.model_dump(mode="json"), sort_keys=False).splitlines()
        lines += [f"- {first}", *(f"  {line}" for line in more)]
    return "\n".join(lines)


def _one_line(error: ValidationError) -> str:
    """The first problem, and where it is: `steps.0.fptq.v2: unknown field`."""
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"]))
    message = "unknown field" if first["type"] == "extra_forbidden" else first["msg"].removeprefix("Value error, ")
    return f"{where}: {message.replace(' after validation', '')}"
