"""LoRA adapters as PEFT saves them, brought to the linears of a model."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from fptq_runtime.artifact.files import is_there
from fptq_runtime.errors import FptqError
from fptq_runtime.kernels.base import Array, LowRank
from fptq_runtime.models.block import BlockSpec, LinearSpec, Model
from fptq_runtime.models.readout import MOVING, READOUT, Bases, Basis, knows_layers
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


def check_base(path: Path, manifest: Manifest, bases: Bases) -> None:
    """Raises AdapterError where an artifact's linears are not those that an adapter was trained beside, and its `bases`
    do not say what became of them."""
    steps = [str(step.get("type")) for step in manifest.recipe.get("steps", ())]
    moving = [step for step in steps if step in MOVING]
    if moving and not (is_there(path / READOUT) and knows_layers(bases)):
        raise AdapterError(
            f"{path} was made with {' and '.join(moving)}, which scale or rotate what its layers read, and has no "
            f"{READOUT} that says how: an adapter of the float model would add to something else. Quantize again (with "
            "another recipe where it has ocs, or os+ for norms with biases), or merge the adapter into the float model "
            "(merge_and_unload) and quantize that")


def read_lora(path: Path, model: Model, bases: Bases = MappingProxyType({})) -> LoRA:
    """Brought to where the model's linears read and write by `bases`. Raises AdapterError for what is no LoRA of this
    model, or has parts that are not applied."""
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
        module = found[1]
        if model.loaded_prefix and module.startswith(model.loaded_prefix):
            module = model.bare_prefix + module.removeprefix(model.loaded_prefix)
        modules.setdefault(module, {})[found[2]] = name
    parts: dict[tuple[str, str], tuple[LowRank, ...]] = {}
    for part in model.parts:
        for linear in part.linears:
            made = tuple(_moved(low_rank, part, linear, bases)
                         for low_rank in _low_ranks(path, config, tensors, modules, part, linear))
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
        if linear.multiplier is not None:
            up = up.astype(np.float32)
            up[order[columns] - first] *= linear.multiplier[columns, None]
        yield LowRank(int(columns[0]), down, _placed(up, order[columns] - first, columns - columns[0]), scale)


def _moved(low_rank: LowRank, part: BlockSpec, linear: LinearSpec, bases: Bases) -> LowRank:
    """For a linear that reads, or whose last rows are read, as `bases` say."""
    if (basis := bases.get((part.name, linear.name))) is not None:
        low_rank = replace(low_rank, down=basis.reader(low_rank.down.astype(np.float64)).astype(low_rank.down.dtype))
    for size, basis in _written(part, linear, bases):
        rows = np.zeros((linear.n, low_rank.up.shape[1]))
        own = slice(low_rank.first, low_rank.first + len(low_rank.up))
        rows[own] = low_rank.up
        rows[-size:] = basis.there(rows[-size:].T).T
        low_rank = replace(low_rank, up=rows[own].astype(low_rank.up.dtype))
    return low_rank


def _written(part: BlockSpec, linear: LinearSpec, bases: Bases) -> Iterator[tuple[int, Basis]]:
    """How many of a linear's last rows another basis than the model's reads."""
    for edge in part.edges:
        basis = bases.get((part.name, edge.readers[0]))
        if edge.writer != linear.name or edge.through is None or basis is None:
            continue
        size = part.linear(edge.readers[0]).k
        if edge.through == "attention":  # query heads that share values read them as one does
            assert part.attention is not None
            kv_heads, values = part.attention.num_kv_heads, part.attention.value_size
            basis = basis.at(np.arange(size).reshape(kv_heads, -1, values // kv_heads)[:, 0].flatten())
            size = values
        yield size, basis
    head = bases.get(("", "head"))
    if linear.name in part.residual and head is not None and head.turn is not None:
        yield linear.n, Basis(turn=head.turn)


def _placed(up: Array, rows: Array, places: Array) -> Array:
    """up's rows where the model has them; zeros between, where others lie there."""
    if np.array_equal(rows, places):
        return up
    placed = np.zeros((places[-1] + 1, up.shape[1]), up.dtype)
    placed[places] = up[rows]
    return placed
