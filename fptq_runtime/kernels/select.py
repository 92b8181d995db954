"""Which backend runs a model: an explicit list."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from fptq_runtime.artifact.scheme import LayerScheme
from fptq_runtime.kernels.base import Backend

_BUILD_HINT = "build it with `pip install .` in the source tree (needs a C++17 compiler)"

logger = logging.getLogger(__name__)


def select_backend(name: str = "auto", threads: int = 0, schemes: Mapping[str, LayerScheme] | None = None) -> Backend:
    """"native", "reference", or "auto": native wherever the extension imports and has a kernel for every one of a
    model's `schemes`. Raises ValueError, one line."""
    if name not in ("auto", "native", "reference"):
        raise ValueError(f"backend must be auto, native or reference, not {name!r}")
    if name != "reference":
        without = without_kernel(schemes or {})
        try:
            from fptq_runtime.kernels.cpu import CpuBackend
        except ImportError as error:
            if name == "native":
                raise ValueError(f"the native backend is not available ({error}): {_BUILD_HINT}") from None
            logger.warning("using the slow reference backend, the native extension cannot be imported (%s): %s", error,
                           _BUILD_HINT)
        else:
            if not without:
                return CpuBackend(threads)
            layers = f"{', '.join(without[:3])}{f' and {len(without) - 3} more' if len(without) > 3 else ''}"
            if name == "native":
                raise ValueError(f"the native backend has no kernel for {layers}; use the reference backend, which is "
                                 "slow")
            logger.warning("using the slow reference backend, the native one has no kernel for %s", layers)
    from fptq_runtime.kernels.reference import ReferenceBackend

    return ReferenceBackend()


def without_kernel(schemes: Mapping[str, LayerScheme]) -> list[str]:
    """The layers that the native backend cannot run: those with anything but integers."""
    return [name for name, scheme in schemes.items()
            if any(args is not None and args.type != "int" for args in (scheme.weights, scheme.input_activations))]
