"""Triton's interpreter, as far as the kernels need it otherwise. TRITON_INTERPRET=1 must be set before Triton is first
imported."""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_create_dot = interpreter.InterpreterBuilder.create_dot
_patch_tensor = interpreter._patch_lang_tensor
_patch_language = interpreter._patch_lang


def mend() -> None:
    """Make it sum a float dot in one order, take scalars for integers, and start faster. Idempotent."""
    interpreter.InterpreterBuilder.create_dot = _dot_in_order
    interpreter._patch_lang_tensor = _patch_tensor_with_index
    interpreter._patch_lang = _patch_language_once


def _dot_in_order(builder: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
    """a [.., M, K] · b [.., K, N] + d, where each output's products are added by ascending k. The interpreter's own is
    numpy's, whose BLAS chooses the order by CPU, M and N, as no tensor core does."""
    if a.data.dtype.kind != "f":
        return _create_dot(builder, a, b, d, *options)
    total = np.zeros_like(d.data)
    left, right = a.data.astype(total.dtype), b.data.astype(total.dtype)
    for k in range(left.shape[-1]):
        total += left[..., :, k, None] * right[..., None, k, :]
    return interpreter.TensorHandle(total + d.data, d.dtype.scalar)


def _patch_tensor_with_index(tensor: Any, scope: Any) -> None:
    """A kernel's scalar is an array of shape [1] there, which numpy 2.4 no longer takes for an integer."""
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def _patch_language_once(function: Any) -> Any:
    """Not again for every function that a kernel calls: it takes most of the interpreter's time."""
    languages = [value for value in function.__globals__.values() if value is tl or value is tl.core]
    if any(tl.core.is_builtin(language.load) for language in languages):
        return _patch_language(function)
    return interpreter._LangPatchScope()
