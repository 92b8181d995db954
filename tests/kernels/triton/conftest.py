"""The kernels' arithmetic, run by Triton's interpreter on the CPU."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed")

import triton.language as tl
from triton.runtime import interpreter

_patch_tensor = interpreter._patch_lang_tensor
_patch_language = interpreter._patch_lang


def _patch_tensor_for_numpy_2_4(tensor: Any, scope: Any) -> None:
    """A kernel's scalar is an array of shape [1] there, which numpy 2.4 no longer takes for an integer."""
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def _patch_language_once(function: Any) -> Any:
    """Not again for every function that a kernel calls: it takes most of the interpreter's time."""
    languages = [value for value in function.__globals__.values() if value is tl or value is tl.core]
    if any(tl.core.is_builtin(language.load) for language in languages):
        return _patch_language(function)
    return interpreter._LangPatchScope()


interpreter._patch_lang_tensor = _patch_tensor_for_numpy_2_4
interpreter._patch_lang = _patch_language_once
