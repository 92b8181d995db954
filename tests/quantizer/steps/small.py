"""One block of a small random model, bent into a method's textbook case and quantized with and without the method."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fptq_runtime.kernels.reference import ReferenceBackend
from fptq_runtime.models.decoder import Block, prepare_block, prepare_stem
from fptq_runtime.models.loader import Checkpoint, load_block, load_stem
from fptq_runtime.quantizer.calibrate import HiddenStates
from fptq_runtime.quantizer.steps.base import BlockWork, Step
from fptq_runtime.quantizer.steps.weights import Weights
from tests.quantizer.models import save_model
from tests.quantizer.walk import targets_of

LLAMA = {"hidden_size": 128, "num_attention_heads": 8, "intermediate_size": 256, "num_hidden_layers": 1}
BLOOM = {"hidden_size": 128, "n_head": 8, "n_layer": 1}


def small_model(family: str, path: Path) -> Path:
    """Every input size is a multiple of 128."""
    sizes: dict[str, Any] = BLOOM if family == "bloom" else LLAMA
    save_model(family, path, **sizes)
    return path


@torch.inference_mode()
def quantize_block(model: Path, bend: Callable[[Block], None], *steps: Step) -> tuple[BlockWork, float]:
    """The first block after `bend` and the steps, and its error: |ŷ - y|² / |y|² over what it adds to the residual,
    y the bent block's in float."""
    checkpoint, backend = Checkpoint(model), ReferenceBackend()
    windows = torch.randint(3, 260, (8, 40), generator=torch.Generator().manual_seed(0)).tolist()
    config = checkpoint.model_config
    states = HiddenStates(config, windows)
    states.run_stem(prepare_stem(load_stem(checkpoint), backend))
    block = prepare_block(load_block(checkpoint, 0), backend)
    bend(block)
    entering = torch.cat(states.states)
    exact = torch.cat(list(states.block_outputs(block)))
    for step in steps:
        step.check(config)
        config = step.transform_config(config)
    for step in steps:
        step.transform_block(config, 0, block)
    work = BlockWork(config, 0, block, targets_of(states, block), states)
    for weights in (step for step in steps if isinstance(step, Weights)):
        for target in work.targets.values():
            target.rounding = weights.rounding(target.modules)
    for step in steps:
        step.apply(work)
    output = torch.cat(list(states.block_outputs(prepare_block(block, backend))))
    return work, float((output - exact).square().sum() / (exact - entering).square().sum())


def as_it_is(block: Block) -> None:
    """A block without the problem."""
