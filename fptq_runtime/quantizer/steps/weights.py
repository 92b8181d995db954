"""Symmetric weights by rounding to nearest, per group or per channel."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import torch
from pydantic import Field, model_validator

from fptq_runtime.artifact.numerics import (
    ScaleRule,
    absmax_scale,
    dequantize,
    pack_codes,
    quantize_weight,
)
from fptq_runtime.artifact.scheme import NumberType
from fptq_runtime.kernels.base import QuantizedWeight
from fptq_runtime.models.block import Model
from fptq_runtime.quantizer.calibrate import SAMPLE_ROWS
from fptq_runtime.quantizer.steps.base import BlockWork, QuantizationError, Rounding, Step, Target, matches

Bits = Literal[4, 8, 16]

CLIP_STEPS = 40
CLIP_PRODUCTS = 75  # as many multiply-adds take as long as one step does on a weight
CHUNK_WEIGHTS = 1 << 19  # searched at a time: 2 MiB, which stay in the cache
MAX_ERROR = 0.5  # |W - Ŵ|² / |W|²; 4 bits have a hundredth


class Weights(Step):
    """Quantize the linears of every block, and the head. A method that rounds otherwise is a subclass.

    num_bits: 16 leaves the linears in float, as `dtype`, and so does a `keep` of 16; their inputs stay float too.
    group_size: the largest of 128, 64 and 32 that is not above it and divides the inputs; None, or where none does: per
    channel.
    clip: "mse" searches each group's range, from 1.07 down to 0.55 of max |w|, for the least squared error, each
    weight's counted with its input's mean square: the output error where inputs are uncorrelated.
    bias_correction: the bias of a linear that has one makes up for what rounding the weights does to the mean output:
    bias -= (Ŵ - W) · E[x] (DFQ, arXiv 1906.04721).
    head_bits: 8 per channel; 4 as the blocks; 16 leaves the head in float.
    keep: a linear by its name in the block or a module-name pattern to more bits than num_bits; the first match wins.
    Linears that read one input are kept together.
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

    def check(self, model: Model) -> None:
        if self.lorc and model.has_experts:
            raise QuantizationError(f"lorc does not work on {model.config.architecture}, whose experts would each need "
                                    "a product more; leave it out")

    def patterns(self) -> tuple[str, ...]:
        return tuple(self.keep)

    @property
    def reads_inputs(self) -> bool:
        return self.clip != "none" or self.bias_correction

    def wants_moments(self, head: bool) -> bool:
        return False

    def rounding(self, names: tuple[str, ...], head: bool = False) -> Rounding:
        """How a linear is rounded, by its `Target.names`: the one place that decides it."""
        if head:
            bits, group = self.head_bits, None if self.head_bits == 8 else self.group_size
        else:
            kept = (bits for pattern, bits in self.keep.items() if matches(pattern, names))
            bits, group = next(kept, self.num_bits), self.group_size
        if self.grid == "float" and bits == 8:
            group = None
        return Rounding(bits, group, self.grid, self.scales if bits == 4 else "float")

    def products(self, n: int, k: int, rows: int) -> float:
        searched = CLIP_STEPS * CLIP_PRODUCTS if self.clip == "mse" else 0
        return n * k * (3 * min(rows, SAMPLE_ROWS) + searched)

    def apply(self, work: BlockWork) -> None:
        for target in work.targets.values():
            self._quantize(target)

    def apply_head(self, work: BlockWork) -> None:
        for target in work.targets.values():
            if self.head_bits == 16:  # as it is in the checkpoint, where it may be tied to the embedding
                target.set_act(None, "float")
            else:
                self._quantize(target)

    def _quantize(self, target: Target) -> None:
        bits = target.rounding.num_bits
        if bits == 16:
            target.keep_float(torch.bfloat16 if self.dtype == "bf16" else torch.float16)
            return
        parts = target.parts()
        for part in parts:
            codes, scale = self._round(part)
            _refuse_degenerate(part, codes, scale)
            low_rank = None
            if self.lorc and bits == 4:
                low_rank = low_rank_factors(part.weight - dequantize(codes, scale), self.lorc)
            k = part.weight.shape[1]
            part.set_weight(QuantizedWeight(pack_codes(codes, bits), scale, bits, k // scale.shape[1], self.grid),
                            self.bias_correction, low_rank)
        target.join(parts)

    def _round(self, target: Target) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes [N, K] on the grid and bfloat16 scale [N, G]."""
        return self._nearest(target, target.weight, target.stats.mean_square)

    def _nearest(self, target: Target, weight: torch.Tensor, importance: torch.Tensor
                 ) -> tuple[torch.Tensor, torch.Tensor]:
        """`weight` [N, K] rounded to nearest, with the ranges that an earlier step or a search found; importance
        [K]."""
        clip, rounding = target.clip, target.rounding
        if clip is None and self.clip == "mse":
            clip = search_clip(weight, importance, rounding)
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


def search_clip(weight: torch.Tensor, importance: torch.Tensor, rounding: Rounding) -> torch.Tensor:
    """The fraction of max |w| that gives each group the least Σ importance · (w - ŵ)². weight [N, K], importance [K];
    returns [N, G]."""
    parts = weight.split(max(1, CHUNK_WEIGHTS // weight.shape[1]))  # type: ignore[no-untyped-call]
    threads = torch.get_num_threads()
    # A part's ops are too short to be worth dividing, so each thread takes parts of its own.
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as executor:
            return torch.cat([*executor.map(lambda part: _best_clip(part, importance, rounding), parts)])
    finally:
        torch.set_num_threads(threads)


@torch.inference_mode()
def _best_clip(weight: torch.Tensor, importance: torch.Tensor, rounding: Rounding) -> torch.Tensor:
    n, k = weight.shape
    grouped = weight.reshape(n, k // (rounding.group(k) or k), -1)
    weighting = importance.reshape(grouped.shape[1:])
    amax, buffer = grouped.abs().amax(-1), torch.empty_like(grouped)
    least = torch.full_like(amax, float("inf"))
    clip = torch.ones_like(least)
    for ratio in torch.linspace(1.07, 0.55, CLIP_STEPS).tolist():
        if rounding.type == "int":
            _round_trip(grouped, absmax_scale(amax * ratio, rounding.num_bits).bfloat16().float(), rounding.num_bits,
                        buffer)
        else:
            buffer.copy_(rounding(weight, torch.full_like(clip, ratio)).reshape(grouped.shape))
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


def _refuse_degenerate(target: Target, codes: torch.Tensor, scale: torch.Tensor) -> None:
    """What is not finite, or is nothing like the weight, is a failed run; zeros are exact, and so is one value."""
    name = target.linear.name
    if not bool(torch.isfinite(scale).all()):
        raise QuantizationError(f"{name}: quantized weights are not finite; the checkpoint may be damaged")
    error = float((dequantize(codes, scale) - target.weight).square().sum() /
                  target.weight.square().sum().clamp_min(1e-30))
    if not error <= MAX_ERROR:
        raise QuantizationError(f"{name}: the quantized weights are off by {error:.0%} of the weights' own size; the "
                                "checkpoint may be damaged")
