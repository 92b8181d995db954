"""A model taken through a recipe's steps in float, without files: what the transforms make of it, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from fptq_runtime.kernels.reference import ReferenceOps
from fptq_runtime.models.loader import Checkpoint
from fptq_runtime.quantizer.calibrate import HiddenStates
from fptq_runtime.quantizer.steps.base import BlockWork, Step
from fptq_runtime.quantizer.walk import Walk


def in_float(work: BlockWork) -> None:
    """Activations stay in float whatever a step chose for them."""
    for linear in work.block.linears.values():
        linear.act = None


@torch.inference_mode()
def float_logits(path: Path, steps: Sequence[Step], windows: Sequence[Sequence[int]],
                 visit: Callable[[BlockWork], None] = lambda work: None) -> torch.Tensor:
    """Logits [tokens, V] of the checkpoint after `steps`, which must not quantize weights. Each block is shown to
    `visit`."""
    walk = Walk(Checkpoint(path), steps, windows)
    states = HiddenStates(walk.model, windows)
    states.run_stem(walk.stem())
    for work in walk.blocks():
        if not work.is_head:
            visit(work)
        in_float(work)
        if work.is_head:
            return torch.cat([work.block.forward(ReferenceOps(batch, None), state)
                              for batch, state in zip(states.batches, states.states, strict=True)])
        states.run_block(work.block)
    raise AssertionError("a model has a head")
