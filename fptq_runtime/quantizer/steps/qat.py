"""Quantization-aware training without data, after LLM-QAT (arXiv 2305.17888): the float model writes the text, and a
copy of it that rounds as the artifact will learns to predict what the float model predicts."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from safetensors.numpy import save_file

from fptq_runtime import __version__
from fptq_runtime.artifact.io import hash_file
from fptq_runtime.config import KVCacheDtype
from fptq_runtime.kernels.base import Linear, Norm, StepInput
from fptq_runtime.kernels.reference import ReferenceBackend, ReferenceOps, to_torch
from fptq_runtime.kernels.select import select_backend
from fptq_runtime.models.block import Block, BlockSpec, Model, StemSpec
from fptq_runtime.models.decoder import Decoder
from fptq_runtime.models.loader import Checkpoint, load_head, load_model, load_stem
from fptq_runtime.models.tensors import weight_files
from fptq_runtime.progress import progress_bar
from fptq_runtime.quantizer.export import block_modules, block_tensors, stem_modules, tensors_of
from fptq_runtime.quantizer.generate import generate_windows
from fptq_runtime.quantizer.steps.activations import Activations
from fptq_runtime.quantizer.steps.base import (
    BlockWork,
    QuantizationError,
    Rounding,
    Step,
    Target,
    TuneWork,
    refuse_too_large,
)
from fptq_runtime.quantizer.steps.distill import backward, rate
from fptq_runtime.quantizer.steps.weights import Weights, search_clip
from fptq_runtime.quantizer.walk import Walk

T = TypeVar("T")

PARAMETER_BYTES = 24  # float32: trained, gradient, AdamW's two moments, rounded; and the teacher's own
SAVE_SECONDS = 60.0
GENERATED = 64  # sequences between two saves


class Qat(Step):
    """Train the linears, biases and norms before `activations` and `weights`, which must follow, round them.

    Each step rounds the weights to the grid that they will have, inputs, keys and values to 8 bits, and sends the
    gradients straight through (AdamW, one pass, cosine rate). The loss is KL(float || rounded) of the logits. What
    stays in float for good, the embeddings and a head of 16 bits, stays as it is; a tied head becomes one of its own.

    It holds 24 bytes a parameter, beside the activations of one pass, and saves its state every minute: the same
    command goes on where an interrupted one was, and on a CPU leads to the same bytes.

    data: what the float model writes by itself, or text from where the calibration samples come from: num_sequences of
    sequence_length tokens, batch_size of them in one step.
    learning_rate: the highest; it suits millions of parameters, while 2e-5 is what was published for billions.
    clip: begin from weights clipped to the range with the least output error, as `weights` with clip "mse" has them.
    kv_dtype: of the cache that it will be served with.
    device: auto is CUDA where there is one.
    """

    type: Literal["qat"] = "qat"
    data: Literal["self", "calibration"] = "self"
    num_sequences: PositiveInt = 2048
    sequence_length: int = Field(default=256, ge=16)
    batch_size: PositiveInt = 8
    learning_rate: PositiveFloat = 2e-4
    clip: bool = True
    kv_dtype: KVCacheDtype = "int8"
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def check(self, model: Model) -> None:
        if model.has_experts:
            raise QuantizationError(f"qat does not work on {model.config.architecture}: which experts a token goes to "
                                    "has no gradient; leave the step out")
        if model.config.state_bytes:
            raise QuantizationError(f"qat does not work on {model.config.architecture}: what its recurrent layers have "
                                    "beside linears is not trained; leave the step out")

    @property
    def parameter_bytes(self) -> int:
        return PARAMETER_BYTES

    def trained_tokens(self, calibrated: int) -> int:
        return self.num_sequences * self.sequence_length

    def tune(self, work: TuneWork) -> Checkpoint:
        device = self._device()
        refuse_too_large(self.type, work.checkpoint, PARAMETER_BYTES, device)
        state = _State(work.directory, self._identity(work, device))
        windows = self._windows(work, state)
        activations, weights = work.steps[1:]
        assert isinstance(activations, Activations) and isinstance(weights, Weights)
        student = Student(work.checkpoint, activations, weights, work.calibrated.windows, clip=self.clip,
                          kv_dtype=self.kv_dtype, device=device)
        self._train(work, student, windows, state)
        return student.save(work.directory / "tuned")

    def _device(self) -> str:
        if self.device == "cuda" and not torch.cuda.is_available():
            raise QuantizationError("qat: there is no CUDA device; use device: auto")
        return ("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device

    def _identity(self, work: TuneWork, device: str) -> str:
        """Of everything that decides what training leads to."""
        path = work.checkpoint.path
        source = [*sorted(path.glob("*.json")), *weight_files(path)]
        return json.dumps({
            "steps": [step.model_dump(mode="json") for step in work.steps],
            "source": {file.name: hash_file(file) for file in source},
            "calibration": hashlib.sha256(json.dumps(work.calibrated.windows).encode()).hexdigest(),
            "seed": work.calibrated.settings.seed,
            "device": device,
            "versions": [__version__, torch.__version__],
        }, indent=1)

    def _windows(self, work: TuneWork, state: _State) -> Sequence[Sequence[int]]:
        length = min(self.sequence_length, work.checkpoint.model_config.max_position_embeddings)
        if self.data == "calibration":
            settings = replace(work.calibrated.settings, num_samples=self.num_sequences, sample_length=length,
                               lengths=None)
            return settings.draw(work.checkpoint, work.tokenizer, progress=work.progress).windows
        windows: list[list[int]] = state.load("text", [])
        if len(windows) == self.num_sequences:
            return windows
        backend = select_backend()
        decoder = load_model(work.checkpoint, backend)
        with progress_bar(total=self.num_sequences, initial=len(windows), desc="writing text to train on",
                          unit="sequence", shown=work.progress) as bar:
            while missing := self.num_sequences - len(windows):
                seed = work.calibrated.settings.seed << 32 | len(windows)
                count = min(GENERATED, missing)
                windows += generate_windows(decoder, backend, work.tokenizer, [length] * count, seed)
                state.save("text", windows)
                bar.update(count)
        return windows

    def _train(self, work: TuneWork, student: Student, windows: Sequence[Sequence[int]], state: _State) -> None:
        teacher = _on_device(load_model(work.checkpoint, ReferenceBackend()), student.device)
        parameters = student.parameters
        optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        done = 0
        if (saved := state.load("training", None)) is not None:
            done = saved["done"]
            optimizer.load_state_dict(saved["optimizer"])
            with torch.no_grad():
                for parameter, value in zip(parameters, saved["parameters"], strict=True):
                    parameter.copy_(value)

        def save() -> None:
            state.save("training", {"done": done, "optimizer": optimizer.state_dict(), "parameters": parameters})

        steps = -(-len(windows) // self.batch_size)
        saved_at = time.monotonic()
        with progress_bar(total=steps, initial=done, desc="training", unit="step", shown=work.progress) as bar:
            while done < steps:
                batch = windows[done * self.batch_size : (done + 1) * self.batch_size]
                loss = backward(student, teacher, batch, student.device)
                if not math.isfinite(loss):
                    shutil.rmtree(work.directory)
                    raise QuantizationError(f"training diverged at step {done + 1}: lower qat's learning_rate")
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                for group in optimizer.param_groups:
                    group["lr"] = rate(self.learning_rate, done, steps)
                optimizer.step()
                optimizer.zero_grad()
                done += 1
                bar.update()
                bar.set_postfix(kl=f"{loss:.4f}", refresh=False)
                if time.monotonic() - saved_at >= SAVE_SECONDS:
                    save()
                    saved_at = time.monotonic()
        save()


class Student:
    """A model that computes as its artifact will; `parameters` are the floats behind it."""

    def __init__(self, checkpoint: Checkpoint, activations: Activations, weights: Weights,
                 calibrated: Sequence[Sequence[int]], *, clip: bool = False, kv_dtype: KVCacheDtype = "int8",
                 device: str = "cpu") -> None:
        self.device = device
        self._checkpoint = checkpoint
        self._weights = weights
        self._kv_dtype = kv_dtype
        self._rounding: dict[str, Rounding] = {}  # by the linears' names
        walk = Walk(checkpoint, (activations,), calibrated, weights)
        stem, parts = walk.stem(), []
        for work in walk.blocks():
            # The samples go on through the block in float, whose inputs static scales are of.
            parts.append(work.block.with_linears(lambda name, linear: replace(linear)))
            self._choose(work, parts[-1], clip)
            work.block.linears.update({name: replace(linear, act=None) for name, linear in work.block.linears.items()})
        self.decoder = _on_device(Decoder(checkpoint.model_config, stem, parts[:-1], parts[-1]), device)
        self.parameters: list[torch.Tensor] = []
        for module in self._trained():
            module.weight = self._parameter(to_torch(module.weight))
            module.bias = None if module.bias is None else self._parameter(module.bias)

    def __call__(self, batch: StepInput) -> torch.Tensor:
        """Logits of every token. [M, V]"""
        decoder = self.decoder
        rounded = Decoder(decoder.config, decoder.stem, map(self._rounded_block, decoder.blocks),
                          self._rounded_block(decoder.head))
        logits: torch.Tensor = rounded(ReferenceOps(batch, None, self._kv_dtype, self.device))
        return logits

    def save(self, path: Path) -> Checkpoint:
        """As a float checkpoint; what was not trained is as in the source."""
        source, decoder = self._checkpoint, self.decoder
        float_head = self._weights.head_bits == 16
        head = replace(decoder.head, linears=load_head(source).linears) if float_head else decoder.head
        tied = float_head and source.tied
        stem = replace(_moved(decoder.stem, "cpu"), embedding=load_stem(source).embedding)
        modules: list[tuple[str, Any]] = [*stem_modules(stem)]
        for block in (*decoder.blocks, head):
            modules += block_modules(block)
        tensors: dict[str, Any] = {}
        for name, module in modules:
            if not (tied and name == source.model.head_module):
                tensors |= tensors_of(name, _moved(module, "cpu"))
        for block in decoder.blocks:
            tensors |= block_tensors(block)
        path.mkdir(exist_ok=True)
        try:
            (path / "config.json").write_text(json.dumps({**source.config, "tie_word_embeddings": tied}))
            save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        except Exception as error:  # safetensors has an error of its own
            raise QuantizationError(f"cannot write to {path}: {error}") from None
        return Checkpoint(path)

    def _trained(self) -> Iterator[Linear | Norm]:
        decoder = self.decoder
        if decoder.stem.norm is not None:
            yield decoder.stem.norm
        for block in (*decoder.blocks, decoder.head):
            yield from (norm for spec, norm in block.each_norm() if spec.scaled)
            yield from (linear for linear in block.linears.values()
                        if block is not decoder.head or self._weights.head_bits != 16)

    def _parameter(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy: the checkpoint's own memory may be the teacher's too."""
        self.parameters.append(tensor.detach().clone().requires_grad_())
        return self.parameters[-1]

    @torch.inference_mode()
    def _choose(self, work: BlockWork, block: Block, clip: bool) -> None:
        """How the block's weights and inputs are quantized; static scales are the float model's."""
        for name, target in work.targets.items():
            linear = block.linears[name]
            self._rounding[linear.name] = target.rounding
            if target.rounding.num_bits == 16:
                linear.act = None
            elif clip and not work.is_head:
                self._clip(target, linear)

    @staticmethod
    def _clip(target: Target, linear: Linear) -> None:
        weight = target.weight
        ratio = search_clip(weight, target.stats.mean_square, target.rounding).clamp_max(1)  # [N, G]
        grouped = weight.reshape(*ratio.shape, -1)
        limit = grouped.abs().amax(-1, keepdim=True) * ratio[..., None]
        linear.weight = grouped.clamp(-limit, limit).reshape(weight.shape)

    def _rounded_block(self, block: Block) -> Block:
        return block.with_linears(lambda _, linear: self._rounded(linear, block is self.decoder.head))

    def _rounded(self, linear: Linear, head: bool) -> Linear:
        """Its weight on the grid; gradients go straight through. A head of 16 bits stays what the checkpoint has."""
        weight, rounding = to_torch(linear.weight), self._rounding[linear.name]
        exact = weight.detach()
        if rounding.num_bits != 16:
            rounded = rounding(exact)
        elif head:
            return linear
        else:
            rounded = exact.to(torch.bfloat16 if self._weights.dtype == "bf16" else torch.float16).float()
        return replace(linear, weight=rounded + (weight - exact))


class _State:
    """What an interrupted run goes on from. Files are replaced whole. Raises QuantizationError where `directory` holds
    another run's, or cannot be read or written."""

    def __init__(self, directory: Path, identity: str) -> None:
        self._directory = directory
        run = directory / "run.json"
        try:
            directory.mkdir(exist_ok=True)
            if any(directory.iterdir()) and not (run.is_file() and run.read_text("utf-8") == identity):
                raise QuantizationError(f"{directory} was left by an interrupted run with another model or other "
                                        "settings; finish that run, or remove the directory")
            run.write_text(identity, "utf-8")
        except OSError as error:
            raise QuantizationError(f"cannot write to {directory}: {error.strerror}") from None

    def load(self, name: str, default: T) -> T:
        file = self._directory / f"{name}.pt"
        if not file.is_file():
            return default
        try:
            loaded: T = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever a damaged file leads to
            raise QuantizationError(f"{file} is damaged ({type(error).__name__}); remove {self._directory}") from None
        return loaded

    def save(self, name: str, value: object) -> None:
        file = self._directory / f"{name}.pt"
        partial = file.with_suffix(".partial")
        try:
            with partial.open("wb") as stream:
                torch.save(value, stream)
                stream.flush()
                os.fsync(stream.fileno())
            partial.replace(file)
        except (OSError, RuntimeError) as error:  # torch's own, where the disk is full
            partial.unlink(missing_ok=True)
            raise QuantizationError(f"cannot write to {self._directory}: {error}") from None


def _moved(value: Any, device: str) -> Any:
    """Parameters with their tensors on that device, detached."""
    if isinstance(value, torch.Tensor):
        return value.detach().to(device)
    if isinstance(value, BlockSpec | StemSpec):
        return value
    if isinstance(value, dict):
        return {name: _moved(item, device) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_moved(item, device) for item in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: _moved(getattr(value, f.name), device) for f in fields(value)})
    return value


def _on_device(decoder: Decoder, device: str) -> Decoder:
    parts = (decoder.stem, list(decoder.blocks), decoder.head)
    return Decoder(decoder.config, *(_moved(part, device) for part in parts))
