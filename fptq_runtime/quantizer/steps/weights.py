"""Symmetric integer weights by rounding to nearest, per group or per channel."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from fptq_runtime.artifact.numerics import dequantize, pack_codes, quantize_weight
from fptq_runtime.kernels.base import QuantizedWeight
from fptq_runtime.quantizer.steps.base import BlockWork, HeadWork, QuantizationError, Step, Target, matches

Bits = Literal[4, 8, 16]

CLIP_STEPS = 40
CHUNK_WEIGHTS = 1 << 22  # weights searched at a time, which bounds the memory
MAX_SATURATED = 0.5  # of all codes at either end of their range; a Gaussian has well below a tenth


class Weights(Step):
    """Quantize the linears of every block, and the head. A method that rounds otherwise is a subclass.

    num_bits: 16 leaves the linears in float, as `dtype`, and so does a `keep` of 16; their inputs stay float too.
    group_size: None, or inputs that are no multiple of it: per channel.
    clip: "mse" searches each group's range, from 1.07 down to 0.55 of max |w|, for the least squared error, each
    weight's counted with its input's mean square: the output error where inputs are uncorrelated.
    head_bits: 8 per channel; 4 as the blocks; 16 leaves the head in float.
    keep: module-name pattern to more bits than num_bits; the first match wins. Linears that read one input are kept
    together.
    """

    type: Literal["weights"] = "weights"
    num_bits: Bits = 4
    group_size: Literal[32, 64, 128] | None = 128
    clip: Literal["none", "mse"] = "none"
    head_bits: Bits = 8
    keep: dict[str, Literal[8, 16]] = Field(default_factory=dict)
    dtype: Literal["bf16", "fp16"] = "bf16"

    def patterns(self) -> tuple[str, ...]:
        return tuple(self.keep)

    def apply(self, work: BlockWork) -> None:
        for target in work.targets.values():
            kept = (bits for pattern, bits in self.keep.items() if matches(pattern, target.modules))
            self._quantize(target, next(kept, self.num_bits), self.group_size)

    def apply_head(self, work: HeadWork) -> None:
        if self.head_bits == 16:  # as it is in the checkpoint, where it may be tied to the embedding
            target = work.target
            target.linear.act, target.reason, target.activation_error = None, "float", 0.0
        else:
            self._quantize(work.target, self.head_bits, None if self.head_bits == 8 else self.group_size)

    def _quantize(self, target: Target, num_bits: Bits, group_size: int | None) -> None:
        if num_bits == 16:
            target.keep_float(torch.bfloat16 if self.dtype == "bf16" else torch.float16)
            return
        k = target.weight.shape[1]
        group = usable_group(k, group_size)
        codes, scale = self._round(target, num_bits, group)
        _refuse_degenerate(target.linear.name, codes, scale, num_bits)
        target.set_weight(QuantizedWeight(pack_codes(codes, num_bits), scale, num_bits, group or k))

    def _round(self, target: Target, num_bits: Literal[4, 8], group: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes [N, K] int8 and bfloat16 scale [N, G]; group None is per channel."""
        clip = target.clip
        if clip is None and self.clip == "mse":
            clip = search_clip(target.weight, target.stats.mean_square, num_bits, group)
        return quantize_weight(target.weight, num_bits, group, clip, torch.bfloat16)


def usable_group(k: int, group_size: int | None) -> int | None:
    """None, per channel, where the inputs are no multiple of the group."""
    return None if group_size is None or k % group_size else group_size


def search_clip(weight: torch.Tensor, importance: torch.Tensor, num_bits: int, group_size: int | None) -> torch.Tensor:
    """The fraction of max |w| that gives each group the least Σ importance · (w - ŵ)². weight [N, K], importance [K];
    returns [N, G]."""
    k = weight.shape[1]
    groups = 1 if group_size is None else k // group_size
    rows = max(1, CHUNK_WEIGHTS // k)
    ratios = torch.linspace(1.07, 0.55, CLIP_STEPS)
    best = []
    for start in range(0, weight.shape[0], rows):
        part = weight[start : start + rows]
        least = torch.full((part.shape[0], groups), float("inf"))
        clip = torch.ones_like(least)
        for ratio in ratios.tolist():
            tried = torch.full_like(clip, ratio)
            codes, scale = quantize_weight(part, num_bits, group_size, tried, torch.bfloat16)
            error = (dequantize(codes, scale) - part).square_().mul_(importance)
            error = error.reshape(part.shape[0], groups, -1).sum(-1)
            better = error < least
            least, clip = torch.where(better, error, least), torch.where(better, tried, clip)
        best.append(clip)
    return torch.cat(best)


def _refuse_degenerate(name: str, codes: torch.Tensor, scale: torch.Tensor, num_bits: int) -> None:
    """A constant, non-finite or saturated tensor is a failed run."""
    limit = 2 ** (num_bits - 1)
    if not bool(torch.isfinite(scale).all()):
        raise QuantizationError(f"{name}: quantized weights are not finite; the checkpoint may be damaged")
    if int(codes.min()) == int(codes.max()):
        raise QuantizationError(f"{name}: every quantized weight is the same; the checkpoint may be damaged")
    saturated = float(((codes == limit - 1) | (codes == -limit)).float().mean())
    if saturated > MAX_SATURATED:
        raise QuantizationError(f"{name}: {saturated:.0%} of the quantized weights are at the ends of their range; "
                                "the checkpoint may be damaged")
