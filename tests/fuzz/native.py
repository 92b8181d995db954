"""Random calls of everything in _native.pyi, for a process of its own to survive:

    python -m tests.fuzz.native SEED CALLS

Arguments are made by their annotations: edges of every type, arrays of every dtype and shape, objects that earlier
calls gave. A call returns, or raises one of REFUSALS, within SECONDS. Prints how many did which.
"""

from __future__ import annotations

import ast
import faulthandler
import math
import random
import resource
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import fptq_runtime
from fptq_runtime import _native
from fptq_runtime.kernels.base import PARAMETERS, SampleInput, SampleOutput, StepInput

REFUSALS = (ValueError, TypeError, MemoryError, IndexError, OverflowError, AttributeError)
SECONDS = 30
MEMORY = 8 << 30  # of addresses: what is asked for beyond is refused, not granted until it is touched
KEPT = 12  # objects of a type
SLOW = {"peak_gops": 0.02, "read_bandwidth": 0.02}  # the share of their turns that they get

INTEGERS = (-(1 << 63), -(1 << 31), -7, -1, 0, 1, 2, 3, 4, 8, 15, 16, 31, 32, 33, 64, 128, 256, 257, 1000, 4096,
            (1 << 31) - 1, 1 << 31, 1 << 40, 1 << 64)
FLOATS = (0.0, -0.0, 1.0, -1.0, 1e-5, 0.5, 100.0, 1e30, -1e38, 5e-324, math.inf, -math.inf, math.nan)
WORDS = ("", "x", "é" * 9, "int8", "bf16", "float32", "bfloat16", "silu", "gelu", "clamped_swiglu", "generic", "avx2",
         *_native.available_isas())
USUAL: dict[str, tuple[Any, ...]] = {  # what gets further than a first check
    "isa": ("", *_native.available_isas()), "kv_dtype": ("float32", "bf16", "int8"), "block_size": (16, 32),
    "curve": ("silu", "gelu", "relu2", "clamped_swiglu"), "head_dim": (16, 32), "num_kv_heads": (1, 2),
    "num_heads": (2, 4), "layer": (0, 0, 1), "num_layers": (1, 2), "limit": (1.0, math.inf), "group_size": (32, 64),
    "bits": (4, 8), "threads": (1, 2, 3), **dict.fromkeys(("x", "y", "q", "qkv", "logits"), (0, 1, 2, 3, 4, 5)),
    **dict.fromkeys(("max_tokens", "max_model_len", "max_logits_rows"), (16, 33, 64)), "max_seqs": (2, 4),
    "num_blocks": (2, 9), "num_experts": (2, 4, 8), "top_k": (1, 2), "count": (1, 2, 4), "groups": (1, 2),
    "top_groups": (1, 2), "group_best": (1, 2), "scoring": ("softmax", "sigmoid"), "n": (1, 32, 64),
    **dict.fromkeys(("routed", "logit", "residual"), (0, 1, 2, 3, 4, 5)),
}
DTYPES = (np.float32, np.float16, np.float64, np.int8, np.int16, np.int32, np.int64, np.uint8)


class Caller:
    def __init__(self, random: random.Random, log: Callable[[str], object] = lambda line: None) -> None:
        self._random = random
        self._log = log
        self._numbers = np.random.default_rng(random.getrandbits(32))
        self._kept: dict[str, list[Any]] = {}
        self.outcomes: Counter[str] = Counter()
        stub = ast.parse((Path(fptq_runtime.__file__).parent / "_native.pyi").read_text())
        self._functions = [("", node) for node in stub.body if isinstance(node, ast.FunctionDef)]
        for kind in stub.body:
            if isinstance(kind, ast.ClassDef):
                self._functions += [(kind.name, node) for node in kind.body if isinstance(node, ast.FunctionDef)]

    def call(self) -> None:
        owner, function = self._random.choice(self._functions)
        if self._random.random() > SLOW.get(function.name, 1):
            return
        name = function.name
        is_property = any(getattr(each, "id", "") == "property" for each in function.decorator_list)
        parameters = function.args.args[bool(owner):]
        arguments = [self._argument(each) for each in parameters]
        named = {each.arg: self._argument(each) for each in function.args.kwonlyargs}
        if self._random.random() < 0.02:
            arguments = arguments[:-1]
        self._log(f"{owner}.{name}{arguments!r:.2000}{named!r}\n")
        try:
            if name == "__init__":
                result = getattr(_native, owner)(*arguments, **named)
            elif owner:
                target = self._object(owner)
                if target is None:
                    return
                result = getattr(target, name) if is_property else getattr(target, name)(*arguments, **named)
            else:
                result = getattr(_native, name)(*arguments, **named)
        except REFUSALS as error:
            self.outcomes[type(error).__name__] += 1
        else:
            self.outcomes["returned"] += 1
            self._keep(result)

    def _keep(self, result: Any) -> None:
        kept = self._kept.setdefault(type(result).__name__, [])
        kept.append(result)
        if len(kept) > KEPT:
            del kept[self._random.randrange(KEPT)]

    def _object(self, kind: str) -> Any:
        return self._random.choice(self._kept[kind]) if self._kept.get(kind) else None

    def _argument(self, parameter: ast.arg) -> Any:
        is_id = ast.unparse(parameter.annotation or ast.Constant(None)) == "int"
        usual = USUAL.get(parameter.arg) if is_id or parameter.arg not in ("x", "y", "q") else None
        if usual is not None and self._random.random() < 0.9:
            return self._random.choice(usual)
        return self._value(ast.unparse(parameter.annotation or ast.Constant(None)))

    def _value(self, annotation: str) -> Any:
        """Of the type that is asked for, mostly."""
        if self._random.random() < 0.02:
            return self._random.choice([None, "x", 7, 0.5, [], np.zeros((2, 2), np.float32), object()])
        kinds = annotation.split(" | ")
        kind = self._random.choice(kinds)
        if "NDArray" in annotation:
            return None if kind == "None" else self._array(annotation)
        if kind.startswith("Sequence"):
            return [self._float() for _ in range(self._random.choice((0, 1, 2, 4, 8, 16, 32, 64)))]
        match kind:
            case "None":
                return None
            case "int":
                return self._integer()
            case "float":
                return self._float()
            case "bool":
                return self._random.random() < 0.5
            case "str":
                return self._random.choice(WORDS)
            case "tuple[int, int]":
                return self._integer(), self._integer()
            case "fptq_runtime.kernels.base.StepInput":
                return self._step()
            case "fptq_runtime.kernels.base.SampleInput":
                return self._draws()
            case "fptq_runtime.kernels.base.SampleOutput":
                draws, width = self._size(), self._random.choice((0, 1, 20))
                return SampleOutput(self._ints(draws), np.zeros(draws, np.float64), np.zeros((draws, width), np.int32),
                                    np.zeros((draws, width), np.float64))
            case "fptq_runtime.kernels.base.Float32Array":
                return self._numbers.normal(size=(self._size(), self._width())).astype(np.float32)
        return self._object(kind)

    def _integer(self) -> int:
        return self._random.choice(INTEGERS) if self._random.random() < 0.3 else self._random.choice((1, 2, 4, 16, 32))

    def _float(self) -> float:
        return self._random.choice(FLOATS) if self._random.random() < 0.3 else self._random.random() + 0.01

    def _size(self) -> int:
        return self._random.choice((0, 1, 1, 2, 2, 3, 5, 16, 33))

    def _width(self) -> int:
        return self._random.choice((1, 16, 32, 32, 32, 64, 64, 96))

    def _array(self, annotation: str) -> Any:
        dtype = next((each for each in DTYPES if f"numpy.{each.__name__}]" in annotation), None)
        if dtype is None or self._random.random() < 0.1:
            dtype = self._random.choice(DTYPES)
        shape: tuple[int, ...] = (self._width(),) if "shape=(None,)" in annotation else (
            self._random.choice((self._size(), self._width())), self._random.choice((1, self._width())))
        if self._random.random() < 0.05:
            shape = self._random.choice(((), (3,), (2, 0), (2, 2, 2)))
        if self._random.random() < 0.8:
            values = self._numbers.normal(size=shape) * self._random.choice((0.5, 3, 1e30))
        else:
            values = np.full(shape, self._random.choice((0, 1, math.nan)))
        array = values.astype(dtype)
        array = np.asarray(array.T if self._random.random() < 0.1 else array)
        array.flags.writeable = self._random.random() < 0.95
        return array

    def _ints(self, count: int) -> Any:
        high = self._random.choice((1, 4, 16, 100))
        return self._numbers.integers(self._random.choice((0, 0, 0, -1)), high, count).astype(np.int32)

    def _step(self) -> StepInput:
        lengths = [self._random.choice((1, 2, 5, 17)) for _ in range(self._random.choice((1, 1, 2, 3)))]
        step = StepInput.whole([self._ints(length).tolist() for length in lengths], self._random.choice((16, 16, 32)))
        return self._spoiled(step)

    def _draws(self) -> SampleInput:
        draws, tokens, biases = self._size(), self._size(), self._size()
        masks = self._random.choice((0, 0, 1, 2))
        starts = np.sort(self._numbers.integers(0, tokens + 1, draws + 1)).astype(np.int32)
        starts[:1] = 0
        bias_start = np.sort(self._numbers.integers(0, biases + 1, draws + 1)).astype(np.int32)
        bias_start[:1] = 0
        parameters = np.zeros(draws, PARAMETERS)
        for name in PARAMETERS.names or ():
            parameters[name] = self._random.choice((0, 1, 1, 1, 50))
        batch = SampleInput(
            parameters=parameters, rows=np.arange(draws, dtype=np.int32),
            token_ids=np.full(draws, self._random.choice((-1, -1, 0, 3)), np.int32),
            positions=np.arange(draws, dtype=np.int64),
            num_logprobs=np.full(draws, self._random.choice((-1, 0, 2)), np.int32),
            bias_start=bias_start, bias_ids=self._ints(biases), bias_values=np.ones(biases, np.float32),
            history_start=starts, output_start=starts[:-1].copy(), history=self._ints(tokens),
            mask_rows=self._numbers.integers(-1, max(masks, 1), draws).astype(np.int32),
            masks=self._numbers.integers(0, 1 << 32, (masks, self._random.choice((1, 1, 1, 2, 3))), np.uint32))
        return self._spoiled(batch)

    def _spoiled(self, batch: Any) -> Any:
        """One of its arrays, half the time."""
        if self._random.random() < 0.5:
            name = self._random.choice(list(vars(batch)))
            array = getattr(batch, name).copy()
            if array.size and self._random.random() < 0.7 and array.dtype.names is None:
                value = self._random.choice((-(1 << 31), -1, 0, 1, 7, 96, 1 << 20, (1 << 31) - 1))
                array.flat[self._random.randrange(array.size)] = np.int64(value).astype(array.dtype)
            else:
                array = self._random.choice((array[:-1] if array.ndim else array, array.astype(np.float64)
                                             if array.dtype.names is None else array, array[::2]))
            object.__setattr__(batch, name, array)
        return batch


def main(seed: int, calls: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    faulthandler.enable()
    caller = Caller(random.Random(seed), sys.stderr.write)
    for _ in range(calls):
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        caller.call()
    print(dict(caller.outcomes))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
