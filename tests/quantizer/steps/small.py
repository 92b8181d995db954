"""One block of a small random model, bent into a method's textbook case and quantized with and without the method."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fptq_runtime.kernels.base import Linear, Norm
from fptq_runtime.kernels.reference import ReferenceBackend
from fptq_runtime.models.block import Block, prepare_block
from fptq_runtime.models.families import parse_config
from fptq_runtime.models.loader import Checkpoint
from fptq_runtime.quantizer.calibrate import HiddenStates
from fptq_runtime.quantizer.steps.base import BlockWork, Step, observe
from fptq_runtime.quantizer.steps.weights import Weights
from fptq_runtime.quantizer.walk import float_part, float_stem
from tests.quantizer.models import save_model

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
    checkpoint = Checkpoint(model)
    windows = torch.randint(3, 260, (8, 40), generator=torch.Generator().manual_seed(0)).tolist()
    states = HiddenStates(checkpoint.model, windows)
    states.run_stem(float_stem(checkpoint))
    block = float_part(checkpoint, 0)
    bend(block)
    entering = torch.cat(states.states)
    exact = torch.cat(list(states.block_outputs(block)))
    transformed, config = checkpoint.model, checkpoint.config
    for step in steps:
        step.check(transformed)
        config = step.transform_config(transformed, config)
        transformed = parse_config(config)
    block.spec = transformed.blocks[0]
    for step in steps:
        step.transform_block(transformed, block)
    work = observe(transformed, block, states, next((step for step in steps if isinstance(step, Weights)), None))
    for step in steps:
        step.apply(work)
    output = torch.cat(list(states.block_outputs(prepare_block(block, ReferenceBackend()))))
    return work, float((output - exact).square().sum() / (exact - entering).square().sum())


def normed(block: Block) -> list[tuple[Norm, Linear]]:
    """Each norm with the linear that reads it."""
    return [(block.norms[name], block.linears[reader]) for name, reader in (("input_norm", "qkv"), ("mlp_norm", "up"))]


def as_it_is(block: Block) -> None:
    """A block without the problem."""
