"""AWQ against a search over everything in numpy, and on what it exists for: a few channels with large inputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from fptq_runtime.artifact.numerics import dequantize, quantize_weight
from fptq_runtime.quantizer.calibrate import HiddenStates
from fptq_runtime.quantizer.steps.awq import CLIPS, Awq
from fptq_runtime.quantizer.steps.base import BlockWork, Rounding
from fptq_runtime.quantizer.steps.weights import Weights
from tests.quantizer.test_folds import work_on


def salient_work(path: Path) -> BlockWork:
    """Four channels of what qkv and up read are thirty times as large as the others, and their weights as much
    smaller: next to their neighbours', four bits hold little of them. The recipe's groups are of 32."""
    _, work = in_groups_of_32(path)
    for kind in ("qkv", "up"):
        target = work.targets[kind]
        scale = torch.ones(target.weight.shape[1])
        scale[[3, 30, 60, 90]] = 30
        norm = work.norm(target)
        assert norm is not None
        norm.weight = norm.weight * scale
        target.linear.weight = target.weight / scale
        target.stats.divide(1 / scale)
    return work


def in_groups_of_32(path: Path) -> tuple[HiddenStates, BlockWork]:
    states, work = work_on("llama", path)
    for target in work.targets.values():
        target.rounding = Rounding(group_size=32)
    return states, work


def squared_error(work: BlockWork, kind: str) -> float:
    """Of int4 weights, group 32, on the sample; what an earlier step found is used."""
    target = work.targets[kind]
    codes, scale = Weights()._round(target)
    return float(((dequantize(codes, scale) - target.weight) @ target.stats.sample.T).square().sum())


@torch.inference_mode()
def test_salient_channels_are_spared(tmp_path: Path) -> None:
    work = salient_work(tmp_path)
    before = {kind: squared_error(work, kind) for kind in ("qkv", "up")}
    Awq(clip=False).apply(work)
    for kind in before:
        assert squared_error(work, kind) < 0.3 * before[kind]
    assert all(target.equalized for target in work.targets.values())


@torch.inference_mode()
def test_the_best_ratio_is_found(tmp_path: Path) -> None:
    """up's, whose weights no other fold touches before."""
    work = salient_work(tmp_path)
    target = work.targets["up"]
    x, weight = target.stats.sample.numpy(), target.weight.numpy()
    magnitude = np.abs(x).mean(0)
    errors, scales = [], []
    for ratio in np.arange(20) / 20:
        scale = magnitude**ratio
        scale = scale / np.sqrt(scale.max() * scale.min())
        scales.append(scale)
        rounded = dequantize(*quantize_weight(torch.from_numpy(weight * scale), 4, 32, None, torch.bfloat16)).numpy()
        errors.append(np.square((x / scale) @ rounded.T - x @ weight.T).sum())
    assert 0 < int(np.argmin(errors)) < 19
    np.testing.assert_allclose(Awq()._scale(work, target), scales[int(np.argmin(errors))], rtol=1e-4)


@torch.inference_mode()
def test_the_best_clips_are_found(tmp_path: Path) -> None:
    """Group by group against the outputs themselves; q and k rows keep their range."""
    _, work = in_groups_of_32(tmp_path)
    work.targets["qkv"].linear.weight = work.targets["qkv"].weight * torch.rand(96).exp() ** 2
    Awq().apply(work)
    values = work.model.config.num_kv_heads * work.model.config.head_dim
    for kind in ("qkv", "o"):
        target = work.targets[kind]
        assert target.clip is not None
        x, clip = target.stats.sample, target.clip
        errors = []
        for ratio in CLIPS:
            codes, scale = quantize_weight(target.weight, 4, 32, torch.full_like(clip, ratio), torch.bfloat16)
            difference = dequantize(codes, scale) - target.weight
            errors.append(torch.stack([(difference[:, g : g + 32] @ x[:, g : g + 32].T).square().sum(-1)
                                       for g in range(0, 96, 32)], 1))
        rows = slice(-values if kind == "qkv" else 0, None)
        best = torch.stack(errors).amin(0)[rows]
        chosen = (clip[..., None] - torch.tensor(CLIPS)).abs().argmin(-1)
        found = torch.stack(errors).gather(0, chosen[None])
        torch.testing.assert_close(found[0][rows], best, rtol=1e-3, atol=1e-6)
        assert bool((clip[rows] < 1).any())
        if kind == "qkv":
            assert bool((clip[:-values] == 1).all())
