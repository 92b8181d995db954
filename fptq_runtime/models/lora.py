"""LoRA adapters as PEFT saves them, brought to the linears of a model."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fptq_runtime.artifact.files import is_there
from fptq_runtime.errors import FptqError
from fptq_runtime.kernels.base import Array, LowRank
from fptq_runtime.models.block import BlockSpec, LinearSpec, Model
from fptq_runtime.models.tensors import Tensors, read_json

if TYPE_CHECKING:  # pydantic is not where gpu-check runs
    from fptq_runtime.artifact.io import Manifest

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MAX_RANK = 512
# Of adapter_config.json: what is read, and what says where an adapter is from or how it was trained.
READ = ("peft_type", "r", "lora_alpha", "use_rslora", "alpha_pattern", "bias")
HARMLESS = ("auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config",
            "exclude_modules", "fan_in_fan_out", "inference_mode", "layers_pattern", "layers_to_transform",
            "loftq_config", "lora_dropout", "megatron_core", "peft_version", "qalora_group_size", "rank_pattern",
            "revision", "runtime_config", "target_modules", "task_type")
BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")  # of init_lora_weights
# Steps of a recipe that give linears inputs or outputs of their own, which an adapter of the float model knows nothing
# of.
MOVING = ("rotation", "cle", "ocs", "fptq", "smoothquant", "os+", "aweq", "awq")
_TENSOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])(?:\.default)?\.weight")


class AdapterError(FptqError):
    """An adapter that cannot be read or applied. One line, for the user."""

    def __init__(self, message: str) -> None:
        super().__init__(message, "lora")


@dataclass(frozen=True)
class LoRA:
    """parts: of each linear, by its part's name and its own. digest: of what the adapter holds."""

    digest: bytes
    parts: Mapping[tuple[str, str], tuple[LowRank, ...]]


def check_base(path: Path, manifest: Manifest) -> None:
    """Raises AdapterError where an artifact's linears are not those that an adapter was trained beside."""
    steps = [str(step.get("type")) for step in manifest.recipe.get("steps", ())]
    moving = [step for step in steps if step in MOVING]
    if moving:
        raise AdapterError(
            f"{path} was made with {' and '.join(moving)}, which scale or rotate what its layers read: an adapter of "
            "the float model would add to something else. Quantize with --recipe rtn-dynamic or w8-dynamic-range, or "
            "merge the adapter into the float model (merge_and_unload) and quantize that")


def read_lora(path: Path, model: Model) -> LoRA:
    """Raises AdapterError for what is no LoRA of this model, or has parts that are not applied."""
    if not path.is_dir() or not is_there(path / CONFIG):
        raise AdapterError(f"{path} is no directory with an {CONFIG}")
    config = read_json(path / CONFIG)
    _check(path, config)
    if not is_there(path / WEIGHTS):
        raise AdapterError(f"{path} has no {WEIGHTS}; save it with safetensors")
    tensors = Tensors(path, "", files=(WEIGHTS,))
    modules: dict[str, dict[str, str]] = {}
    for name in tensors.names:
        if (found := _TENSOR.fullmatch(name)) is None:
            raise AdapterError(f"{path}: {name} is no lora_A or lora_B of a linear layer; nothing else is applied")
        modules.setdefault(found[1], {})[found[2]] = name
    parts: dict[tuple[str, str], tuple[LowRank, ...]] = {}
    for part in model.parts:
        for linear in part.linears:
            made = tuple(_low_ranks(path, config, tensors, modules, part, linear))
            if made:
                parts[part.name, linear.name] = made
    if modules:
        raise AdapterError(f"{path}: {min(modules)} is no linear layer that an adapter can be applied to in this model")
    from fptq_runtime.artifact.io import hash_file

    digest = blake2b(f"{hash_file(path / CONFIG)} {hash_file(path / WEIGHTS)}".encode(), digest_size=16).digest()
    return LoRA(digest, parts)


def _check(path: Path, config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"{path}: its peft_type is {config.get('peft_type')!r}; only LORA is applied")
    if config.get("bias", "none") != "none":
        raise AdapterError(f"{path}: bias {config['bias']!r} is not applied, only 'none'")
    for name, value in config.items():
        if name == "init_lora_weights":
            if isinstance(value, str) and value.lower().startswith(BASE_CHANGING):
                raise AdapterError(f"{path}: init_lora_weights {value!r} changes the model itself; save the adapter "
                                   "with path_initial_model_for_weight_conversion")
        elif name not in READ + HARMLESS and value:
            raise AdapterError(f"{path}: {name} is not applied; a LoRA of linear layers alone is")


def _low_ranks(path: Path, config: Mapping[str, Any], tensors: Tensors, modules: dict[str, dict[str, str]],
               part: BlockSpec, linear: LinearSpec) -> Iterator[LowRank]:
    """Of the modules that a linear stacks; they are taken out of `modules`."""
    if linear.experts > 1:
        return
    order = np.arange(linear.n) if linear.order is None else np.asarray(linear.order)
    start = 0
    for module, size in zip(part.modules(linear.name), linear.sizes, strict=True):
        names, first, start = modules.pop(module, None), start, start + size
        if names is None:
            continue
        if len(names) < 2:
            raise AdapterError(f"{path}: {module} has only one of lora_A and lora_B")
        rank = (tensors.shape(names["A"]) or (0,))[0]
        if not 1 <= rank <= MAX_RANK:
            raise AdapterError(f"{path}: the rank of {module} is {rank}; up to {MAX_RANK} are applied")
        down, up = tensors.get(names["A"], (rank, linear.k)), tensors.get(names["B"], (size, rank))
        alpha = next((float(value) for pattern, value in (config.get("alpha_pattern") or {}).items()
                      if re.match(rf"(.*\.)?({pattern})$", module)), float(config.get("lora_alpha", 8)))
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        columns = np.flatnonzero((order >= first) & (order < start))
        yield LowRank(int(columns[0]), down, _placed(up, order[columns] - first, columns - columns[0]), scale)


def _placed(up: Array, rows: Array, places: Array) -> Array:
    """up's rows where the model has them; zeros between, where others lie there."""
    if np.array_equal(rows, places):
        return up
    placed = np.zeros((places[-1] + 1, up.shape[1]), up.dtype)
    placed[places] = up[rows]
    return placed
