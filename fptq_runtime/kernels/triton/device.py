"""Whether this machine has a GPU that the Triton backend can run on."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from fptq_runtime.kernels.triton.values import interpreted

LOWEST_CAPABILITY = (8, 0)  # Ampere: int8 and bfloat16 tensor cores


def problem() -> str | None:
    """Why it cannot, and what to do; None where it can. One line."""
    if find_spec("triton") is None:
        return "triton is not installed; pip install triton (Linux only)"
    if interpreted():
        return None
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA; pip install torch from PyPI's own index"
    if not torch.cuda.is_available():
        return ("torch sees no GPU; see whether nvidia-smi lists one, CUDA_VISIBLE_DEVICES hides it, or the container "
                "was started without --gpus all")
    capability = torch.cuda.get_device_capability()
    if capability < LOWEST_CAPABILITY:
        return (f"{torch.cuda.get_device_name()} has compute capability {capability[0]}.{capability[1]}, and 8.0 "
                "(Ampere) is needed; use --device cpu")
    return None
