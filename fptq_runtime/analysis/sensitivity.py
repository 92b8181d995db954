"""What each linear's quantization does to the model's output: a recipe's walk, captured, and any mixture of its float
and its quantized linears run on one text."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from fptq_runtime.artifact.io import Manifest
from fptq_runtime.kernels.base import Linear
from fptq_runtime.kernels.reference import ReferenceBackend, ReferenceOps
from fptq_runtime.models.block import Block, Model, Stem, prepare_block
from fptq_runtime.quantizer.calibrate import MINIBATCH_FLOATS, HiddenStates, next_tokens, sum_nll
from fptq_runtime.quantizer.evaluate import sum_kl
from fptq_runtime.quantizer.pipeline import Watcher, quantize
from fptq_runtime.quantizer.recipe import Recipe
from fptq_runtime.quantizer.samples import Calibration, CalibrationSet
from fptq_runtime.quantizer.steps.base import BlockWork, QuantizationError, Step

OWN_TEXT_TOKENS = 64  # that `quantize` measures perplexity on, which is not asked for here

Tick = Callable[[], object]


@dataclass(frozen=True)
class Loss:
    """Against the float model: KL(float ‖ quantized) in nats a token, and the perplexity that is left."""

    kl: float
    perplexity: float


@dataclass
class Captured:
    """A model after its recipe's transforms, in float and quantized, all in memory: 4 bytes a weight in float and what
    the artifact has. The head stands after the last block."""

    model: Model
    stem: Stem
    exact: list[Block] = field(default_factory=list)
    quantized: list[Block] = field(default_factory=list)

    @property
    def names(self) -> tuple[str, ...]:
        """Of a block's linears that are quantized, all blocks' together."""
        return tuple(dict.fromkeys(name for block in self.model.blocks for name in block.quantizable))

    def block(self, index: int, names: Collection[str], weights: bool = True, acts: bool = True) -> Block:
        """Block `index` with the linears of these names quantized: their weights, their inputs, or both."""
        exact = self.exact[index]
        if not set(names) & set(exact.linears):
            return exact
        quantized = prepare_block(self.quantized[index], ReferenceBackend())

        def mixed(name: str, linear: Linear) -> Linear:
            if name not in names:
                return linear
            theirs = quantized.linears[name]
            return replace(theirs if weights else linear, act=theirs.act if acts else None)

        return exact.with_linears(mixed)

    def head(self, quantized: bool, weights: bool = True, acts: bool = True) -> Block:
        return self.block(len(self.model.blocks), ("head",) if quantized else (), weights, acts)


def capture(model: str | Path, recipe: Recipe, windows: Sequence[Sequence[int]],
            calibration: Calibration | CalibrationSet = Calibration()) -> tuple[Captured, Manifest]:
    """Quantize as `fptq quantize` does and keep the model in memory, to run windows of such lengths, with the manifest
    that it would have. Raises FptqError."""
    if any(type(step).tune is not Step.tune or type(step).refine is not Step.refine for step in recipe.steps):
        raise QuantizationError(f"{recipe.name} trains all weights together, so that no layer has a part in its loss "
                                "of its own; take the recipe that you would train for, as rtn-dynamic")
    seen: list[Captured] = []

    def stem(walked: Model, stem: Stem) -> None:
        seen.append(Captured(walked, stem))

    def block(work: BlockWork) -> None:
        seen[0].quantized.append(work.block)
        seen[0].exact.append(replace(
            work.block.with_linears(lambda _, linear: replace(linear, act=None)),
            norms={name: replace(norm) for name, norm in work.block.norms.items()}))

    with tempfile.TemporaryDirectory(prefix="fptq-analyze-") as directory:
        manifest = quantize(model, Path(directory) / "artifact", recipe, calibration=calibration,
                            text_tokens=OWN_TEXT_TOKENS, watcher=Watcher(stem, block, max(map(len, windows))))
    return seen[0], manifest


class Probe:
    """Runs mixtures of a captured model on one text, each from the last block boundary that it shares with a run
    before. tick is called after each block.

    windows: what is measured on, as `text_windows` gives them. logits: the float model's, where another probe of the
    same text has them; they are kept in memory, 4 bytes times the vocabulary for each token.
    """

    def __init__(self, model: Captured, windows: Sequence[Sequence[int]], tick: Tick = lambda: None,
                 logits: list[torch.Tensor] | None = None) -> None:
        self.model = model
        self.num_layers = len(model.model.blocks)
        self.states = HiddenStates(model.model, windows)
        self._vocab_size = model.model.config.vocab_size
        self._tick = tick
        self.states.run_stem(model.stem)
        self.exact = [self.states.states]  # at every block boundary: [rows, hidden] a minibatch
        self.quantized = [self.states.states]
        if logits is None:
            for block in model.exact[: self.num_layers]:
                self.states.run_block(block)
                self.exact.append(self.states.states)
                self._tick()
        self.logits = self._float_logits() if logits is None else logits
        self.original = self._perplexity()

    def run(self, start: int, states: Sequence[torch.Tensor], block: Callable[[int], Block], head: Block,
            keep: bool = False) -> Loss:
        """From `states` at boundary `start` through block(start) … and the head. keep: these boundaries are the
        quantized model's."""
        self.states.states = list(states)
        for index in range(start, self.num_layers):
            self.states.run_block(block(index))
            if keep:
                self.quantized.append(self.states.states)
            self._tick()
        return self._loss(head)

    def all(self) -> Loss:
        """Everything quantized; keeps its states at every boundary."""
        self.quantized = self.quantized[:1]
        return self.run(0, self.exact[0], lambda i: self.model.block(i, self.model.names), self.model.head(True),
                        keep=True)

    def part(self, weights: bool, acts: bool) -> Loss:
        """All weights, or all inputs."""
        return self.run(0, self.exact[0], lambda i: self.model.block(i, self.model.names, weights, acts),
                        self.model.head(True, weights, acts))

    def only(self, layer: int, kinds: Collection[str] | None = None) -> Loss:
        """Quantized in one layer only, or in some of its linears."""
        kinds = self.model.names if kinds is None else kinds
        return self.run(layer, self.exact[layer],
                        lambda i: self.model.block(i, kinds if i == layer else ()), self.model.head(False))

    def only_kind(self, kind: str) -> Loss:
        """Quantized in one kind of linear only."""
        start = self.num_layers if kind == "head" else 0
        return self.run(start, self.exact[start], lambda i: self.model.block(i, (kind,)),
                        self.model.head(kind == "head"))

    def all_but(self, layer: int) -> Loss:
        """Everything quantized but one layer. Needs `all` before."""
        return self.run(layer, self.quantized[layer],
                        lambda i: self.model.block(i, () if i == layer else self.model.names), self.model.head(True))

    def all_but_kind(self, kind: str) -> Loss:
        """Everything quantized but one kind of linear. Needs `all` before."""
        start = self.num_layers if kind == "head" else 0
        kinds = tuple(other for other in self.model.names if other != kind)
        return self.run(start, self.quantized[start], lambda i: self.model.block(i, kinds),
                        self.model.head(kind != "head"))

    def up_to(self, layer: int) -> Loss:
        """Layers 0 … layer quantized. Needs `all` before."""
        return self.run(layer + 1, self.quantized[layer + 1], lambda i: self.model.exact[i], self.model.head(False))

    @torch.inference_mode()
    def _float_logits(self) -> list[torch.Tensor]:
        return [logits for logits, _ in self._each(self.model.head(False))]

    def _each(self, head: Block) -> Iterator[tuple[torch.Tensor, np.ndarray]]:
        """Logits of every row with a next token, and that token, in chunks that fit the cache."""
        chunk = max(1, MINIBATCH_FLOATS // self._vocab_size)
        for batch, state in zip(self.states.batches, self.states.states, strict=True):
            rows, targets = next_tokens(batch)
            for start in range(0, len(rows), chunk):
                part = torch.from_numpy(rows[start : start + chunk])
                yield head.forward(ReferenceOps(batch, None), state[part]), targets[start : start + chunk]

    @torch.inference_mode()
    def _loss(self, head: Block) -> Loss:
        divergence, nll, count = 0.0, 0.0, 0
        for exact, (logits, targets) in zip(self.logits, self._each(head), strict=True):
            divergence += sum_kl(exact, logits)
            nll += sum_nll(logits, targets)
            count += len(targets)
        if not math.isfinite(nll):
            raise QuantizationError("the quantized model's logits are not finite")
        return Loss(max(0.0, divergence / count), math.exp(nll / count))

    def _perplexity(self) -> float:
        """The float model's."""
        targets = np.concatenate([next_tokens(batch)[1] for batch in self.states.batches])
        total, start = 0.0, 0
        for logits in self.logits:
            total += sum_nll(logits, targets[start : start + len(logits)])
            start += len(logits)
        return math.exp(total / len(targets))
