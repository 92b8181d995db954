"""What a step launches and the least time that each launch takes: a model, from the host's code and tensors without
memory. It needs no GPU; decode and prefill are shown beside it."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fptq_runtime.config import ModelConfig
from fptq_runtime.kernels.base import Activation, ActivationQuant, AttentionSpec, StepInput, StepLimits
from fptq_runtime.kernels.triton import attention, linear_kernels
from fptq_runtime.kernels.triton.backend import TritonExecutor
from fptq_runtime.kernels.triton.choice import LLAMA_3_8B, Case
from fptq_runtime.kernels.triton.fused import DeviceNorm
from fptq_runtime.kernels.triton.linear import random_case

META = torch.device("meta")


@dataclass(frozen=True)
class Machine:
    """An H200's bytes and integer operations a second, and the seconds between two launches of a graph, a kernel's
    start and end included."""

    bytes_per_s: float = 4.3e12
    ops_per_s: float = 1.6e15
    gap: float = 2.5e-6


@dataclass(frozen=True)
class Launch:
    kernel: str
    grid: tuple[int, ...]
    bytes: int  # read and written at least
    ops: int  # a multiply-add is two

    def seconds(self, machine: Machine) -> float:
        return max(self.bytes / machine.bytes_per_s, self.ops / machine.ops_per_s) + machine.gap


def seconds(launches: list[Launch], machine: Machine) -> dict[str, float]:
    """Of each kernel's launches together."""
    total: Counter[str] = Counter()
    for launch in launches:
        total[launch.kernel] += launch.seconds(machine)  # type: ignore[assignment]
    return dict(total)


def llama_launches(config: ModelConfig, step: StepInput, two_level: bool = False) -> list[Launch]:
    """Those of a whole step: int4 weights in groups of 128, an int8 head, an int8 cache in blocks of 32."""
    query_lens, seq_lens = np.diff(step.query_start_loc).tolist(), step.seq_lens.tolist()
    limits = StepLimits(8192, 256, 256, 1 << 17, 1 << 10, 32, "int8", config.num_layers, config.num_kv_heads,
                        config.head_dim)
    with torch.device(META):
        forward = _llama(config, two_level)
    executor = TritonExecutor(forward, limits, attention.DeviceCache(limits, META), META, True)
    with _recorded() as calls:
        executor.step(step)
    return [Launch(name, grid, *_work(name, arguments, query_lens, seq_lens)) for name, grid, arguments in calls]


def _llama(config: ModelConfig, two_level: bool) -> Callable[[Any], Any]:
    shapes = {name: (n, k) for name, n, k in LLAMA_3_8B}
    qkv, o, up, down = (random_case(Case(name, 1, *shapes[name], two_level=two_level), META)[0]
                        for name in ("qkv", "o", "up", "down"))
    head = random_case(Case("head", 1, *shapes["lm_head"], "int8", None), META)[0]
    norm = DeviceNorm("rms", torch.ones(config.hidden_size), None, 1e-5)
    table = torch.empty((config.vocab_size, config.hidden_size), dtype=torch.bfloat16)
    rope = (torch.empty(1 << 17, config.head_dim // 2),) * 2
    specs = [attention.prepare_attention(AttentionSpec(
        layer, config.num_heads, config.num_kv_heads, config.head_dim, config.head_dim**-0.5, rope=rope), META)
        for layer in range(config.num_layers)]
    act = ActivationQuant()

    def forward(ops: Any) -> Any:
        x = ops.embed(table)
        for index, spec in enumerate(specs):
            last = index == len(specs) - 1
            q = ops.rope_and_cache(ops.linear(ops.norm(x, norm, act), qkv), spec)
            attended = ops.attention(q, spec, act, last)
            x = ops.linear(attended, o, ops.select_rows(x) if last else x)
            x = ops.linear(ops.activation(ops.linear(ops.norm(x, norm, act), up), Activation("silu", True), act), down,
                           x)
        return ops.linear(ops.norm(x, norm, act), head)

    return forward


@contextmanager
def _recorded() -> Iterator[list[tuple[str, tuple[int, ...], dict[str, Any]]]]:
    """Kernels are noted instead of run, with their arguments by name; the same for torch's own that move memory."""
    calls: list[tuple[str, tuple[int, ...], dict[str, Any]]] = []
    kind = type(linear_kernels.linear_kernel)
    run = kind.run

    def note(kernel: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
        signature = inspect.signature(kernel.fn)
        own = {name: value for name, value in kwargs.items() if name in signature.parameters}
        arguments = dict(signature.bind(*args, **own).arguments)
        calls.append((kernel.fn.__name__.strip("_").removesuffix("_kernel"), tuple(grid), arguments))

    kind.run = note
    try:
        with _Torch(calls):
            yield calls
    finally:
        kind.run = run


class _Torch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes what torch launches on the device: fills, copies and selections."""

    def __init__(self, calls: list[tuple[str, tuple[int, ...], dict[str, Any]]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._calls = calls

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("zero_", "fill_", "zeros", "full", "copy_", "index_select", "_to_copy", "add", "mul"):
            self._calls.append((f"torch {name}", (), {"made": made, "moves": name not in ("zero_", "fill_", "zeros",
                                                                                          "full")}))
        return made


def _work(name: str, arguments: dict[str, Any], query_lens: list[int], seq_lens: list[int]) -> tuple[int, int]:
    """Bytes and operations of a launch."""
    sizes = {key: value.nbytes for key, value in arguments.items() if isinstance(value, torch.Tensor)}
    if name == "linear":
        rows, n, k = arguments["M"], arguments["N"], arguments["K"]
        return sum(sizes.values()), 2 * rows * n * k
    if name in ("reduce", "expand", "norm", "activation", "softcap"):
        return sum(sizes.values()), 0
    if name == "embed":
        return sizes["out"] + sizes["out"] // 2, 0
    if name == "rope_and_cache":
        heads, kv_heads, dim = arguments["HEADS"], arguments["KV_HEADS"], arguments["DIM"]
        cache = attention.cache_bytes_per_token("int8", 1, kv_heads, dim)
        return sizes["y_sums"] + sizes["q_out"] + arguments["rows"] * (cache + 4 * dim + 4 * heads), 0
    if name in ("attention", "merge"):
        heads, dim, first = arguments["HEADS"], arguments["DIM"], 0
        rows = arguments["positions" if name == "merge" else "q"].shape[0]
        count = arguments["sequences"] if name == "attention" else rows
        own = list(zip(query_lens, seq_lens, strict=True))
        if count < len(own):  # the launch of those that decode, or of the others
            own.sort()
            first = 0 if name == "merge" or arguments["ONE_TILE"] else len(own) - count
            own = own[first : first + count]
        parts = 4 * heads * (dim + 2) * sum(query * -(-length // 512) for query, length in own)
        if name == "merge":
            return parts + rows * heads * dim, 0
        moved = sum(attention.cache_bytes_per_token("int8", 1, arguments["KV_HEADS"], dim) * length
                    for _, length in own) + sum(query for query, _ in own) * heads * (dim + 4)
        pairs = sum(query * length - query * (query - 1) // 2 for query, length in own)
        result = parts if arguments["SPLIT"] else 4 * heads * dim * sum(query for query, _ in own)
        return moved + result, 6 * heads * dim * pairs
    made = arguments["made"].nbytes
    return 2 * made if arguments["moves"] else made, 0
