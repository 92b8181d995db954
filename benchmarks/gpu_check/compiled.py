"""What the compiler made of the kernels that were launched."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.gpu_check.check import Check, Row
from fptq_runtime.kernels.triton import attention, fused, linear_kernels, sampling, sums
from fptq_runtime.kernels.triton.device import capability


def compiled(check: Check) -> Iterator[Row]:
    """The kernels that the large parts before have launched: tensor-core instructions, registers, spills. A linear with
    int8 inputs must be on the tensor cores, on Hopper through wgmma, and spill nothing."""

    hopper = capability(check.backend.device) >= 90
    for name, kernel in launched_kernels():
        for cache in kernel.device_caches.values():
            for binary in cache[0].values():
                ptx = binary.asm["ptx"]
                wgmma, mma, spills = ptx.count("wgmma.mma_async"), ptx.count("mma.sync"), binary.n_spills
                right = spills == 0 and (wgmma > 0 if hopper else mma > 0)
                yield {"kernel": name, "warps": binary.metadata.num_warps, "registers": binary.n_regs,
                       "shared": binary.metadata.shared, "spills": spills, "wgmma": wgmma, "mma": mma,
                       "ok": right or name != "linear_kernel"}


def launched_kernels() -> list[tuple[str, Any]]:
    """All that were written for the backend, by name."""

    return [(name, kernel) for module in (linear_kernels, sums, attention, fused, sampling)
            for name, kernel in sorted(vars(module).items())
            if getattr(kernel, "__module__", None) == module.__name__ and hasattr(kernel, "device_caches")]
