"""Symmetric weights by rounding to nearest, per group or per channel."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import torch
from pydantic import Field, model_validator

from fptq_runtime.artifact.numerics import (
    ScaleRule,
    absmax_scale,
    code_range,
    dequantize,
    pack_codes,
    quantize_weight,
)
from fptq_runtime.artifact.scheme import NumberType
from fptq_runtime.kernels.base import QuantizedWeight
from fptq_runtime.quantizer.steps.base import BlockWork, HeadWork, QuantizationError, Rounding, Step, Target, matches

Bits = Literal[4, 8, 16]

CLIP_STEPS = 40
CHUNK_WEIGHTS = 1 << 19  # searched at a time: 2 MiB, which stay in the cache
MAX_SATURATED = 0.5  # of all codes at either end of their range; a Gaussian has well below a tenth


class Weights(Step):
    """Quantize the linears of every block, and the head. A method that rounds otherwise is a subclass.

    num_bits: 16 leaves the linears in float, as `dtype`, and so does a `keep` of 16; their inputs stay float too.
    group_size: None, or inputs that are no multiple of it: per channel.
    clip: "mse" searches each group's range, from 1.07 down to 0.55 of max |w|, for the least squared error, each
    weight's counted with its input's mean square: the output error where inputs are uncorrelated.
    bias_correction: the bias of a linear that has one makes up for what rounding the weights does to the mean output:
    bias -= (Ŵ - W) · E[x] (DFQ, arXiv 1906.04721).
    head_bits: 8 per channel; 4 as the blocks; 16 leaves the head in float.
    keep: module-name pattern to more bits than num_bits; the first match wins. Linears that read one input are kept
    together.
    grid: "float" rounds to FP4 E2M1 where it says 4 bits, and to FP8 E4M3 per channel where it says 8.
    scales: of 4 bits on the float grid, rounded up to powers of two, so that a GPU casts FP4 to FP8 by adding to the
    exponent: "m1" each by itself, "m2" to the row's largest scale times 2^-k (ZeroQuant-FP, arXiv 2307.09782). Of 4-bit
    integers "two-level": rounded up to an integer times a unit of the row, for faster prompts on a GPU.
    lorc: rank of what is added to 4-bit weights, in bfloat16: the best approximation of what rounding took away
    (LoRC, ibid.); linears that read one input share it.
    """

    type: Literal["weights"] = "weights"
    num_bits: Bits = 4
    group_size: Literal[32, 64, 128] | None = 128
    clip: Literal["none", "mse"] = "none"
    bias_correction: bool = False
    head_bits: Bits = 8
    keep: dict[str, Literal[8, 16]] = Field(default_factory=dict)
    dtype: Literal["bf16", "fp16"] = "bf16"
    grid: NumberType = "int"
    scales: ScaleRule = "float"
    lorc: int = Field(default=0, ge=0, le=1024)

    @model_validator(mode="after")
    def _consistent(self) -> Weights:
        four = 4 in (self.num_bits, self.head_bits)
        if self.grid == "float" and self.num_bits == 16:
            raise ValueError("grid goes with num_bits 4 or 8, not 16")
        grid = "int" if self.scales == "two-level" else "float"
        if self.scales != "float" and not (self.grid == grid and four):
            raise ValueError(f"scales {self.scales!r} goes with 4 bits and grid {grid!r}")
        if self.lorc and not four:
            raise ValueError("lorc corrects 4-bit weights, and this step makes none")
        return self

    def patterns(self) -> tuple[str, ...]:
        return tuple(self.keep)

    def bits(self, modules: tuple[str, ...]) -> Bits:
        """Of a block's linear: what `keep` says, or num_bits."""
        return next((bits for pattern, bits in self.keep.items() if matches(pattern, modules)), self.num_bits)

    def rounding(self, modules: tuple[str, ...]) -> Rounding:
        """Of a block's linear."""
        return self._rounding(self.bits(modules), self.group_size)

    def _rounding(self, num_bits: Bits, group_size: int | None) -> Rounding:
        group = None if self.grid == "float" and num_bits == 8 else group_size
        return Rounding(num_bits, group, self.grid, self.scales if num_bits == 4 else "float")

    def apply(self, work: BlockWork) -> None:
        for target in work.targets.values():
            self._quantize(target, self.bits(target.modules), self.group_size)

    def apply_head(self, work: HeadWork) -> None:
        if self.head_bits == 16:  # as it is in the checkpoint, where it may be tied to the embedding
            work.target.set_act(None, "float")
        else:
            self._quantize(work.target, self.head_bits, None if self.head_bits == 8 else self.group_size)

    def _quantize(self, target: Target, num_bits: Bits, group_size: int | None) -> None:
        if num_bits == 16:
            target.keep_float(torch.bfloat16 if self.dtype == "bf16" else torch.float16)
            return
        if bool(target.weight.amin() == target.weight.amax()):
            raise QuantizationError(f"{target.linear.name}: every weight is the same; the checkpoint may be damaged")
        k = target.weight.shape[1]
        group = self._rounding(num_bits, group_size).group(k)
        codes, scale = self._round(target, num_bits, group)
        _refuse_degenerate(target.linear.name, codes, scale, num_bits, self.grid)
        low_rank = None
        if self.lorc and num_bits == 4:
            low_rank = low_rank_factors(target.weight - dequantize(codes, scale), self.lorc)
        target.set_weight(QuantizedWeight(pack_codes(codes, num_bits), scale, num_bits, group or k, self.grid),
                          self.bias_correction, low_rank)

    def _round(self, target: Target, num_bits: Literal[4, 8], group: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes [N, K] on the grid and bfloat16 scale [N, G]; group None is per channel."""
        return self._nearest(target, target.weight, target.stats.mean_square, num_bits, group)

    def _nearest(self, target: Target, weight: torch.Tensor, importance: torch.Tensor, num_bits: Literal[4, 8],
                 group: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """`weight` [N, K] rounded to nearest, with the ranges that an earlier step or a search found; importance
        [K]."""
        clip, rounding = target.clip, self._rounding(num_bits, group)
        if clip is None and self.clip == "mse":
            clip = search_clip(weight, importance, num_bits, group, self.grid, rounding.scales)
        return rounding.codes(weight, clip)


def low_rank_factors(error: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """down [r, K] and up [N, r], bfloat16, with up · down the nearest of that rank to error [N, K] (Eckart-Young), by
    randomized subspace iteration; r is `rank`, or all that error can have. Rows of down are int8 times a power of two.
    """
    rank = min(rank, *error.shape)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        left, values, right = torch.svd_lowrank(error, q=min(2 * rank + 8, *error.shape), niter=8)
    down = dequantize(*quantize_weight(right[:, :rank].T.contiguous(), 8, None, scales="m1"))
    return down.bfloat16(), (left[:, :rank] * values[:rank]).bfloat16().contiguous()


def search_clip(weight: torch.Tensor, importance: torch.Tensor, num_bits: int, group_size: int | None,
                grid: NumberType = "int", scales: ScaleRule = "float") -> torch.Tensor:
    """The fraction of max |w| that gives each group the least Σ importance · (w - ŵ)². weight [N, K], importance [K];
    returns [N, G]."""
    parts = weight.split(max(1, CHUNK_WEIGHTS // weight.shape[1]))  # type: ignore[no-untyped-call]
    threads = torch.get_num_threads()
    # A part's ops are too short to be worth dividing, so each thread takes parts of its own.
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as executor:
            best = executor.map(lambda part: _best_clip(part, importance, num_bits, group_size, grid, scales), parts)
            return torch.cat([*best])
    finally:
        torch.set_num_threads(threads)


@torch.inference_mode()
def _best_clip(weight: torch.Tensor, importance: torch.Tensor, num_bits: int, group_size: int | None, grid: NumberType,
               scales: ScaleRule) -> torch.Tensor:
    n, k = weight.shape
    grouped = weight.reshape(n, 1 if group_size is None else k // group_size, -1)
    weighting = importance.reshape(grouped.shape[1:])
    amax, buffer = grouped.abs().amax(-1), torch.empty_like(grouped)
    least = torch.full_like(amax, float("inf"))
    clip = torch.ones_like(least)
    for ratio in torch.linspace(1.07, 0.55, CLIP_STEPS).tolist():
        if grid == "int":
            _round_trip(grouped, absmax_scale(amax * ratio, num_bits).bfloat16().float(), num_bits, buffer)
        else:
            tried = torch.full_like(clip, ratio)
            codes, scale = quantize_weight(weight, num_bits, group_size, tried, torch.bfloat16, grid, scales)
            buffer.copy_(dequantize(codes, scale).reshape(grouped.shape))
        error = buffer.sub_(grouped).square_().mul_(weighting).sum(-1)
        better = error < least
        least, clip = torch.where(better, error, least), clip.masked_fill_(better, ratio)
    return clip


def _round_trip(grouped: torch.Tensor, scale: torch.Tensor, num_bits: int, out: torch.Tensor) -> None:
    """To integer codes and back, as numerics.quantize and dequantize, without leaving `out`. grouped [N, G, group],
    scale [N, G]"""
    limit = 2 ** (num_bits - 1)
    scale = scale.unsqueeze(-1)
    torch.div(grouped, scale, out=out).round_().clamp_(-limit, limit - 1).mul_(scale)


def _refuse_degenerate(name: str, codes: torch.Tensor, scale: torch.Tensor, num_bits: int, grid: NumberType) -> None:
    """A constant, non-finite or saturated tensor is a failed run."""
    low, high = code_range(num_bits, grid)
    codes = codes if grid == "int" else codes.float()
    if not bool(torch.isfinite(scale).all()):
        raise QuantizationError(f"{name}: quantized weights are not finite; the checkpoint may be damaged")
    if float(codes.min()) == float(codes.max()):
        raise QuantizationError(f"{name}: every quantized weight is the same; the checkpoint may be damaged")
    saturated = int(((codes == high) | (codes == low)).count_nonzero()) / codes.numel()
    if saturated > MAX_SATURATED:
        raise QuantizationError(f"{name}: {saturated:.0%} of the quantized weights are at the ends of their range; "
                                "the checkpoint may be damaged")
