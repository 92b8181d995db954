"""The kernels' arithmetic, run by Triton's interpreter on the CPU."""

from __future__ import annotations

import os
from typing import Any

import pytest

os.environ["TRITON_INTERPRET"] = "1"  # read where a kernel is defined, so before any is imported
pytest.importorskip("triton", reason="triton is not installed")

from triton.runtime import interpreter

_patch_tensor = interpreter._patch_lang_tensor


def _patch_tensor_for_numpy_2_4(tensor: Any, scope: Any) -> None:
    """A kernel's scalar is an array of shape [1] there, which numpy 2.4 no longer takes for an integer."""
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = _patch_tensor_for_numpy_2_4
