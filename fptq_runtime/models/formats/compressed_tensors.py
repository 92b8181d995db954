"""compressed-tensors, both ways: its names and packing, and what its `quantization_config` says of which linear.

Integers are read pack-quantized or int-quantized, and written pack-quantized; FP4 is nvfp4-pack-quantized without a
global scale, for which its kernels elsewhere have no groups but 16; FP8 is float-quantized. Beyond its vocabulary, and
ignored by others with a warning: a linear's `low_rank_down` [r, K] and `low_rank_up` [N, r].
"""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from fptq_runtime.artifact.scheme import LayerScheme, QuantizationArgs, SchemeError
from fptq_runtime.kernels.base import Array, Embedding, Linear, Norm, QuantizedWeight
from fptq_runtime.models.formats.facts import refuse_unknown
from fptq_runtime.models.tensors import CheckpointError, Tensors
from fptq_runtime.models.weights import Stored, pack, runnable, unpack

logger = logging.getLogger(__name__)

CONFIG_READ = ("quant_method", "format", "config_groups", "ignore", "kv_cache_scheme")
CONFIG_HARMLESS = ("quantization_status", "global_compression_ratio", "version", "compression_ratio", "run_compressed",
                   "provider", "producer")
HEAD = "lm_head"  # as transformers names every head, also where the checkpoint has another name (GPT-NeoX)
GROUP_READ = ("weights", "input_activations", "output_activations", "targets", "format")
ARGS_READ = ("num_bits", "type", "symmetric", "strategy", "group_size", "dynamic")
ARGS_HARMLESS = ("observer", "observer_kwargs", "actorder", "scale_dtype", "zp_dtype")  # a g_idx says what actorder did


class CompressedTensors:
    """A checkpoint's `quantization_config`, asked module by module. Raises SchemeError for what it cannot apply."""

    dequantizes = False

    def __init__(self, config: Mapping[str, Any], tensors: Tensors) -> None:
        self._tensors = tensors
        refuse_what_is_online(config)
        groups = config.get("config_groups")
        if not isinstance(groups, Mapping) or not groups:
            raise SchemeError("quantization_config has no config_groups")
        if config.get("kv_cache_scheme") is not None:
            logger.warning("kv_cache_scheme is not applied: the KV cache's type is chosen when serving")
        self._ignored, self._ignore = _names(config.get("ignore") or [])
        self._exact: dict[str, _Group] = {}
        self._groups: list[tuple[list[re.Pattern[str]], bool, _Group]] = []
        self._found: dict[str, _Group | None] = {}  # of modules asked for: a mixture of experts has thousands
        for name, data in groups.items():
            group = _Group(name, data, config.get("format"))
            whole, patterns = _names(group.targets)
            self._exact |= dict.fromkeys(whole - {"Linear"}, group)
            self._groups.append((patterns, "Linear" in whole, group))

    def scheme(self, name: str) -> LayerScheme | None:
        group = self._group(name)
        return None if group is None else group.scheme

    def has(self, name: str) -> bool:
        return self._tensors.shape(f"{name}.weight_packed") is not None

    def read(self, name: str, n: int, k: int, notes: Counter[str]) -> QuantizedWeight | Array:
        group = self._group(name)
        assert group is not None
        args = group.scheme.weights
        if args.type == "float":
            return _float_codes(self._tensors, name, n, k, args)
        integers = _int_quantized if group.packing == "int-quantized" else _pack_quantized
        return runnable(name, integers(self._tensors, name, n, k, args), k, notes)

    def _group(self, module: str) -> _Group | None:
        if module not in self._found:
            self._found[module] = self._find_group(module)
        return self._found[module]

    def _find_group(self, module: str) -> _Group | None:
        """Exact names go before patterns, patterns before the class name `Linear`, as in compressed-tensors."""
        if module in self._ignored or any(pattern.match(module) for pattern in self._ignore):
            return None
        if module in self._exact:
            return self._exact[module]
        for patterns, _, group in self._groups:
            if any(pattern.match(module) for pattern in patterns):
                return group
        return next((group for _, every_linear, group in self._groups if every_linear), None)


def refuse_what_is_online(config: Mapping[str, Any]) -> None:
    """Raise SchemeError for facts of a quantization_config that would have to be applied while the model runs."""
    if config.get("transform_config"):
        raise SchemeError("quantization_config: transform_config asks for transforms while the model runs (online "
                          "rotations), which are not supported; quantize the float model with the step `rotation`, "
                          "which costs nothing at run time")
    sparsity = config.get("sparsity_config")
    if sparsity and (not isinstance(sparsity, Mapping) or sparsity.get("format") not in (None, "dense")):
        raise SchemeError("quantization_config: sparsity_config is not supported; save the model dense")
    refuse_unknown(config, "quantization_config", (*CONFIG_READ, "transform_config", "sparsity_config"),
                   CONFIG_HARMLESS)


class _Group:
    """One of `config_groups`."""

    def __init__(self, name: str, data: Any, packing: Any) -> None:
        if not isinstance(data, Mapping) or not isinstance(data.get("weights"), Mapping):
            raise SchemeError(f"config group {name!r} has no weights")
        refuse_unknown(data, f"config group {name!r}", GROUP_READ, ())
        if data.get("output_activations"):
            raise SchemeError(f"config group {name!r} quantizes output activations, which is not supported")
        act = data.get("input_activations")
        weights = _read_args(data["weights"], name)
        self.scheme = LayerScheme(weights, _read_args(act, name) if act else None)
        self.packing = data.get("format") or packing
        self.targets = data.get("targets") or []
        if self.packing == "naive-quantized":  # codes as they are, a tensor of int8 or FP8
            self.packing = "int-quantized" if weights.type == "int" else weights.format
        if self.packing != weights.format and (self.packing, weights.type) != ("int-quantized", "int"):
            raise SchemeError(f"config group {name!r} has format {self.packing!r}; of {weights.num_bits}-bit "
                              f"{weights.type} weights only {weights.format}"
                              f"{' and int-quantized are' if weights.type == 'int' else ' is'} supported")


def _read_args(data: Any, group: str) -> QuantizationArgs:
    if not isinstance(data, Mapping):
        raise SchemeError(f"config group {group!r}: malformed quantization args {data!r}")
    refuse_unknown(data, f"config group {group!r}", ARGS_READ, ARGS_HARMLESS)
    if data.get("dynamic") not in (None, True, False):
        raise SchemeError(f"config group {group!r}: dynamic {data['dynamic']!r} is not supported")
    return QuantizationArgs.from_dict(data)


def _names(targets: Any) -> tuple[set[str], list[re.Pattern[str]]]:
    """Modules' whole names, and `re:` patterns, which match from the start of a name."""
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise SchemeError(f"targets and ignore must be lists of strings, not {targets!r}")
    try:
        return ({target for target in targets if not target.startswith("re:")},
                [re.compile(target[3:]) for target in targets if target.startswith("re:")])
    except re.error as error:
        raise SchemeError(f"malformed pattern among {targets!r}: {error}") from None


def _float_codes(tensors: Tensors, name: str, n: int, k: int, args: QuantizationArgs) -> QuantizedWeight:
    group = _group(name, k, args)
    packed = (tensors.get(f"{name}.weight_packed", (n, math.ceil(k / 2)), ("U8",)) if args.num_bits == 4 else
              tensors.get(f"{name}.weight", (n, k), ("F8_E4M3",)))
    scale = tensors.get(f"{name}.weight_scale", (n, k // group))
    if not np.isfinite(scale).all():
        raise CheckpointError(f"{name}.weight_scale holds values that are not finite")
    return QuantizedWeight(packed, scale, _bits(args), group, "float")


def _pack_quantized(tensors: Tensors, name: str, n: int, k: int, args: QuantizationArgs) -> Stored:
    shape = tensors.get(f"{name}.weight_shape", (2,), ("I64", "I32"))
    if shape.tolist() != [n, k]:
        raise CheckpointError(f"{name}.weight_shape is {shape.tolist()}, but config.json asks for {[n, k]}")
    packed = tensors.get(f"{name}.weight_packed", (n, math.ceil(k * args.num_bits / 32)), ("I32",))
    return _compressed(tensors, name, n, k, args, packed)


def _int_quantized(tensors: Tensors, name: str, n: int, k: int, args: QuantizationArgs) -> Stored:
    codes = tensors.get(f"{name}.weight", (n, k), ("I8",))
    limit = 2 ** (args.num_bits - 1)
    if not -limit <= codes.min() <= codes.max() < limit:
        raise CheckpointError(f"{name}.weight holds codes that are not of {args.num_bits} bits")
    return _compressed(tensors, name, n, k, args, pack(codes, args.num_bits))


def _compressed(tensors: Tensors, name: str, n: int, k: int, args: QuantizationArgs, packed: Array) -> Stored:
    """What both of compressed-tensors' integer formats have beside the codes."""
    group = _group(name, k, args)
    groups = k // group
    if args.strategy == "tensor":
        scale = np.broadcast_to(tensors.get(f"{name}.weight_scale", (1,)), (n, 1))
    else:
        scale = tensors.get(f"{name}.weight_scale", (n, groups))
    zero = None
    if not args.symmetric:
        point = f"{name}.weight_zero_point"
        if args.strategy == "tensor":
            zero = np.broadcast_to(tensors.get(point, (1,), ("I8",)), (n, 1))
        elif tensors.shape(point) == (n, groups):
            zero = tensors.get(point, (n, groups), ("I8",))
        else:  # packed along the rows
            words = tensors.get(point, (math.ceil(n * args.num_bits / 32), groups), ("I32",))
            zero = unpack(words.T, args.num_bits, n).T
        zero = zero.astype(np.int16)
    g_idx = None
    if tensors.shape(f"{name}.weight_g_idx") is not None:
        g_idx = tensors.get(f"{name}.weight_g_idx", (k,), ("I32", "I64"))
        g_idx = None if (g_idx == -1).all() else g_idx  # compressed-tensors' word for none
    return Stored(packed, scale, _bits(args), group, zero, g_idx)


def _group(name: str, k: int, args: QuantizationArgs) -> int:
    group = args.group_size or k
    if k % group:
        raise CheckpointError(f"{name}: {k} input features are not a multiple of the group size {group}")
    return group


def _bits(args: QuantizationArgs) -> Literal[4, 8]:
    return 4 if args.num_bits == 4 else 8


def module_tensors(name: str, module: Linear | Norm | Embedding) -> dict[str, Array]:
    """A module's tensors under their names in the file."""
    weight = module.weight
    if isinstance(weight, QuantizedWeight):
        whole = (weight.type, weight.num_bits) == ("float", 8)
        tensors = {
            f"{name}.weight" if whole else f"{name}.weight_packed": weight.packed,
            f"{name}.weight_scale": weight.scale,
        }
        if weight.type == "int":
            tensors[f"{name}.weight_shape"] = np.array([weight.packed.shape[0], weight.k], dtype=np.int64)
        if isinstance(module, Linear) and module.act is not None and module.act.scale is not None:
            tensors[f"{name}.input_scale"] = np.array([module.act.scale], dtype=np.float32)
    else:
        tensors = {f"{name}.weight": weight}
    if not isinstance(module, Embedding) and module.bias is not None:
        tensors[f"{name}.bias"] = module.bias
    if isinstance(module, Linear) and module.low_rank is not None:
        down, up = module.low_rank
        tensors |= {f"{name}.low_rank_down": down, f"{name}.low_rank_up": up}
    return tensors


def linear_scheme(linear: Linear) -> LayerScheme | None:
    """None where the weights are in float."""
    weight = linear.weight
    if not isinstance(weight, QuantizedWeight):
        return None
    per_channel = weight.group_size == weight.k
    weights = QuantizationArgs(num_bits=weight.num_bits, strategy="channel" if per_channel else "group",
                               group_size=None if per_channel else weight.group_size, type=weight.type)
    act = linear.act
    if act is None:
        return LayerScheme(weights, None)
    dynamic = act.scale is None
    return LayerScheme(weights, QuantizationArgs(num_bits=8, strategy="token" if dynamic else "tensor", dynamic=dynamic,
                                                 type=act.type))


def quantization_config(schemes: Mapping[str, LayerScheme], head: str, ignore: Sequence[str],
                        renamed: tuple[str, str] = ("", "")) -> dict[str, Any]:
    """config.json's quantization_config for modules by name; `head` is the module that gets a group of its own.
    renamed: a prefix of theirs, and what transformers has in its place where that is not empty.

    Every group says its format itself: without it the loader of transformers infers another and leaves the weights
    uninitialised.
    """
    groups: dict[str, dict[str, Any]] = {}
    for module, scheme in schemes.items():
        act = scheme.input_activations
        name = "head" if module == head else "float" if act is None else "dynamic" if act.dynamic else "static"
        if module != head:
            name += "_fp8" * (act is not None and act.type == "float")
            size = scheme.weights.group_size
            name += "_channel" if size is None else f"_group{size}" * (size != 128)
            name += f"_{scheme.weights.num_bits}bit" * (scheme.weights.num_bits != 4)
            name += "_float" * (scheme.weights.type == "float")
        group = groups.setdefault(name, {
            "format": scheme.weights.format,
            "weights": scheme.weights.to_dict(),
            "input_activations": None if act is None else act.to_dict(),
            "output_activations": None,
            "targets": {},
        })
        group["targets"] |= dict.fromkeys([_target(module)] if module != head or head == HEAD else [module, HEAD])
        if renamed[1] and module.startswith(renamed[0]):
            group["targets"][_target(renamed[1] + module.removeprefix(renamed[0]))] = None
    for group in groups.values():
        group["targets"] = list(group["targets"])
    formats = {group["format"] for group in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(ignore),
        "kv_cache_scheme": None,
    }


def _target(module: str) -> str:
    """One for all experts of a layer, by the pattern that transformers looks for; else the module's own name."""
    before, found, after = module.partition(".experts.")
    index, dot, name = after.partition(".")
    if not (found and dot and index.isdecimal()):
        return module
    return rf"re:{re.escape(before)}\.experts\.\d+\.{re.escape(name)}$"
