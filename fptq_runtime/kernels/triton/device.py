"""The GPU: whether the Triton backend can run on it, what it can, and time as it passes there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch

from fptq_runtime.kernels.base import DeviceLostError
from fptq_runtime.kernels.triton.values import interpreted

LOWEST_CAPABILITY = (8, 0)  # Ampere: int8 and bfloat16 tensor cores


def problem() -> str | None:
    """Why it cannot, and what to do; None where it can. One line."""
    if find_spec("triton") is None:
        return "triton is not installed; pip install 'fptq-serve[gpu]' (Linux, x86-64)"
    if interpreted():
        return None
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA; pip install torch from PyPI's own index"
    if not torch.cuda.is_available():
        return ("torch sees no GPU; see whether nvidia-smi lists one, CUDA_VISIBLE_DEVICES hides it, or the container "
                "was started without --gpus all")
    found = torch.cuda.get_device_capability()
    if found < LOWEST_CAPABILITY:
        return (f"{torch.cuda.get_device_name()} has compute capability {found[0]}.{found[1]}, and 8.0 "
                "(Ampere) is needed; use --device cpu")
    return None


def is_gpu(device: torch.device) -> bool:
    """Whether work is queued there, and captured; the interpreter does it at once."""
    return device.type == "cuda"


@contextmanager
def device_watched(device: torch.device) -> Iterator[None]:
    """Raises DeviceLostError where what failed makes everything after it fail: most errors of a kernel do."""
    try:
        yield
    except Exception as error:
        if is_gpu(device):
            try:
                torch.cuda.synchronize(device)
            except Exception:
                raise DeviceLostError(f"the GPU no longer answers: {error}") from error
        raise


def capability(device: torch.device) -> int:
    """10 · major + minor; the interpreter takes Hopper's choices."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def fastest(call: Callable[[], Any], repeats: int = 10) -> float:
    """Seconds of the fastest of so many calls, on the device, after two that are not counted."""
    times = []
    for _ in range(repeats + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return float(min(times[2:]))
