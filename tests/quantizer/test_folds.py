"""A fold changes where the numbers stand, not what the block computes. Oracle: the block itself, unfolded."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from fptq_runtime.models.loader import Checkpoint
from fptq_runtime.quantizer.calibrate import HiddenStates, observe_block
from fptq_runtime.quantizer.folds import fold, foldable_scale
from fptq_runtime.quantizer.steps.base import BlockWork, observe
from fptq_runtime.quantizer.walk import float_part, float_stem
from tests.quantizer.models import save_model


@torch.inference_mode()
def work_on(family: str, path: Path) -> tuple[HiddenStates, BlockWork]:
    save_model(family, path)
    checkpoint = Checkpoint(path)
    windows = torch.randint(3, 260, (2, 30), generator=torch.Generator().manual_seed(0)).tolist()
    states = HiddenStates(checkpoint.model, windows)
    states.run_stem(float_stem(checkpoint))
    return states, observe(checkpoint.model, float_part(checkpoint, 0), states)


@pytest.mark.parametrize("family", ["llama-tied-bias", "qwen2", "qwen3", "bloom"])
def test_folds_are_exact(family: str, tmp_path: Path) -> None:
    """All of them at once, with scales from 1/4 to 30; the stats then say what the folded block's inputs are."""
    states, work = work_on(family, tmp_path)
    with torch.inference_mode():
        expected = torch.cat(list(states.block_outputs(copy.deepcopy(work.block))))
        torch.manual_seed(1)
        for name, target in work.targets.items():
            if work.block.spec.edge(name) is not None:
                wanted = torch.exp(torch.empty(target.stats.amax.shape).uniform_(-1.4, 3.4))
                scale = foldable_scale(work.block, name, wanted)
                assert bool((scale >= wanted).all())
                fold(work, name, scale)
        folded = torch.cat(list(states.block_outputs(work.block)))
        torch.testing.assert_close(folded, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
        for kind, stats in observe_block(states, work.block).items():
            followed = work.targets[kind].stats
            torch.testing.assert_close(followed.amax, stats.amax, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(followed.mean_square, stats.mean_square, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(followed.sample, stats.sample, rtol=1e-3, atol=1e-4)


def test_nothing_folds_through_gelu(tmp_path: Path) -> None:
    _, work = work_on("bloom", tmp_path)
    assert [name for name in work.targets if work.block.spec.edge(name) is None] == ["down"]
