"""Compiles what the linear layer would launch, for GPUs that are not here: `offline_linear.py CAPABILITY CASE...`.

Run as a program, without TRITON_INTERPRET: the interpreter replaces the compiler where a kernel is defined. Prints
JSON: for each case a list of kernels with what ptxas and the PTX say. A case is input:codes:group:m:n:k[:residual],
where input is int8, fp8 or float, and group 0 is a scale a row; two-level is written as group -128.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fptq_runtime.kernels.base import ActivationQuant
from fptq_runtime.kernels.triton import linear
from fptq_runtime.kernels.triton.choice import Tile
from fptq_runtime.kernels.triton.packing import PackedWeight
from fptq_runtime.kernels.triton.values import Quantized

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_POINTERS = {torch.int8: "*i8", torch.uint8: "*u8", torch.int32: "*i32", torch.float32: "*fp32",
             torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float8_e4m3fn: "*fp8e4nv"}


def compile_launches(capability: int, case: str) -> list[dict[str, Any]]:
    """Each kernel that `run_linear` would launch, compiled as Triton's own launcher specializes it."""
    found = []

    def launch(kernel: Any, grid: tuple[int, int], tile: Tile, *args: Any, **constants: Any) -> None:
        found.append(_compile(kernel, capability, tile, args, constants))

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


def _compile(kernel: Any, capability: int, tile: Tile, args: tuple[Any, ...],
             constants: dict[str, Any]) -> dict[str, Any]:
    signature, fixed, attributes = {}, dict(constants), {}
    for i, (name, value) in enumerate(zip(kernel.arg_names, args, strict=False)):
        if isinstance(value, torch.Tensor):
            signature[name] = _POINTERS[value.dtype]
            attributes[i,] = [["tt.divisibility", 16]]
        elif value is None or (value == 1 and not kernel.params[i].do_not_specialize):
            signature[name], fixed[name] = "constexpr", value
        else:
            signature[name] = "i32"
            if value % 16 == 0 and not kernel.params[i].do_not_specialize:
                attributes[i,] = [["tt.divisibility", 16]]
    signature |= dict.fromkeys(constants, "constexpr")
    compiled = triton.compile(ASTSource(kernel, signature, fixed, attributes),
                              target=GPUTarget("cuda", capability, 32),
                              options={"num_warps": tile.warps, "num_stages": tile.stages})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([TOOLS / "cuobjdump", "--dump-resource-usage", file.name], capture_output=True,
                               text=True, check=True).stdout
    numbers = {name.lower(): int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return {"kernel": kernel.fn.__name__, "tile": str(tile), "wgmma": compiled.asm["ptx"].count("wgmma.mma_async"),
            "mma": compiled.asm["ptx"].count("mma.sync"), "wide_loads": len(re.findall(
                r"cp\.async\.cg\.shared\.global [^;]*, 0x10,", compiled.asm["ptx"])),
            "shared": compiled.metadata.shared, **numbers}


if __name__ == "__main__":
    print(json.dumps({case: compile_launches(int(sys.argv[1]), case) for case in sys.argv[2:]}))
