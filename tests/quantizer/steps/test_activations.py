"""Which scheme each input gets."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fptq_runtime.quantizer.steps.activations import Activations, Scheme
from tests.quantizer.test_folds import work_on


@pytest.mark.parametrize(("overrides", "expected"), [
    ({}, {"qkv": "static", "o": "static", "up": "static", "down": "static"}),
    ({"down": "dynamic"}, {"qkv": "static", "down": "dynamic"}),
    ({"o": "float", "*": "dynamic"}, {"qkv": "dynamic", "o": "float", "down": "dynamic"}),
    ({"*": "dynamic", "o": "float"}, {"o": "dynamic"}),
    ({"*.down_proj": "dynamic"}, {"up": "static", "down": "dynamic"}),
])
def test_overrides(overrides: dict[str, Scheme], expected: dict[str, Scheme], tmp_path: Path) -> None:
    """By kind and by module name; the first match wins."""
    _, work = work_on("llama", tmp_path)
    work.targets["down"].modules = ("model.layers.0.mlp.down_proj",)
    with torch.inference_mode():
        Activations(scheme="static", overrides=overrides).apply(work)
    for kind, scheme in expected.items():
        act = work.targets[kind].linear.act
        assert ("float" if act is None else "dynamic" if act.scale is None else "static") == scheme, kind


def test_kinds_are_no_module_patterns() -> None:
    """Every family has them, so a recipe that names one fits every family."""
    assert Activations(scheme="static", overrides={"down": "dynamic", "*.o_proj": "float"}).patterns() == ("*.o_proj",)
