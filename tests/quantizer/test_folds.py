"""A fold changes where the numbers stand, not what the block computes. Oracle: the block itself, unfolded."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from fptq_runtime.kernels.base import Linear, Norm
from fptq_runtime.kernels.reference import ReferenceBackend
from fptq_runtime.models.decoder import prepare_block, prepare_stem
from fptq_runtime.models.loader import Checkpoint, load_block, load_stem
from fptq_runtime.quantizer.calibrate import BLOCK_KINDS, HiddenStates, Kind, observe_block
from fptq_runtime.quantizer.folds import can_fold, fold, foldable_scale
from fptq_runtime.quantizer.steps.base import BlockWork, Target
from tests.quantizer.models import save_model


@torch.inference_mode()
def work_on(family: str, path: Path) -> tuple[HiddenStates, BlockWork]:
    save_model(family, path)
    checkpoint = Checkpoint(path)
    windows = torch.randint(3, 260, (2, 30), generator=torch.Generator().manual_seed(0)).tolist()
    states = HiddenStates(checkpoint.model_config, windows)
    states.run_stem(prepare_stem(load_stem(checkpoint), ReferenceBackend()))
    block = prepare_block(load_block(checkpoint, 0), ReferenceBackend())
    stats = observe_block(states, block)
    linears: dict[Kind, Linear] = {"qkv": block.qkv, "o": block.o, "up": block.up, "down": block.down}
    norms: dict[Kind, Norm] = {"qkv": block.input_norm, "up": block.mlp_norm}
    targets = {kind: Target(kind, linears[kind], (kind,), stats[kind], norms.get(kind)) for kind in BLOCK_KINDS}
    return states, BlockWork(checkpoint.model_config, 0, block, targets, states)


@pytest.mark.parametrize("family", ["llama-tied-bias", "qwen2", "qwen3", "bloom"])
def test_folds_are_exact(family: str, tmp_path: Path) -> None:
    """All of them at once, with scales from 1/4 to 30; the stats then say what the folded block's inputs are."""
    states, work = work_on(family, tmp_path)
    with torch.inference_mode():
        expected = torch.cat(list(states.block_outputs(copy.deepcopy(work.block))))
        torch.manual_seed(1)
        for kind in BLOCK_KINDS:
            if can_fold(work.config, kind):
                wanted = torch.exp(torch.empty(work.targets[kind].stats.amax.shape).uniform_(-1.4, 3.4))
                scale = foldable_scale(work.config, kind, wanted)
                assert bool((scale >= wanted).all())
                fold(work, kind, scale)
        folded = torch.cat(list(states.block_outputs(work.block)))
        torch.testing.assert_close(folded, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
        for kind, stats in observe_block(states, work.block).items():
            followed = work.targets[kind].stats
            torch.testing.assert_close(followed.amax, stats.amax, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(followed.mean_square, stats.mean_square, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(followed.sample, stats.sample, rtol=1e-3, atol=1e-4)


def test_nothing_folds_through_gelu(tmp_path: Path) -> None:
    _, work = work_on("bloom", tmp_path)
    assert [kind for kind in BLOCK_KINDS if not can_fold(work.config, kind)] == ["down"]
