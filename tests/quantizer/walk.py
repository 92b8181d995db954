"""A model taken through a recipe's steps in float, without files: what the transforms make of it, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from fptq_runtime.kernels.base import Linear, Norm
from fptq_runtime.kernels.reference import ReferenceBackend, ReferenceOps
from fptq_runtime.models.decoder import Block, prepare_block, prepare_head, prepare_stem, run_head
from fptq_runtime.models.loader import Checkpoint, load_block, load_head, load_stem
from fptq_runtime.quantizer.calibrate import BLOCK_KINDS, HiddenStates, Kind, observe_block, observe_head
from fptq_runtime.quantizer.steps.base import BlockWork, HeadWork, Step, Target


def targets_of(states: HiddenStates, block: Block) -> dict[Kind, Target]:
    """A float block's linears, observed."""
    stats = observe_block(states, block)
    linears: dict[Kind, Linear] = {"qkv": block.qkv, "o": block.o, "up": block.up, "down": block.down}
    norms: dict[Kind, Norm] = {"qkv": block.input_norm, "up": block.mlp_norm}
    return {kind: Target(kind, linears[kind], (kind,), stats[kind], norms.get(kind)) for kind in BLOCK_KINDS}


@torch.inference_mode()
def float_logits(path: Path, steps: Sequence[Step], windows: Sequence[Sequence[int]],
                 visit: Callable[[BlockWork], None] = lambda work: None) -> torch.Tensor:
    """Logits [tokens, V] of the checkpoint after `steps`, which must not quantize weights; activations stay in float
    whatever a step chooses for them. Each block is shown to `visit`."""
    checkpoint, backend = Checkpoint(path), ReferenceBackend()
    config = checkpoint.model_config
    for step in steps:
        step.check(config)
        config = step.transform_config(config)
    states = HiddenStates(config, windows)
    stem = prepare_stem(load_stem(checkpoint), backend)
    for step in steps:
        step.transform_stem(config, stem)
    states.run_stem(stem)
    for index in range(config.num_layers):
        block = prepare_block(load_block(checkpoint, index), backend)
        for step in steps:
            step.transform_block(config, index, block)
        work = BlockWork(config, index, block, targets_of(states, block), states)
        for step in steps:
            step.apply(work)
        visit(work)
        states.run_block(block)
    head = prepare_head(load_head(checkpoint), backend)
    for step in steps:
        step.transform_head(config, head)
    target = Target("head", head.lm_head, ("lm_head",), observe_head(states, head), head.norm)
    for step in steps:
        step.apply_head(HeadWork(config, head, target, states))
    return torch.cat([run_head(ReferenceOps(batch, None), head, state)
                      for batch, state in zip(states.batches, states.states, strict=True)])
