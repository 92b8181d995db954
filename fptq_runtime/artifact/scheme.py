"""The vocabulary of schemes, word for word compressed-tensors' own (`config_groups` of `quantization_config`), and
the configs of GPTQ and AWQ in it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fptq_runtime.errors import FptqError

Strategy = Literal["tensor", "token", "channel", "group"]
NumberType = Literal["int", "float"]
Format = Literal["pack-quantized", "int-quantized", "gptq", "gptq_v2", "awq"]


class SchemeError(FptqError):
    """A scheme that is malformed or that this runtime does not run."""


@dataclass(frozen=True)
class QuantizationArgs:
    """How one tensor is quantized: integers of `num_bits`, or symmetric floats: FP4 E2M1 and FP8 E4M3.

    Weights: strategy "group" (`group_size` set), "channel", which FP8 always is, or "tensor". Activations: symmetric,
    "tensor" with dynamic=False (static; the layer stores `input_scale` [1]) or "token" with dynamic=True.
    """

    num_bits: int
    strategy: Strategy
    group_size: int | None = None
    dynamic: bool = False
    symmetric: bool = True
    type: NumberType = "int"

    def __post_init__(self) -> None:
        if self.type not in ("int", "float") or (self.type == "float" and not self.symmetric):
            raise SchemeError(f"only integers and symmetric floats are supported, not {self.type}, "
                              f"symmetric={self.symmetric}")
        if self.num_bits not in (4, 8):
            raise SchemeError(f"num_bits must be 4 or 8, not {self.num_bits}")
        if (self.strategy == "group") != (self.group_size is not None):
            raise SchemeError(f"group_size goes with strategy 'group', not with {self.strategy!r}")
        if self.group_size is not None and self.group_size < 1:
            raise SchemeError(f"group_size must be positive, not {self.group_size}")
        if self.type == "float" and self.group_size not in (None, 32, 64, 128):
            raise SchemeError(f"of floats group_size must be 32, 64 or 128, not {self.group_size}")

    @property
    def format(self) -> str:
        """compressed-tensors' name for how such weights are stored.

        Its nvfp4 reader takes any group where there is no global scale; its nvfp4 writer, and vLLM's kernels, only 16.
        """
        if self.type == "int":
            return "pack-quantized"
        return "nvfp4-pack-quantized" if self.num_bits == 4 else "float-quantized"

    def to_dict(self) -> dict[str, Any]:
        return {
            "num_bits": self.num_bits,
            "type": self.type,
            "symmetric": self.symmetric,
            "strategy": self.strategy,
            "group_size": self.group_size,
            "dynamic": self.dynamic,
            **({"scale_dtype": "torch.bfloat16"} if self.format == "nvfp4-pack-quantized" else {}),  # or they take FP8
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> QuantizationArgs:
        try:
            strategy = data.get("strategy") or _strategy(data)
            return cls(
                num_bits=int(data["num_bits"]),
                strategy=strategy,
                group_size=int(data["group_size"]) if strategy == "group" else None,
                dynamic=bool(data.get("dynamic", False)),
                symmetric=bool(data.get("symmetric", True)),
                type=data.get("type", "int"),
            )
        except (KeyError, TypeError) as error:
            raise SchemeError(f"malformed quantization args {dict(data)!r}: {error}") from None


@dataclass(frozen=True)
class LayerScheme:
    """One config group: weights, and activations where they are quantized. `format` says how a checkpoint stores the
    weights; None: as `QuantizationArgs.format`, which is what we write."""

    weights: QuantizationArgs
    input_activations: QuantizationArgs | None
    format: Format | None = None

    def __post_init__(self) -> None:
        strategies = ("group", "channel", "tensor") if self.weights.type == "int" else ("group", "channel")
        if self.weights.dynamic or self.weights.strategy not in strategies:
            raise SchemeError(f"weights must be quantized per group or per channel (integers also per tensor), not "
                              f"{self.weights}")
        if self.weights.format == "float-quantized" and self.weights.strategy != "channel":
            raise SchemeError(f"FP8 weights must be quantized per channel, not {self.weights}")
        act = self.input_activations
        if act is not None and (act.num_bits, act.strategy, act.dynamic) not in (
            (8, "tensor", False), (8, "token", True)
        ):
            raise SchemeError(f"activations must be 8-bit, static per tensor or dynamic per token, not {act}")
        if act is not None and not act.symmetric:
            raise SchemeError("asymmetric activations are not supported; quantize the model with symmetric ones")


class ModuleSchemes:
    """A checkpoint's `quantization_config`, asked module by module: which scheme, or none (the module is float)."""

    def __init__(self, quantization_config: Mapping[str, Any]) -> None:
        groups = quantization_config.get("config_groups")
        if not isinstance(groups, Mapping) or not groups:
            raise SchemeError("quantization_config has no config_groups")
        kv_cache = quantization_config.get("kv_cache_scheme")
        if kv_cache is not None:
            raise SchemeError("kv_cache_scheme is not supported; the KV cache's type is chosen when serving")
        ignore = quantization_config.get("ignore") or []
        self._ignore = _patterns(ignore)
        self._exact: dict[str, LayerScheme] = {}
        self._groups: list[tuple[list[re.Pattern[str]], bool, LayerScheme]] = []
        for name, group in groups.items():
            if not isinstance(group, Mapping) or not isinstance(group.get("weights"), Mapping):
                raise SchemeError(f"config group {name!r} has no weights")
            if group.get("output_activations"):
                raise SchemeError(f"config group {name!r} quantizes output activations, which is not supported")
            act = group.get("input_activations")
            weights = QuantizationArgs.from_dict(group["weights"])
            packing = group.get("format") or quantization_config.get("format")
            scheme = LayerScheme(weights, QuantizationArgs.from_dict(act) if act else None,
                                 "int-quantized" if packing == "int-quantized" else None)
            if packing != weights.format and (packing, weights.type) != ("int-quantized", "int"):
                raise SchemeError(f"config group {name!r} has format {packing!r}; of {weights.num_bits}-bit "
                                  f"{weights.type} weights only {weights.format}"
                                  f"{' and int-quantized are' if weights.type == 'int' else ' is'} supported")
            targets = group.get("targets") or []
            for target in targets:
                if isinstance(target, str) and not target.startswith("re:") and target != "Linear":
                    self._exact[target] = scheme
            self._groups.append((_patterns(targets), "Linear" in targets, scheme))

    def scheme(self, module: str) -> LayerScheme | None:
        """Exact names go before patterns, patterns before the class name `Linear`, as in compressed-tensors."""
        if any(pattern.match(module) for pattern in self._ignore):
            return None
        if module in self._exact:
            return self._exact[module]
        for patterns, _, scheme in self._groups:
            if any(pattern.match(module) for pattern in patterns):
                return scheme
        return next((scheme for _, every_linear, scheme in self._groups if every_linear), None)


class UniformScheme:
    """GPTQ's and AWQ's config: one scheme for every linear that the checkpoint stores quantized."""

    def __init__(self, scheme: LayerScheme) -> None:
        self._scheme = scheme

    def scheme(self, module: str) -> LayerScheme | None:
        return self._scheme


def parse_quantization(config: Mapping[str, Any]) -> ModuleSchemes | UniformScheme:
    """A `quantization_config` (or the quantize_config.json that AutoGPTQ and AutoAWQ wrote). Raises SchemeError."""
    method = config.get("quant_method") or ("awq" if "w_bit" in config else "gptq" if "bits" in config else None)
    if method == "compressed-tensors":
        return ModuleSchemes(config)
    if method not in ("gptq", "awq"):
        raise SchemeError(f"quantization method {method!r} is not supported; compressed-tensors, gptq and awq are")
    bits, size = config.get("bits", config.get("w_bit")), config.get("group_size", config.get("q_group_size"))
    layout = config.get("checkpoint_format") or config.get("version") or config.get("format")
    layout = str(layout or {"gptq": "gptq", "awq": "gemm"}[method]).lower()
    if layout not in {"gptq": ("gptq", "gptq_v2"), "awq": ("gemm",)}[method]:
        raise SchemeError(f"{method} checkpoints in the layout {layout!r} are not supported; convert it to "
                          f"{'gptq' if method == 'gptq' else 'gemm'}")
    if isinstance(bits, bool) or bits not in ((4, 8) if method == "gptq" else (4,)):
        raise SchemeError(f"{method} with {bits!r} bits is not supported")
    if isinstance(size, bool) or not isinstance(size, int) or not (size == -1 or size > 0):
        raise SchemeError(f"{method}: group_size must be -1 or a positive integer, not {size!r}")
    symmetric = bool(config.get("sym", True)) if method == "gptq" else not config.get("zero_point", True)
    weights = QuantizationArgs(bits, "channel" if size == -1 else "group", None if size == -1 else size,
                               symmetric=symmetric)
    stored: Format = "awq" if method == "awq" else "gptq" if layout == "gptq" else "gptq_v2"
    return UniformScheme(LayerScheme(weights, None, stored))


def _strategy(data: Mapping[str, Any]) -> Strategy:
    """What compressed-tensors takes where a config names none."""
    size = data.get("group_size")
    return "tensor" if size is None else "group" if size > 0 else "channel"


def _patterns(targets: Any) -> list[re.Pattern[str]]:
    """`re:` targets match from the start of a module's name, others match it whole."""
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise SchemeError(f"targets and ignore must be lists of strings, not {targets!r}")
    try:
        return [re.compile(t[3:] if t.startswith("re:") else re.escape(t) + r"\Z") for t in targets]
    except re.error as error:
        raise SchemeError(f"malformed pattern among {targets!r}: {error}") from None
