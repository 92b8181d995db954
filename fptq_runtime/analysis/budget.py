"""Mixed precision by budget: the linears that cost most get 8 bits, then 16, until the loss is as low as asked for or
the bytes are spent."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from fptq_runtime.analysis.sensitivity import Captured, Probe, capture
from fptq_runtime.artifact.io import Manifest
from fptq_runtime.errors import FptqError
from fptq_runtime.kernels.base import Linear
from fptq_runtime.models.block import Block
from fptq_runtime.models.tokenizer import Tokenizer
from fptq_runtime.progress import progress_bar
from fptq_runtime.quantizer.calibrate import HiddenStates, packaged_text, read_text
from fptq_runtime.quantizer.evaluate import text_windows
from fptq_runtime.quantizer.pipeline import open_float, quantize
from fptq_runtime.quantizer.recipe import Recipe
from fptq_runtime.quantizer.samples import Calibration
from fptq_runtime.quantizer.steps.base import QuantizationError, Rounding, float_weight, matches
from fptq_runtime.quantizer.steps.weights import Weights

RANKED_TOKENS = 4096  # of the text, that sensitivity is measured on
ATTEMPTS = 3  # to quantize for good, since a linear's neighbours are calibrated on what is before them
SCHEMES_BYTES = 1 << 10  # that config.json takes at most for linears of other widths, beside their weights

Place = tuple[int, str]  # a layer and the name of its linear
Bits = Literal[8, 16]


@dataclass(frozen=True)
class Budget:
    """max_loss: what perplexity may rise by, as a fraction of the float model's. extra_bytes: what may be spent on it,
    as a fraction of the artifact without. None is no bound."""

    max_loss: float | None = None
    extra_bytes: float | None = None

    def __post_init__(self) -> None:
        if self.max_loss is None and self.extra_bytes is None:
            raise FptqError("a budget bounds the loss, the bytes, or both")


@dataclass(frozen=True)
class Spent:
    """loss: of the artifact, measured by the quantizer. keep: what the recipe's last step got. met: the loss is within
    the budget (always, where it has no bound on it). extra_bytes, extra_active: as a fraction of the artifact without,
    and of what a token reads of it."""

    met: bool
    loss: float
    loss_before: float
    extra_bytes: float
    keep: dict[str, Bits]
    extra_active: float = 0.0

    def summary(self, budget: Budget) -> str:
        eight = sum(bits == 8 for bits in self.keep.values())
        active = f" ({self.extra_active:+.1%} of what a token reads)" * (self.extra_active != self.extra_bytes)
        what = (f"{eight} linears in 8 bits and {len(self.keep) - eight} in 16, {self.extra_bytes:+.1%} bytes{active}: "
                f"loss {self.loss_before:.2%} before, {self.loss:.2%} now")
        if self.met:
            return what
        bound = f"within {budget.extra_bytes:.1%} more bytes" if budget.extra_bytes is not None else "by more bits"
        return (f"{what}; the {budget.max_loss:.2%} asked for cannot be met {bound}: try a stronger recipe"
                + (", or allow more bytes" if budget.extra_bytes is not None else ""))


@dataclass(frozen=True)
class _Upgrade:
    place: Place
    bits: Bits
    bytes: int


def quantize_within(
    model: str | Path, out: str | Path, recipe: Recipe, budget: Budget, *, calibration: Calibration = Calibration(),
    text: str | Path | None = None, text_tokens: int = 8192, overwrite: bool = False, progress: bool = False,
) -> tuple[Manifest, Spent]:
    """`quantize`, with more bits where they gain most. Each linear's gain is the divergence that it makes when it
    alone is quantized; the most gain per byte is bought first, and the fewest purchases that meet max_loss on the text
    are kept. Without max_loss all extra bytes are spent. The artifact is written even where the budget cannot be met;
    `Spent.met` says so. Raises FptqError.
    """
    if recipe.weights.num_bits == 16:
        raise QuantizationError(f"{recipe.name} leaves the linears in 16 bits, which no budget can raise")
    source, checkpoint = open_float(model, "quantize the float model it was made from")
    context = checkpoint.model_config.max_position_embeddings
    measured_on = packaged_text("heldout") if text is None else read_text(text)
    tokenizer = Tokenizer(source.path)
    windows = text_windows(measured_on, tokenizer, context, text_tokens)
    calibrated = calibration.draw(checkpoint, tokenizer, recipe.reads_inputs, progress)
    ranked = text_windows(measured_on, tokenizer, context, min(RANKED_TOKENS, text_tokens))
    linears = sum(len(block.quantizable) for block in checkpoint.model.blocks)
    with progress_bar(total=linears + 2 + (2 * linears).bit_length(), desc="quantizing", unit="step",
                      shown=progress) as bar:
        captured, base = capture(model, recipe, windows, calibrated)
        modules = {record.name: record.modules[0] for record in base.layers}
        bar.set_description("ranking linears")
        upgrades = _plan(captured, ranked, recipe, modules, bar)
        most = _affordable(upgrades, None if budget.extra_bytes is None
                           else budget.extra_bytes * base.size - SCHEMES_BYTES)
        bar.set_description("spending")
        search = _Search(captured, windows, recipe.weights, bar)
        original, before = search.perplexity(None), search.perplexity([])
        count = most
        if budget.max_loss is not None:
            count = search.fewest(upgrades[:most], original * (1 + budget.max_loss), before)
    del captured, search
    for attempt in range(ATTEMPTS):
        keep = _keep(upgrades[:count], modules)
        manifest = quantize(model, out, _with_keep(recipe, keep), calibration=calibrated, text=text,
                            text_tokens=text_tokens, overwrite=overwrite or attempt > 0, progress=progress)
        quality = manifest.quality
        loss = quality.perplexity_after / quality.perplexity_before - 1
        met = budget.max_loss is None or loss <= budget.max_loss
        if met or count == most:
            break
        count = min(most, count + max(1, math.ceil(count / 8)))
    return manifest, Spent(met, loss, before / original - 1, manifest.size / base.size - 1, keep,
                           manifest.active_size / base.active_size - 1)


def _plan(captured: Captured, windows: Sequence[Sequence[int]], recipe: Recipe, modules: Mapping[str, str],
          bar: tqdm[Any]) -> list[_Upgrade]:
    """All purchases, the most gain per byte first; 16 bits come after 8, or at once where 8 gain less per byte."""
    weights = recipe.weights
    probe = Probe(captured, windows)
    bits_now = weights.num_bits
    queue: list[tuple[float, int, _Upgrade, float]] = []
    order = 0
    for layer in range(probe.num_layers):
        for kind in captured.exact[layer].spec.quantizable:
            if any(matches(pattern, (kind, modules[f"layers.{layer}.{kind}"])) for pattern in weights.keep):
                continue
            divergence = probe.only(layer, (kind,)).kl
            raised = _mixture(captured, layer, {kind: 8}, weights, others=False)
            start = probe.exact[layer]
            eight = divergence if bits_now == 8 else probe.run(
                layer, start, lambda i, raised=raised, layer=layer: raised if i == layer  # type: ignore[misc]
                else captured.exact[i], captured.head(False)).kl
            size = captured.exact[layer].linears[kind].weight.numel()
            first = _Upgrade((layer, kind), 8, size * (8 - bits_now) // 8)
            whole = _Upgrade((layer, kind), 16, size * (16 - bits_now) // 8)
            if bits_now == 8 or (divergence - eight) / first.bytes < divergence / whole.bytes:
                heapq.heappush(queue, (-divergence / whole.bytes, order, whole, 0.0))
            else:
                heapq.heappush(queue, (-(divergence - eight) / first.bytes, order, first, eight))
            order += 1
            bar.update()
    upgrades = []
    while queue:
        _, index, upgrade, left = heapq.heappop(queue)
        upgrades.append(upgrade)
        if upgrade.bits == 8:
            size = upgrade.bytes * 8 // (8 - bits_now)
            then = _Upgrade(upgrade.place, 16, size)
            heapq.heappush(queue, (-left / then.bytes, index, then, 0.0))
    return upgrades


def _affordable(upgrades: Sequence[_Upgrade], limit: float | None) -> int:
    """How many of the first purchases fit."""
    total = 0
    for count, upgrade in enumerate(upgrades):
        total += upgrade.bytes
        if limit is not None and total > limit:
            return count
    return len(upgrades)


class _Search:
    """Perplexity of mixtures, on the text that the quantizer will measure the artifact on."""

    def __init__(self, captured: Captured, windows: Sequence[Sequence[int]], weights: Weights, bar: tqdm[Any]
                 ) -> None:
        self._captured = captured
        self._weights = weights
        self._states = HiddenStates(captured.model, windows)
        self._states.run_stem(captured.stem)
        self._embedded = self._states.states
        self._bar = bar

    def perplexity(self, upgrades: Sequence[_Upgrade] | None) -> float:
        """With these purchases; None is the float model."""
        bits = {upgrade.place: upgrade.bits for upgrade in upgrades or ()}
        self._states.states = self._embedded
        for layer in range(len(self._captured.model.blocks)):
            exact = self._captured.exact[layer]
            mine = {kind: bits[layer, kind] for kind in exact.linears if (layer, kind) in bits}
            self._states.run_block(exact if upgrades is None else _mixture(
                self._captured, layer, mine, self._weights, others=True))
        total, count = self._states.negative_log_likelihood(self._captured.head(upgrades is not None))
        self._bar.update()
        return math.exp(total / count)

    def fewest(self, upgrades: Sequence[_Upgrade], target: float, before: float) -> int:
        """The least number of first purchases whose perplexity is at most `target`; all where none is."""
        if before <= target:
            return 0
        low, high = 0, len(upgrades)  # low is too few
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.perplexity(upgrades[:middle]) <= target else (middle, high)
        return high


def _mixture(captured: Captured, layer: int, bits: Mapping[str, int], weights: Weights, others: bool) -> Block:
    """A block with some linears in 8 bits (rounded to nearest, inputs as the recipe has them) or in float, and the
    others as quantized, or in float."""
    exact = captured.exact[layer]
    quantized = captured.block(layer, captured.names)

    def mixed(name: str, linear: Linear) -> Linear:
        if name not in bits:
            return quantized.linears[name] if others else linear
        if bits[name] == 16:
            return linear
        eight = Rounding(8, weights.group_size)
        return replace(linear, weight=eight(float_weight(linear)), act=quantized.linears[name].act)

    return exact.with_linears(mixed)


def _keep(upgrades: Sequence[_Upgrade], modules: Mapping[str, str]) -> dict[str, Bits]:
    """Patterns by the name of a linear's first module; the last purchase of a place holds."""
    bits = {upgrade.place: upgrade.bits for upgrade in upgrades}
    order = {name: i for i, name in enumerate(modules)}
    names = {f"layers.{layer}.{kind}": spent for (layer, kind), spent in bits.items()}
    return {modules[name]: names[name] for name in sorted(names, key=order.__getitem__)}


def _with_keep(recipe: Recipe, keep: Mapping[str, Bits]) -> Recipe:
    weights = recipe.weights.model_copy(update={"keep": {**recipe.weights.keep, **keep}})
    steps = tuple(weights if step is recipe.weights else step for step in recipe.steps)
    return recipe.model_copy(update={"steps": steps})
