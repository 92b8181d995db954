"""FPTQ Serve: quantize a language model to W4A8 and run it. Names are imported when first used, since torch is slow to
import and not every use needs it."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fptq_runtime.engine.llm import LLM
    from fptq_runtime.engine.request import SamplingParams
    from fptq_runtime.errors import FptqError
    from fptq_runtime.locate import load
    from fptq_runtime.quantizer.pipeline import quantize
    from fptq_runtime.quantizer.recipe import Recipe
    from fptq_runtime.quantizer.samples import Calibration

__version__ = "0.1.0"

__all__ = ["LLM", "Calibration", "FptqError", "Recipe", "SamplingParams", "__version__", "load", "quantize"]

_MODULES = {
    "Calibration": "fptq_runtime.quantizer.samples",
    "FptqError": "fptq_runtime.errors",
    "LLM": "fptq_runtime.engine.llm",
    "Recipe": "fptq_runtime.quantizer.recipe",
    "SamplingParams": "fptq_runtime.engine.request",
    "load": "fptq_runtime.locate",
    "quantize": "fptq_runtime.quantizer.pipeline",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
