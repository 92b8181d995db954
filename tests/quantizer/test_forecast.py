"""What a forecast counts, on a processor of known speed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fptq_runtime.models.loader import Checkpoint
from fptq_runtime.quantizer import forecast as module
from fptq_runtime.quantizer.forecast import PROCESS_BYTES, PROCESS_SECONDS, Forecast, forecast
from fptq_runtime.quantizer.recipe import Recipe, load_recipe
from fptq_runtime.quantizer.steps.activations import Activations
from fptq_runtime.quantizer.steps.distill import PARAMETER_BYTES
from fptq_runtime.quantizer.steps.weights import Weights
from tests.models.hf import save_random
from tests.quantizer.models import save_model

WINDOWS = [list(range(3, 103))] * 2


@pytest.fixture(autouse=True)
def speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A multiply-add a second."""
    monkeypatch.setattr(module, "_passed_a_second", lambda checkpoint, window: 1.0)
    monkeypatch.setattr(module, "_products_a_second", lambda k: 1.0)


def products(path: Path, recipe: Recipe | str, calibrated: int = 1000, writes: bool = False) -> float:
    recipe = load_recipe(recipe) if isinstance(recipe, str) else recipe
    told = forecast(Checkpoint(path), recipe, calibrated, WINDOWS, writes)
    return (told.seconds - PROCESS_SECONDS) * told.threads


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_pass_is_what_torch_counts(family: str, tmp_path: Path) -> None:
    """A hundred tokens more to calibrate on go twice through the blocks."""
    model = save_random(family, tmp_path, num_hidden_layers=2)
    plain = Recipe(name="plain", steps=(Activations(scheme="float"), Weights(num_bits=16, head_bits=16)))
    tokens = torch.tensor([[*range(3, 103)]])
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        model.model(tokens)
    linear = sum(count for op, count in counted.get_flop_counts()["Global"].items() if "bmm" not in str(op)) / 2
    passes = products(tmp_path, plain, 100_100) - products(tmp_path, plain, 100_000)
    if family == "llama":
        assert passes == pytest.approx(2 * linear, rel=0.01)
    else:  # which computes every expert's rows in its own way
        assert passes == pytest.approx(2 * 100 * active(tmp_path), rel=0.01)


def active(path: Path) -> int:
    model = Checkpoint(path).model
    return sum(linear.n * linear.k * (1 if linear.experts == 1 or block.routing is None else block.routing.top_k)
               // linear.experts for block in model.blocks for linear in block.linears)


def test_what_costs_more_is_said_to(tmp_path: Path) -> None:
    save_model("llama", tmp_path, num_hidden_layers=2)
    costs = [products(tmp_path, name) for name in ("rtn-dynamic", "fptq", "fptq-best", "fptq-max", "qat")]
    assert costs == sorted(costs) and len(set(costs)) == 5
    assert products(tmp_path, "fptq", writes=True) > products(tmp_path, "fptq")


def test_memory_is_that_of_the_largest_stage(tmp_path: Path) -> None:
    save_model("llama", tmp_path, num_hidden_layers=2)
    checkpoint = Checkpoint(tmp_path)
    plain, trained = (forecast(checkpoint, load_recipe(name), 100, WINDOWS, False).memory - PROCESS_BYTES
                      for name in ("fptq", "fptq-max"))
    assert plain < trained == PARAMETER_BYTES * checkpoint.num_parameters


@pytest.mark.parametrize(("seconds", "threads", "said"), [
    (4.4, 1, "about 4 seconds where a core has nothing else to do, and 1.5 GB of memory"),
    (200, 2, "about 3 minutes where 2 cores have nothing else to do, and 1.5 GB of memory"),
    (9000, 8, "about 2.5 hours where 8 cores have nothing else to do, and 1.5 GB of memory"),
])
def test_words(seconds: float, threads: int, said: str) -> None:
    assert str(Forecast(seconds, threads, 1_500_000_000)) == said
