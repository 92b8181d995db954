"""What models launch: `python -m tests.kernels.triton.launches CAPABILITY GROUP...` compiles it and prints, as JSON,
the facts of each launch by group and name.

Groups: attention (a Llama 3 8B's, and what other families ask of it), ops (what lies between the linears), linear:CASE.
A case is input:codes:group:m:n:k[:residual], where input is int8, fp8 or float, and group 0 is a scale a row;
two-level is written as group -128.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from fptq_runtime.config import KVCacheDtype
from fptq_runtime.kernels.base import Activation, ActivationQuant, AttentionSpec, Norm, StepLimits
from fptq_runtime.kernels.triton import attention, fused, linear
from fptq_runtime.kernels.triton.adapters import DeviceAdapters, add_adapters
from fptq_runtime.kernels.triton.attention import DeviceAttention, DeviceCache
from fptq_runtime.kernels.triton.linear import DeviceLinear
from fptq_runtime.kernels.triton.packing import PackedWeight
from fptq_runtime.kernels.triton.values import DeviceBatch, Quantized
from tests.kernels.triton.offline import Launch, recorded

META = torch.device("meta")
CONTEXT = 8192


def attended(kv_dtype: KVCacheDtype = "int8", head_dim: int = 128, heads: int = 32, kv_heads: int = 8,
             block_size: int = 32, **options: Any) -> tuple[DeviceAttention, DeviceCache]:
    turned = options.pop("rotated", head_dim)
    spec = AttentionSpec(0, heads, kv_heads, head_dim, head_dim**-0.5,
                         rope=(torch.zeros(16, turned // 2), torch.zeros(16, turned // 2)), **options)
    limits = StepLimits(64, 8, 8, 1024, 2, block_size, kv_dtype, 1, kv_heads, head_dim)
    return attention.prepare_attention(spec, META), DeviceCache(limits, META)


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
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma 2": {"head_dim": 256, "heads": 16, "sliding_window": 4096, "softcap": 50.0},
    "gpt-oss": {"head_dim": 64, "heads": 64, "sliding_window": 128, "sinks": torch.zeros(64)},
    "olmo 2": {"head_dim": 128, "heads": 40, "q_norm": rms(40 * 128), "k_norm": rms(8 * 128)},
    "stablelm": {"head_dim": 80, "heads": 32, "kv_heads": 32, "rotated": 20, "q_norm": layer(32, 80),
                 "k_norm": layer(32, 80), "norm_after_rope": True},
}
CURVES = (Activation("silu", True), Activation("gelu"), Activation("relu2"), Activation("clamped_swiglu", True))


def attentions(launches: list[Launch]) -> dict[str, Launch]:
    """A decoded token of a long sequence, and a prompt's chunk, of each family."""
    found: dict[str, Launch] = {}
    for name, options in FAMILIES.items():
        device_attention, cache = attended(**options)
        width = (device_attention.spec.num_heads + 2 * cache.keys.shape[2]) * cache.keys.shape[-1]
        for kind, step in (("decode", batch(1, 1, 1, 32768)), ("prefill", batch(1, 2048, 2048, CONTEXT))):
            q = attention.rope_and_cache(torch.zeros(step.token_ids.shape[0], width), device_attention, cache, step)
            found[f"{name} rope"] = launches[-1]
            if name in ("llama", "gemma 2", "gpt-oss"):
                launches.clear()
                attention.attention(q, device_attention, cache, step, ActivationQuant())
                found |= {f"{name} {each.kernel.strip('_').removesuffix('_kernel')} {kind}": each for each in launches}
    return found


def between(launches: list[Launch]) -> dict[str, Launch]:
    x = torch.zeros(1, 2 * 14336)
    fused.norm(torch.zeros(1, 4096), torch.zeros(4096), None, 1e-5, "rms", ActivationQuant())
    for curve in CURVES:
        fused.activation(x if curve.gated else torch.zeros(1, 14336), curve, ActivationQuant())
    fused.softcap(x, 30.0)
    add_adapters(Quantized(torch.zeros(16, 4096, dtype=torch.int8), torch.zeros(16)), torch.zeros(16, 4096),
                 DeviceAdapters.empty(4096, 4096, 8, META), torch.zeros(16, dtype=torch.int32))
    names = ("norm", *(curve.curve for curve in CURVES), "softcap", "adapters down", "adapters up")
    return dict(zip(names, launches, strict=True))


def linears(launches: list[Launch], case: str) -> dict[str, Launch]:
    x, layer, residual = _layer(*case.split(":"))
    linear.run_linear(x, layer, residual, invariant=True)  # adds up in a kernel of its own
    return {each.kernel.strip("_"): each for each in launches}


def _layer(kind: str, codes: str, group: str, m: str, n: str, k: str,
           residual: str = "") -> tuple[Any, DeviceLinear, torch.Tensor | None]:
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
            DeviceLinear("layer", weight, torch.empty(outputs) if residual else None, act),
            torch.empty((rows, outputs)) if residual else None)


def main(capability: int, groups: list[str]) -> dict[str, dict[str, Any]]:
    attention.capability = linear.capability = lambda device: capability  # type: ignore[assignment]
    report = {}
    for group in groups:
        with recorded(capability) as launches, torch.device("meta"):
            kind, _, case = group.partition(":")
            found = attentions(launches) if kind == "attention" else between(launches) if kind == "ops" \
                else linears(launches, case)
        report[group] = {name: launch.facts() for name, launch in found.items()}
    return report


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]), sys.argv[2:])))
