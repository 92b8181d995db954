"""Which backend runs a model: an explicit list."""

from __future__ import annotations

import logging

from fptq_runtime.kernels.base import Backend

_BUILD_HINT = "build it with `pip install .` in the source tree (needs a C++17 compiler)"


def select_backend(name: str = "auto", threads: int = 0) -> Backend:
    """"native", "reference", or "auto": native wherever the extension imports. Raises ValueError, one line."""
    if name not in ("auto", "native", "reference"):
        raise ValueError(f"backend must be auto, native or reference, not {name!r}")
    if name != "reference":
        try:
            from fptq_runtime.kernels.cpu import CpuBackend
        except ImportError as error:
            if name == "native":
                raise ValueError(f"the native backend is not available ({error}): {_BUILD_HINT}") from None
            logging.getLogger(__name__).warning("using the slow reference backend, the native extension cannot be "
                                                "imported (%s): %s", error, _BUILD_HINT)
        else:
            return CpuBackend(threads)
    from fptq_runtime.kernels.reference import ReferenceBackend

    return ReferenceBackend()
