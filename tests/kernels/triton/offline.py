"""Compiles for GPUs that are not here what the host code would launch; run as a program it prints what came out.

Apart from the tests' own process, where kernels are the interpreter's.
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

from fptq_runtime.config import KVCacheDtype
from fptq_runtime.kernels.base import Activation, ActivationQuant, AttentionSpec, Norm, StepLimits
from fptq_runtime.kernels.triton import attention, fused
from fptq_runtime.kernels.triton.values import DeviceBatch

_TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int8: "*i8",
          torch.uint8: "*u8", torch.int32: "*i32", torch.float8_e4m3fn: "*fp8e4nv"}
_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


class Recorder:
    """In a kernel's place: keeps what it would be launched with."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.launches: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **kwargs: self.launches.append((args, kwargs))

    def compile(self, capability: int) -> list[dict[str, Any]]:
        return [compiled(self.kernel, args, kwargs, capability) for args, kwargs in self.launches]


def compiled(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any], capability: int) -> dict[str, Any]:
    """A launch, specialized as Triton's own launcher does: its tensor-core and asynchronous instructions, and what its
    program takes."""
    options = {name: kwargs[name] for name in _OPTIONS if name in kwargs}
    values = dict(zip(kernel.arg_names, args, strict=False))
    values |= {name: value for name, value in kwargs.items() if name not in _OPTIONS}
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for index, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        specialized = isinstance(value, int) and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (specialized and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = _TYPES[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
            if specialized and value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    binary = triton.compile(ASTSource(kernel, signature, constants, attributes),
                            target=GPUTarget("cuda", capability, 32), options=options)
    ptx = binary.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = subprocess.run([str(_TOOLS / "cuobjdump"), "--dump-resource-usage", file.name], capture_output=True,
                               text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found is not None, usage
    return {
        "registers": int(found[1]), "spilled": int(found[2]) + int(found[3]), "shared": binary.metadata.shared,
        "wgmma": sorted(set(re.findall(r"wgmma\.mma_async[\w.]+", ptx))),
        "mma": sorted(set(re.findall(r"\bmma\.sync[\w.]+", ptx))),
        "copies": {size: ptx.count(f", {size}, ") for size in ("0x4", "0x8", "0x10")} if "cp.async" in ptx else {},
        "wide_loads": len(re.findall(r"cp\.async\.cg\.shared\.global [^;]*, 0x10,", ptx)),
    }


def record(module: Any, name: str) -> Recorder:
    recorder = Recorder(getattr(module, name))
    setattr(module, name, recorder)
    return recorder


def llama(kv_dtype: KVCacheDtype = "int8", head_dim: int = 128, heads: int = 32, kv_heads: int = 8,
          block_size: int = 32, **options: Any) -> tuple[attention.DeviceAttention, attention.DeviceCache]:
    turned = options.pop("rotated", head_dim)
    spec = AttentionSpec(0, heads, kv_heads, head_dim, head_dim**-0.5,
                         rope=(torch.zeros(16, turned // 2), torch.zeros(16, turned // 2)), **options)
    limits = StepLimits(64, 8, 8, 1024, 2, block_size, kv_dtype, 1, kv_heads, head_dim)
    device = torch.device("cpu")
    return attention.prepare_attention(spec, device), attention.DeviceCache(limits, device)


def batch(sequences: int, rows: int, max_query_len: int, max_seq_len: int) -> DeviceBatch:
    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int32)

    return DeviceBatch(zeros(rows), zeros(rows), zeros(rows), zeros(sequences + 1), zeros(sequences),
                       zeros(sequences, 64), zeros(rows), max_query_len, max_seq_len)


def rms(*shape: int) -> Norm:
    return Norm("rms", torch.ones(shape), None, 1e-6)


def layer(*shape: int) -> Norm:
    return Norm("layer", torch.ones(shape), torch.ones(shape), 1e-6)


# What other families ask of attention.
VARIANTS: dict[str, dict[str, Any]] = {
    "gemma 2": {"head_dim": 256, "heads": 16, "sliding_window": 4096, "softcap": 50.0},
    "gpt-oss": {"head_dim": 64, "heads": 64, "sliding_window": 128, "sinks": torch.zeros(64)},
    "olmo 2": {"head_dim": 128, "heads": 40, "q_norm": rms(40 * 128), "k_norm": rms(8 * 128)},
    "stablelm": {"head_dim": 80, "heads": 32, "kv_heads": 32, "rotated": 20, "q_norm": layer(32, 80),
                 "k_norm": layer(32, 80), "norm_after_rope": True},
}


def main(capability: int) -> dict[str, Any]:
    """A Llama-3-8B's launches by name, and those of the variants."""
    rope, attend, merge = (record(attention, f"_{name}_kernel") for name in ("rope_and_cache", "attention", "merge"))
    norm, activation, softcap = (record(fused, f"_{name}_kernel") for name in ("norm", "activation", "softcap"))
    attention.capability = lambda device: capability
    names = []
    for name, options in {"llama": {}, **VARIANTS}.items():
        device_attention, cache = llama(**options)
        width = (device_attention.spec.num_heads + 2 * cache.keys.shape[2]) * cache.keys.shape[-1]
        for kind, step in (("decode", batch(1, 1, 1, 32768)), ("prefill", batch(1, 2048, 2048, 8192))):
            q = attention.rope_and_cache(torch.zeros(step.token_ids.shape[0], width), device_attention, cache, step)
            if name in ("llama", "gemma 2", "gpt-oss"):
                attention.attention(q, device_attention, cache, step, ActivationQuant())
                names.append(f"{name} attention {kind}")
        rope.launches.pop()
    x = torch.zeros(1, 2 * 14336)
    fused.norm(x[:, :4096].contiguous(), x[0, :4096], None, 1e-5, "rms", ActivationQuant())
    activation.launches.clear()
    curves = (Activation("silu", True), Activation("gelu"), Activation("relu2"), Activation("clamped_swiglu", True))
    for curve in curves:
        fused.activation(x if curve.gated else x[:, :14336].contiguous(), curve, ActivationQuant())
    fused.softcap(x, 30.0)
    return {**dict(zip(names, attend.compile(capability), strict=True)),
            **dict(zip((f"{name} rope" for name in ("llama", *VARIANTS)), rope.compile(capability), strict=True)),
            **dict(zip((curve.curve for curve in curves), activation.compile(capability), strict=True)),
            **dict(zip(("llama merge", "gemma 2 merge", "gpt-oss merge"), merge.compile(capability), strict=True)),
            "norm": norm.compile(capability)[0], "softcap": softcap.compile(capability)[0]}


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]))))
