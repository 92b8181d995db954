"""A float model taken through a recipe's steps, block by block and the head last: what the quantizer writes, the
analysis captures, training begins with, and tests look at."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from fptq_runtime.kernels.reference import ReferenceBackend, to_torch
from fptq_runtime.models.block import Block, Model, Stem, prepare_block, prepare_stem
from fptq_runtime.models.families import parse_config
from fptq_runtime.models.loader import Checkpoint, load_block, load_head, load_stem
from fptq_runtime.quantizer.calibrate import HiddenStates
from fptq_runtime.quantizer.export import block_modules, stem_modules
from fptq_runtime.quantizer.steps.base import BlockWork, QuantizationError, RecipeError, Step, called, matches, observe
from fptq_runtime.quantizer.steps.weights import Weights


def float_stem(checkpoint: Checkpoint) -> Stem:
    """For the reference backend."""
    return prepare_stem(load_stem(checkpoint), ReferenceBackend())


def float_part(checkpoint: Checkpoint, index: int) -> Block:
    """Block `index`, or the head after the last, for the reference backend."""
    head = index == len(checkpoint.model.blocks)
    return prepare_block(load_head(checkpoint) if head else load_block(checkpoint, index), ReferenceBackend())


class Walk:
    """One set of calibration windows on its way through a model and the steps that change it.

    model: what the steps' changes of config.json lead to. rounds: the step that the caller will round the weights with,
    which decides how; steps that search ask it, and it is not among those that are applied. Raises QuantizationError
    where a step cannot work on the model, and RecipeError where a pattern names no linear.
    """

    def __init__(self, checkpoint: Checkpoint, steps: Sequence[Step], windows: Sequence[Sequence[int]],
                 rounds: Weights | None = None) -> None:
        self.config = checkpoint.config
        self.model = checkpoint.model
        for step in steps:
            step.check(self.model)
            self.config = step.transform_config(self.model, self.config)
            self.model = parse_config(self.config)
        _check_patterns(self.model, steps)
        self._checkpoint = checkpoint
        self._steps = [step for step in steps if step is not rounds]
        self._rounds = rounds
        self._states = HiddenStates(self.model, windows)
        self._exact = HiddenStates(self.model, windows) if any(step.wants_exact for step in steps) else None

    def stem(self, loaded: Callable[[Stem], None] = lambda stem: None) -> Stem:
        """Transformed, and the samples are past it. `loaded` sees it as the checkpoint has it."""
        stem = float_stem(self._checkpoint)
        _refuse_not_finite(stem_modules(stem))
        loaded(stem)
        for step in self._steps:
            step.transform_stem(self.model, stem)
        for states in (self._states, self._exact):
            if states is not None:
                states.run_stem(stem)
        return stem

    def blocks(self, loaded: Callable[[Block], None] = lambda block: None) -> Iterator[BlockWork]:
        """Each block and then the head, transformed, observed and changed by the steps. What the caller makes of its
        weights until it asks for the next is what the samples go on through. `loaded` sees each as the checkpoint has
        it."""
        for index, spec in enumerate(self.model.parts):
            block = float_part(self._checkpoint, index)
            _refuse_not_finite(block_modules(block))
            loaded(block)
            block.spec = spec
            for step in self._steps:
                step.transform_block(self.model, block)
            ahead = copy.copy(self._exact)
            work = observe(self.model, block, self._states, self._rounds, ahead)
            if work.is_head:
                for step in self._steps:
                    step.apply_head(work)
                yield work
                return
            work.exact = self._exact
            with torch.inference_mode():
                for step in self._steps:
                    step.apply(work)
            yield work
            self._states.run_block(prepare_block(block, ReferenceBackend()))  # as the runtime will compute it
            self._exact = ahead


COMMON = ("qkv", "o", "up", "down")  # linears that presets name, and some families lack


def _check_patterns(model: Model, steps: Sequence[Step]) -> None:
    """Before any work is done."""
    names = tuple(name for block in model.blocks for linear in block.quantizable
                  for name in (*block.modules(linear), *called(linear, ())))
    for pattern in (pattern for step in steps for pattern in step.patterns()):
        if pattern not in COMMON and not matches(pattern, names):
            raise RecipeError(f"no linear layer of this model matches {pattern!r}; they are named like {names[0]}")


def _refuse_not_finite(modules: Sequence[tuple[str, Any]]) -> None:
    for name, module in modules:
        for suffix, array in (("weight", module.weight), ("bias", getattr(module, "bias", None))):
            if array is not None and not bool(torch.isfinite(to_torch(array)).all()):
                raise QuantizationError(f"{name}.{suffix} holds NaN or infinity; the checkpoint is damaged")
