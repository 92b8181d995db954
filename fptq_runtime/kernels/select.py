"""Which backend runs a model: an explicit list."""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Mapping
from importlib.util import find_spec

from fptq_runtime.artifact.scheme import LayerScheme
from fptq_runtime.config import MAX_THREADS
from fptq_runtime.errors import FptqError
from fptq_runtime.kernels.base import Backend

_BUILD_HINT = "build it with `pip install .` in the source tree (needs a C++20 compiler)"

logger = logging.getLogger(__name__)


def select_backend(name: str = "auto", threads: int = 0, schemes: Mapping[str, LayerScheme] | None = None,
                   device: str = "cpu") -> Backend:
    """On a CPU "native", "reference", or "auto": native wherever the extension imports and has a kernel for every one
    of a model's `schemes`. On "cuda" there is one backend; device "auto" takes it where it can run and no backend of
    the CPU's was asked for. Raises FptqError."""
    if name not in ("auto", "native", "reference"):
        raise FptqError(f"backend must be auto, native or reference, not {name!r}", "backend")
    if device not in ("auto", "cpu", "cuda"):
        raise FptqError(f"device must be auto, cpu or cuda, not {device!r}", "device")
    if device == "cuda" and name != "auto":
        raise FptqError(f"the {name} backend runs on the CPU; leave out --backend, or --device")
    if device == "cuda" or (device == "auto" and name == "auto" and _has_cuda_driver()):
        why_not: str | None = "torch is not installed; pip install 'fptq-serve[gpu]'"
        if find_spec("torch") is not None:
            from fptq_runtime.kernels.triton.device import problem

            why_not = problem()
        if why_not is None:
            from fptq_runtime.kernels.triton.backend import TritonBackend

            return TritonBackend()
        if device == "cuda":
            raise FptqError(f"cannot run on the GPU: {why_not}")
        logger.warning("running on the CPU: %s", why_not)
    if threads > MAX_THREADS:
        raise FptqError(f"threads must be at most {MAX_THREADS}, this machine's CPUs, not {threads}", "threads")
    if name != "reference":
        without = without_kernel(schemes or {})
        try:
            from fptq_runtime.kernels.cpu import CpuBackend
        except ImportError as error:
            if name == "native":
                raise FptqError(f"the native backend is not available ({error}): {_BUILD_HINT}") from None
            logger.warning("using the slow reference backend, the native extension cannot be imported (%s): %s", error,
                           _BUILD_HINT)
        else:
            if not without:
                return CpuBackend(threads)
            layers = f"{', '.join(without[:3])}{f' and {len(without) - 3} more' if len(without) > 3 else ''}"
            if name == "native":
                raise FptqError(f"the native backend has no kernel for {layers}; use the reference backend, which is "
                                "slow")
            logger.warning("using the slow reference backend, the native one has no kernel for %s", layers)
    from fptq_runtime.kernels.reference import ReferenceBackend

    return ReferenceBackend(threads)


def _has_cuda_driver() -> bool:
    """Spares a machine without one torch's import. Triton's interpreter is nobody's default."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return False
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def without_kernel(schemes: Mapping[str, LayerScheme]) -> list[str]:
    """The layers that the native backend cannot run: those with anything but integers."""
    return [name for name, scheme in schemes.items()
            if any(args is not None and args.type != "int" for args in (scheme.weights, scheme.input_activations))]
