"""Compiles what the linear layer would launch, for GPUs that are not here: `offline_linear.py CAPABILITY CASE...`.

Run as a program, without TRITON_INTERPRET: the interpreter replaces the compiler where a kernel is defined. Prints
JSON: for each case a list of kernels with what ptxas and the PTX say. A case is input:codes:group:m:n:k[:residual],
where input is int8, fp8 or float, and group 0 is a scale a row; two-level is written as group -128.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from fptq_runtime.kernels.base import ActivationQuant
from fptq_runtime.kernels.triton import linear
from fptq_runtime.kernels.triton.choice import Tile
from fptq_runtime.kernels.triton.packing import PackedWeight
from fptq_runtime.kernels.triton.values import Quantized
from tests.kernels.triton.offline import compiled


def compile_launches(capability: int, case: str) -> list[dict[str, Any]]:
    """Each kernel that `run_linear` would launch, compiled as Triton's own launcher specializes it."""
    found = []

    def launch(kernel: Any, grid: tuple[int, int], tile: Tile, *args: Any, **constants: Any) -> None:
        options = {"num_warps": tile.warps, "num_stages": tile.stages}
        found.append({"kernel": kernel.fn.__name__, "tile": str(tile),
                      **compiled(kernel, args, constants | options, capability)})

    linear.capability = lambda device: capability  # type: ignore[assignment]
    linear._launch_kernel = launch
    x, layer, residual = _layer(*case.split(":"))
    linear.run_linear(x, layer, residual, invariant=True)
    return found


def _layer(kind: str, codes: str, group: str, m: str, n: str, k: str,
           residual: str = "") -> tuple[Any, linear.DeviceLinear, torch.Tensor | None]:
    rows, outputs, inputs, size = int(m), int(n), int(k), abs(int(group))
    if codes in ("bfloat16", "float16", "float32"):
        weight: Any = torch.empty((outputs, inputs), dtype=getattr(torch, codes))
    else:
        dots = 2 if codes in ("int4", "fp4") else 1
        width = min(size or 128, 128 // dots)
        tiles, blocks = -(-outputs // 64), -(-inputs // (width * dots))
        groups = torch.empty((tiles, inputs // (size or inputs), 64), dtype=torch.bfloat16)
        scale = groups if int(group) > 0 else torch.empty((tiles, 1, 64))
        arithmetic: Any = "grouped" if int(group) > 0 else "two-level" if size else "row"
        weight = PackedWeight(codes, arithmetic, outputs, inputs, width, size or inputs,
                              torch.empty((tiles, blocks, 64, width), dtype=torch.uint8), scale,
                              groups.to(torch.int8) if arithmetic == "two-level" else None)
    act = None if kind == "float" else ActivationQuant(type="float" if kind == "fp8" else "int")
    dtype = {"int8": torch.int8, "fp8": torch.float8_e4m3fn, "float": torch.float32}[kind]
    x = torch.empty((rows, inputs), dtype=dtype)
    return (x if act is None else Quantized(x, torch.empty(rows)),
            linear.DeviceLinear("layer", weight, torch.empty(outputs) if residual else None, act),
            torch.empty((rows, outputs)) if residual else None)


if __name__ == "__main__":
    print(json.dumps({case: compile_launches(int(sys.argv[1]), case) for case in sys.argv[2:]}))
