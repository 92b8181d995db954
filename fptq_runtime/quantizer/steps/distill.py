"""What rounding leaves free, trained end to end: the second phase of EfficientQAT (arXiv 2407.11062), towards what the
float model predicts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import PositiveFloat, PositiveInt

from fptq_runtime.config import KVCacheDtype
from fptq_runtime.kernels.base import Linear, Norm, QuantizedWeight, StepInput
from fptq_runtime.kernels.reference import ReferenceBackend, ReferenceOps, to_torch
from fptq_runtime.models.block import Block, prepare_block
from fptq_runtime.models.decoder import Decoder
from fptq_runtime.models.loader import load_model
from fptq_runtime.progress import progress_bar
from fptq_runtime.quantizer.calibrate import in_bf16
from fptq_runtime.quantizer.steps.base import QuantizationError, RefineWork, Step, TuneWork, refuse_too_large

PARAMETER_BYTES = 16  # float32: the teacher's, the student's as rounded, as trained, and its gradient
LOGITS_FLOATS = 1 << 22  # of one pass, 16 MiB
WARMUP = 0.05  # of all steps


class Distill(Step):
    """Train the scales of all rounded weights and the gains of all norms together, once the codes are chosen. It
    follows `weights` or `gptq`.

    The loss is KL(float || quantized) of the logits over the calibration samples, of which one pass is made: those that
    the model writes itself suit it best. Inputs, keys and values are rounded to 8 bits and the gradients go straight
    through (Adam, cosine rate). It holds 16 bytes a parameter, beside the activations of one sample.

    learning_rate: the highest; of a scale, relative to itself.
    batch_size: samples of one step.
    kv_dtype: of the cache that it will be served with.
    """

    type: Literal["distill"] = "distill"
    learning_rate: PositiveFloat = 2e-3
    batch_size: PositiveInt = 2
    kv_dtype: KVCacheDtype = "int8"

    @property
    def reads_inputs(self) -> bool:
        return True

    @property
    def parameter_bytes(self) -> int:
        return PARAMETER_BYTES

    def trained_tokens(self, calibrated: int) -> int:
        return calibrated

    def tune(self, work: TuneWork) -> None:
        refuse_too_large(self.type, work.checkpoint, PARAMETER_BYTES)

    def refine(self, work: RefineWork) -> None:
        teacher = _fast(load_model(work.checkpoint, ReferenceBackend()))
        student = _Student(work.decoder, self.kv_dtype)
        optimizer = torch.optim.Adam(student.parameters, betas=(0.9, 0.95))
        steps = -(-len(work.windows) // self.batch_size)
        with progress_bar(total=steps, desc="distilling", unit="step", shown=work.progress) as bar:
            for done in range(steps):
                batch = work.windows[done * self.batch_size : (done + 1) * self.batch_size]
                loss = backward(student, teacher, batch)
                if not math.isfinite(loss):
                    raise QuantizationError(f"distillation diverged at step {done + 1}: lower its learning_rate")
                for group in optimizer.param_groups:
                    group["lr"] = rate(self.learning_rate, done, steps)
                optimizer.step()
                optimizer.zero_grad()
                bar.update()
                bar.set_postfix(kl=f"{loss:.4f}", refresh=False)
        student.give_back()


class _Student:
    """A quantized model whose scales and gains can be trained, and are its own until it gives them back."""

    def __init__(self, decoder: Decoder, kv_dtype: KVCacheDtype) -> None:
        self._parts = [*decoder.blocks, decoder.head]
        self._kv_dtype = kv_dtype
        self._factors: dict[str, torch.Tensor] = {}  # by the linears' names, of their scales [N, G]
        self._gains: list[tuple[Norm, torch.Tensor]] = []
        floats = [self._float(part) for part in self._parts]
        self._float_decoder = Decoder(decoder.config, decoder.stem, floats[:-1], floats[-1])

    @property
    def parameters(self) -> list[torch.Tensor]:
        return [*self._factors.values(), *(gain for _, gain in self._gains)]

    def __call__(self, batch: StepInput) -> torch.Tensor:
        """Logits of every token. [M, V]"""
        decoder = self._float_decoder
        scaled = Decoder(decoder.config, decoder.stem, map(self._scaled, decoder.blocks), self._scaled(decoder.head))
        logits: torch.Tensor = scaled(ReferenceOps(batch, None, self._kv_dtype))
        return logits

    @torch.no_grad()
    def give_back(self) -> None:
        """The quantized model gets what was trained."""
        for part in self._parts:
            for linear in part.linears.values():
                if (factor := self._factors.get(linear.name)) is not None:
                    scale = to_torch(linear.weight.scale)
                    linear.weight = replace(linear.weight, scale=(scale.float() * factor).to(scale.dtype))
        for norm, gain in self._gains:
            norm.weight = gain.detach()

    def _float(self, part: Block) -> Block:
        """For the reference backend, with parameters to train."""
        prepared = prepare_block(part, ReferenceBackend())
        for linear in part.linears.values():
            if isinstance(linear.weight, QuantizedWeight):
                self._factors[linear.name] = torch.ones(linear.weight.scale.shape, requires_grad=True)
        for (spec, norm), (_, trained) in zip(part.each_norm(), prepared.each_norm(), strict=True):
            if spec.scaled:
                trained.weight = trained.weight.clone().requires_grad_()
                self._gains.append((norm, trained.weight))
        # Tensors made in inference mode take no part in a graph.
        return prepared.with_linears(lambda _, linear: replace(linear, weight=linear.weight.clone()))

    def _scaled(self, part: Block) -> Block:
        return part.with_linears(lambda _, linear: self._scaled_linear(linear))

    def _scaled_linear(self, linear: Linear) -> Linear:
        factor = self._factors.get(linear.name)
        if factor is None:
            return linear
        assert isinstance(linear.weight, torch.Tensor)
        grouped = linear.weight.reshape(*factor.shape, -1) * factor[..., None]
        return in_bf16(replace(linear, weight=grouped.reshape(linear.weight.shape)))


def _fast(decoder: Decoder) -> Decoder:
    *blocks, head = (part.with_linears(lambda _, linear: in_bf16(linear)) for part in (*decoder.blocks, decoder.head))
    return Decoder(decoder.config, decoder.stem, blocks, head)


def backward(student: Callable[[StepInput], torch.Tensor], teacher: Decoder, windows: Sequence[Sequence[int]],
             device: str = "cpu") -> float:
    """Add the gradients of the mean over all tokens of KL(teacher || student). Returns it, in nats."""
    tokens, total = sum(map(len, windows)), 0.0
    for batch in _passes(windows, teacher.config.vocab_size):
        with torch.no_grad():
            expected = teacher(ReferenceOps(batch, None, device=device)).log_softmax(-1)
        loss = F.kl_div(student(batch).log_softmax(-1), expected, reduction="sum", log_target=True) / tokens
        loss.backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach())
    return total


def rate(highest: float, done: int, steps: int) -> float:
    """The learning rate after `done` steps: a short rise, then half a cosine."""
    rising = min(1.0, (done + 1) / (WARMUP * steps))
    return highest * rising * (1 + math.cos(math.pi * done / steps)) / 2


def _passes(windows: Sequence[Sequence[int]], vocab_size: int) -> Iterator[StepInput]:
    """Few enough at a time that their logits are bounded."""
    size = max(1, LOGITS_FLOATS // (max(map(len, windows)) * vocab_size))
    for start in range(0, len(windows), size):
        yield StepInput.whole(windows[start : start + size])
