"""Triton's interpreter, as far as the kernels need it otherwise. TRITON_INTERPRET=1 must be set before Triton is first
imported."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import triton.language as tl
from triton.runtime import interpreter

_create_dot = interpreter.InterpreterBuilder.create_dot
_patch_tensor = interpreter._patch_lang_tensor
_patch_language = interpreter._patch_lang


def mend() -> None:
    """Make it sum a float dot in one order, run PTX, take scalars for integers, and start faster. Idempotent."""
    interpreter.InterpreterBuilder.create_dot = _dot_in_order
    interpreter.InterpreterBuilder.create_inline_asm = _run_ptx
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


Register = npt.NDArray[np.uint32]


def _lop3(a: Register, b: Register, c: Register, table: Register) -> Register:
    """Each bit is that of the table whose number the bits of a, b and c make."""
    total = np.zeros_like(a)
    for number in range(8):
        if int(table) >> number & 1:
            total |= (a if number & 4 else ~a) & (b if number & 2 else ~b) & (c if number & 1 else ~c)
    return total


_PTX: dict[str, Callable[..., Register]] = {
    "shl.b32": lambda a, b: a << b, "shr.u32": lambda a, b: a >> b, "and.b32": lambda a, b: a & b,
    "xor.b32": lambda a, b: a ^ b, "mad.lo.u32": lambda a, b, c: a * b + c, "lop3.b32": _lop3,
}


class _Results(list[interpreter.TensorHandle]):
    get_result = list.__getitem__


def _run_ptx(builder: Any, asm: str, constraints: str, values: Sequence[Any], types: Sequence[Any], is_pure: bool,
             pack: int) -> _Results:
    """Instructions on 32-bit registers, each of `pack` elements; a wait for another kernel has nothing to wait for."""
    if asm.startswith("griddepcontrol"):
        return _Results([interpreter.TensorHandle(np.zeros(1, np.int32), types[0].scalar)])
    held = {f"${i}": np.ascontiguousarray(value.data).reshape(-1).view(np.uint32) for i, value in enumerate(values, 1)}

    def operand(name: str) -> Register:
        return np.asarray(int(name, 0), np.uint32) if name[0].isdigit() else held[name]

    for statement in filter(None, (part.strip() for part in asm.strip("{} ").split(";"))):
        operation, arguments = statement.split(maxsplit=1)
        target, *sources = re.split(r",\s*", arguments)
        if operation != ".reg":
            held[target] = _PTX[operation](*map(operand, sources))
    shape, dtype = values[0].data.shape, types[0].scalar
    return _Results([interpreter.TensorHandle(held["$0"].view(interpreter._get_np_dtype(dtype)).reshape(shape), dtype)])


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
