"""The vocabulary of schemes, word for word compressed-tensors' own (`config_groups` of `quantization_config`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fptq_runtime.errors import FptqError

Strategy = Literal["tensor", "token", "channel", "group"]
NumberType = Literal["int", "float"]


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
        except SchemeError:
            raise
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise SchemeError(f"malformed quantization args {dict(data)!r}: {error}") from None


@dataclass(frozen=True)
class LayerScheme:
    """One config group: weights, and activations where they are quantized."""

    weights: QuantizationArgs
    input_activations: QuantizationArgs | None

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


def _strategy(data: Mapping[str, Any]) -> Strategy:
    """What compressed-tensors takes where a config names none."""
    size = data.get("group_size")
    return "tensor" if size is None else "group" if size > 0 else "channel"
