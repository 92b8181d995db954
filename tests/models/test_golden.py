"""Golden logits accept what float arithmetic may do and refuse what a broken kernel does."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fptq_runtime.kernels.reference import ReferenceBackend
from fptq_runtime.models.decoder import Decoder
from fptq_runtime.models.golden import GoldenMismatch, check_golden, compute_golden
from fptq_runtime.models.loader import Checkpoint, load_model

DEMO = Path(__file__).parents[2] / "fptq_runtime" / "demo"
PROMPT = [0, 48, 1592, 505, 260, 581, 471, 308, 300, 17, 905, 22]
BACKEND = ReferenceBackend()


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return load_model(Checkpoint(DEMO), BACKEND)


@pytest.fixture(scope="module")
def golden(decoder: Decoder) -> dict[str, Any]:
    return compute_golden(decoder, BACKEND, PROMPT)


def test_survives_json(decoder: Decoder, golden: dict[str, Any]) -> None:
    assert check_golden(decoder, BACKEND, json.loads(json.dumps(golden))) < 1e-6


@pytest.mark.parametrize("fault", ["one layer skipped", "a panel of one layer lost", "gate and up swapped", "NaN"])
def test_a_fault_is_noticed(fault: str, decoder: Decoder, golden: dict[str, Any]) -> None:
    broken = copy.deepcopy(decoder)
    block = broken.blocks[3]
    if fault == "one layer skipped":
        del broken.blocks[3]
    elif fault == "a panel of one layer lost":
        block.linears["o"].weight[:64] = 0
    elif fault == "gate and up swapped":
        up = block.linears["up"]
        up.weight = torch.roll(up.weight, up.weight.shape[0] // 2, dims=0)
    else:
        block.linears["down"].weight[0, 0] = float("nan")
    with pytest.raises(GoldenMismatch):
        check_golden(broken, BACKEND, golden)


@pytest.mark.parametrize("change", [
    lambda g: g.pop("logits"),
    lambda g: g["prompt_token_ids"].append(7),
    lambda g: g["prompt_token_ids"].__setitem__(0, 4096),
    lambda g: g["token_ids"][0].__setitem__(0, -1),
    lambda g: g.update(token_ids="many"),
    lambda g: g.update(prompt_token_ids=[], token_ids=[], logits=[], max_abs=[]),
])
def test_malformed_is_refused(change: Callable[[dict[str, Any]], Any], decoder: Decoder,
                              golden: dict[str, Any]) -> None:
    damaged = copy.deepcopy(golden)
    change(damaged)
    with pytest.raises(GoldenMismatch, match="malformed"):
        check_golden(decoder, BACKEND, damaged)
