"""What each linear's quantization does to the model's output: a recipe's walk, captured, and any mixture of its float
and its quantized linears run on one text."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import PrivateAttr

from fptq_runtime.artifact.io import Manifest
from fptq_runtime.config import ModelConfig
from fptq_runtime.kernels.reference import ReferenceBackend, ReferenceOps
from fptq_runtime.models.decoder import Block, Head, Stem, prepare_block, prepare_head, run_head
from fptq_runtime.quantizer.calibrate import BLOCK_KINDS, MINIBATCH_FLOATS, HiddenStates, Kind, next_tokens, sum_nll
from fptq_runtime.quantizer.evaluate import sum_kl
from fptq_runtime.quantizer.pipeline import quantize
from fptq_runtime.quantizer.recipe import Recipe
from fptq_runtime.quantizer.samples import Calibration
from fptq_runtime.quantizer.steps.base import BlockWork, HeadWork, QuantizationError, Step

OWN_TEXT_TOKENS = 64  # that `quantize` measures perplexity on, which is not asked for here
KINDS: tuple[Kind, ...] = (*BLOCK_KINDS, "head")

Tick = Callable[[], object]


@dataclass(frozen=True)
class Loss:
    """Against the float model: KL(float ‖ quantized) in nats a token, and the perplexity that is left."""

    kl: float
    perplexity: float


@dataclass
class Captured:
    """A model after its recipe's transforms, in float and quantized, all in memory: 4 bytes a weight in float and what
    the artifact has."""

    config: ModelConfig | None = None
    stem: Stem | None = None
    exact: list[Block] = field(default_factory=list)
    quantized: list[Block] = field(default_factory=list)
    exact_head: Head | None = None
    quantized_head: Head | None = None

    def block(self, index: int, kinds: Collection[Kind], weights: bool = True, acts: bool = True) -> Block:
        """Block `index` with the linears of `kinds` quantized: their weights, their inputs, or both."""
        exact = self.exact[index]
        if not kinds:
            return exact
        quantized = prepare_block(self.quantized[index], ReferenceBackend())
        changes: dict[str, Any] = {}
        for kind in kinds:
            if weights:
                changes[kind] = getattr(quantized, kind)
            if acts:
                changes[f"{kind}_act"] = getattr(quantized, f"{kind}_act")
        return replace(exact, **changes)

    def head(self, quantized: bool, weights: bool = True, acts: bool = True) -> Head:
        assert self.exact_head is not None and self.quantized_head is not None
        if not quantized:
            return self.exact_head
        head = prepare_head(self.quantized_head, ReferenceBackend())
        return Head(head.norm, head.lm_head if weights else self.exact_head.lm_head, head.act if acts else None)


class _Capture(Step):
    """Stands before the step that quantizes the weights and keeps what it sees."""

    type: Literal["capture"] = "capture"
    _seen: Captured = PrivateAttr(default_factory=Captured)

    @property
    def seen(self) -> Captured:
        return self._seen

    def transform_stem(self, config: ModelConfig, stem: Stem) -> None:
        self._seen.config, self._seen.stem = config, stem

    def apply(self, work: BlockWork) -> None:
        block = work.block
        self._seen.quantized.append(block)
        self._seen.exact.append(replace(
            block, input_norm=replace(block.input_norm), mlp_norm=replace(block.mlp_norm),
            qkv=replace(block.qkv, act=None), o=replace(block.o, act=None), up=replace(block.up, act=None),
            down=replace(block.down, act=None), qkv_act=None, o_act=None, up_act=None, down_act=None,
        ))

    def apply_head(self, work: HeadWork) -> None:
        head = work.head
        self._seen.quantized_head = head
        self._seen.exact_head = Head(replace(head.norm), replace(head.lm_head, act=None))


class _Watched(Recipe):
    """A recipe with a step that no file can name."""

    steps: tuple[Any, ...]


def capture(model: str | Path, recipe: Recipe, calibration: Calibration = Calibration()) -> tuple[Captured, Manifest]:
    """Quantize as `fptq quantize` does and keep the model in memory, with the manifest that it would have. Raises
    FptqError."""
    if any(type(step).tune is not Step.tune for step in recipe.steps):
        raise QuantizationError(f"{recipe.name} trains all weights together, so that no layer has a part in its loss "
                                "of its own; take the recipe that you would train for, as rtn-dynamic")
    step = _Capture()
    watched = _Watched.model_construct(name=recipe.name, steps=(*recipe.steps[:-1], step, recipe.steps[-1]))
    with tempfile.TemporaryDirectory(prefix="fptq-analyze-") as directory:
        manifest = quantize(model, Path(directory) / "artifact", watched, calibration=calibration,
                            text_tokens=OWN_TEXT_TOKENS)
    return step.seen, manifest


class Probe:
    """Runs mixtures of a captured model on one text, each from the last block boundary that it shares with a run
    before. tick is called after each block.

    windows: what is measured on, as `text_windows` gives them. logits: the float model's, where another probe of the
    same text has them; they are kept in memory, 4 bytes times the vocabulary for each token.
    """

    def __init__(self, model: Captured, windows: Sequence[Sequence[int]], tick: Tick = lambda: None,
                 logits: list[torch.Tensor] | None = None) -> None:
        assert model.config is not None and model.stem is not None
        self.model = model
        self.num_layers = model.config.num_layers
        self.states = HiddenStates(model.config, windows)
        self._vocab_size = model.config.vocab_size
        self._tick = tick
        self.states.run_stem(model.stem)
        self.exact = [self.states.states]  # at every block boundary: [rows, hidden] a minibatch
        self.quantized = [self.states.states]
        if logits is None:
            for block in model.exact:
                self.states.run_block(block)
                self.exact.append(self.states.states)
                self._tick()
        self.logits = self._float_logits() if logits is None else logits
        self.original = self._perplexity()

    def run(self, start: int, states: Sequence[torch.Tensor], block: Callable[[int], Block], head: Head,
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
        return self.run(0, self.exact[0], lambda i: self.model.block(i, BLOCK_KINDS), self.model.head(True), keep=True)

    def part(self, weights: bool, acts: bool) -> Loss:
        """All weights, or all inputs."""
        return self.run(0, self.exact[0], lambda i: self.model.block(i, BLOCK_KINDS, weights, acts),
                        self.model.head(True, weights, acts))

    def only(self, layer: int, kinds: Collection[Kind] = BLOCK_KINDS) -> Loss:
        """Quantized in one layer only."""
        return self.run(layer, self.exact[layer],
                        lambda i: self.model.block(i, kinds if i == layer else ()), self.model.head(False))

    def only_kind(self, kind: Kind) -> Loss:
        """Quantized in one kind of linear only."""
        start = self.num_layers if kind == "head" else 0
        return self.run(start, self.exact[start], lambda i: self.model.block(i, (kind,)),
                        self.model.head(kind == "head"))

    def all_but(self, layer: int) -> Loss:
        """Everything quantized but one layer. Needs `all` before."""
        return self.run(layer, self.quantized[layer],
                        lambda i: self.model.block(i, () if i == layer else BLOCK_KINDS), self.model.head(True))

    def all_but_kind(self, kind: Kind) -> Loss:
        """Everything quantized but one kind of linear. Needs `all` before."""
        start = self.num_layers if kind == "head" else 0
        kinds = tuple(other for other in BLOCK_KINDS if other != kind)
        return self.run(start, self.quantized[start], lambda i: self.model.block(i, kinds),
                        self.model.head(kind != "head"))

    def up_to(self, layer: int) -> Loss:
        """Layers 0 … layer quantized. Needs `all` before."""
        return self.run(layer + 1, self.quantized[layer + 1], lambda i: self.model.exact[i], self.model.head(False))

    @torch.inference_mode()
    def _float_logits(self) -> list[torch.Tensor]:
        return [logits for logits, _ in self._each(self.model.head(False))]

    def _each(self, head: Head) -> Iterator[tuple[torch.Tensor, np.ndarray]]:
        """Logits of every row with a next token, and that token, in chunks that fit the cache."""
        chunk = max(1, MINIBATCH_FLOATS // self._vocab_size)
        for batch, state in zip(self.states.batches, self.states.states, strict=True):
            rows, targets = next_tokens(batch)
            for start in range(0, len(rows), chunk):
                part = torch.from_numpy(rows[start : start + chunk])
                yield run_head(ReferenceOps(batch, None), head, state[part]), targets[start : start + chunk]

    @torch.inference_mode()
    def _loss(self, head: Head) -> Loss:
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
