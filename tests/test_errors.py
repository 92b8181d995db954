"""One tree of what a user can mend: everything else is a fault of ours."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

import pytest

import fptq_runtime
import fptq_server
from fptq_runtime.config import EngineConfig
from fptq_runtime.engine.request import SamplingParams
from fptq_runtime.errors import FptqError
from fptq_runtime.kernels.select import select_backend
from fptq_server.config import ServerConfig


def test_every_error_of_ours_is_one_or_no_mistake_of_the_users() -> None:
    """A new class of errors that is a plain ValueError would be shown as an internal error."""
    ours: set[type[Exception]] = set()
    for package in (fptq_runtime, fptq_server):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if module.name.endswith(("_native", "ray_serve")) or ".triton" in module.name:  # what extras bring
                continue
            ours |= {value for value in vars(importlib.import_module(module.name)).values()
                     if isinstance(value, type) and issubclass(value, Exception)
                     and value.__module__.startswith(("fptq_runtime", "fptq_server"))}
    others = {error.__name__ for error in ours if not issubclass(error, FptqError)}
    assert others == {"DeviceLostError", "EngineDeadError", "Interrupted", "NotACall", "QueueFullError", "_Captured"}
    assert len(ours) > 15


def test_it_is_public() -> None:
    assert fptq_runtime.FptqError is FptqError
    with pytest.raises(fptq_runtime.FptqError, match="no model at"):
        fptq_runtime.load("no-such-model")


@pytest.mark.parametrize(("make", "param"), [
    (lambda: EngineConfig(max_model_len=0), "max_model_len"),
    (lambda: EngineConfig(8, block_size=5), "block_size"),
    (lambda: EngineConfig(8, kv_cache_dtype="int4"), "kv_cache_dtype"),  # type: ignore[arg-type]
    (lambda: SamplingParams(top_p=2), "top_p"),
    (lambda: SamplingParams(logit_bias={-1: 0}), "logit_bias"),
    (lambda: ServerConfig(port=-1), "port"),
    (lambda: ServerConfig(api_keys=("",)), "api_keys"),
    (lambda: ServerConfig(head_timeout=0), "head_timeout"),
    (lambda: select_backend("gpu"), "backend"),
    (lambda: select_backend(device="tpu"), "device"),
    (lambda: select_backend(threads=1 << 20), "threads"),
    (lambda: select_backend("native", threads=-1), "threads"),
])
def test_it_names_the_parameter(make: Callable[[], Any], param: str) -> None:
    with pytest.raises(FptqError) as caught:
        make()
    assert caught.value.param == param
    assert "\n" not in str(caught.value)


def test_only_what_it_names_is_spelled() -> None:
    error = FptqError("/a/top_k: top_k 9 goes with top_p, top_k_2 or seed", "top_k", "top_p")
    names = {"top_k": "--top-k", "top_p": "--top-p", "seed": "--seed"}
    assert error.spelled(names) == "/a/top_k: --top-k 9 goes with --top-p, top_k_2 or seed"
    assert error.spelled({}) == FptqError(str(error)).spelled(names) == str(error)


def test_it_is_one_line_whatever_it_quotes() -> None:
    assert str(FptqError("no dtype 'F\n32\u2028'\n")) == "no dtype 'F 32 '"
