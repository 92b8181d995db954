"""Quantization-aware training without data, after LLM-QAT (arXiv 2305.17888): the float model writes the text, and a
copy of it that rounds as the artifact will learns to predict what the float model predicts."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat, PositiveInt
from safetensors.numpy import save_file
from tqdm import tqdm

from fptq_runtime import __version__
from fptq_runtime.artifact.io import hash_file
from fptq_runtime.artifact.numerics import ScaleRule, dequantize, quantize_weight
from fptq_runtime.artifact.scheme import NumberType
from fptq_runtime.config import KVCacheDtype
from fptq_runtime.kernels.base import ActivationQuant, Linear, Norm, StepInput
from fptq_runtime.kernels.reference import ReferenceBackend, ReferenceOps, to_torch
from fptq_runtime.kernels.select import select_backend
from fptq_runtime.models.decoder import Block, Decoder, Head, Stem
from fptq_runtime.models.loader import Checkpoint, load_head, load_model, load_stem
from fptq_runtime.quantizer.calibrate import HiddenStates, Kind, pack_windows
from fptq_runtime.quantizer.export import module_tensors
from fptq_runtime.quantizer.generate import generate_windows
from fptq_runtime.quantizer.steps.activations import Activations
from fptq_runtime.quantizer.steps.base import BlockWork, QuantizationError, Step, Target, TuneWork, block_work
from fptq_runtime.quantizer.steps.weights import Bits, Weights, search_clip

T = TypeVar("T")

PARAMETER_BYTES = 24  # float32: trained, gradient, AdamW's two moments, rounded; and the teacher's own
LOGITS_FLOATS = 1 << 22  # of one pass, 16 MiB
WARMUP = 0.05  # of all steps
SAVE_SECONDS = 60.0
GENERATED = 64  # sequences between two saves


class Qat(Step):
    """Train the linears, biases and norms before `activations` and `weights`, which must follow, round them.

    Each step rounds the weights to the grid that they will have, inputs, keys and values to 8 bits, and sends the
    gradients straight through (AdamW, one pass, cosine rate). The loss is KL(float || rounded) of the logits. What
    stays in float for good, the embedding and a head of 16 bits, stays as it is; a tied head becomes one of its own.

    It holds 24 bytes a parameter, beside the activations of one pass, and saves its state every minute: the same
    command goes on where an interrupted one was, and on a CPU leads to the same bytes.

    data: what the float model writes by itself, or text from where the calibration samples come from.
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

    def tune(self, work: TuneWork) -> Checkpoint:
        device = self._device()
        _refuse_too_large(work.checkpoint, device)
        state = _State(work.directory, self._identity(work, device))
        windows = self._windows(work, state)
        activations, weights = work.steps[1:]
        assert isinstance(activations, Activations) and isinstance(weights, Weights)
        student = Student(work.checkpoint, activations, weights, work.calibrated, clip=self.clip,
                          kv_dtype=self.kv_dtype, device=device)
        self._train(work, student, windows, state)
        return student.save(work.directory / "tuned")

    def _device(self) -> str:
        if self.device == "cuda" and not torch.cuda.is_available():
            raise QuantizationError("qat: there is no CUDA device; use device: auto")
        return ("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device

    def _identity(self, work: TuneWork, device: str) -> str:
        """Of everything that decides what training leads to."""
        source = sorted(file for file in work.checkpoint.path.iterdir() if file.suffix in (".json", ".safetensors"))
        return json.dumps({
            "steps": [step.model_dump(mode="json") for step in work.steps],
            "source": {file.name: hash_file(file) for file in source},
            "calibration": hashlib.sha256(json.dumps(work.calibrated).encode()).hexdigest(),
            "seed": work.calibration.seed,
            "device": device,
            "versions": [__version__, torch.__version__],
        }, indent=1)

    def _windows(self, work: TuneWork, state: _State) -> Sequence[Sequence[int]]:
        length = min(self.sequence_length, work.checkpoint.model_config.max_position_embeddings)
        if self.data == "calibration":
            calibration = replace(work.calibration, num_samples=self.num_sequences, sample_length=length, lengths=None)
            return calibration.draw(work.checkpoint, work.tokenizer).windows
        windows: list[list[int]] = state.load("text", [])
        if len(windows) == self.num_sequences:
            return windows
        backend = select_backend()
        decoder = load_model(work.checkpoint, backend)
        with tqdm(total=self.num_sequences, initial=len(windows), desc="writing text to train on", unit="sequence",
                  disable=not work.progress) as bar:
            while missing := self.num_sequences - len(windows):
                seed = work.calibration.seed << 32 | len(windows)
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
        with tqdm(total=steps, initial=done, desc="training", unit="step", disable=not work.progress) as bar:
            while done < steps:
                batch = windows[done * self.batch_size : (done + 1) * self.batch_size]
                loss = sum(_backward(student, teacher, part, sum(map(len, batch)))
                           for part in _passes(batch, student.decoder.config.vocab_size))
                if not math.isfinite(loss):
                    shutil.rmtree(work.directory)
                    raise QuantizationError(f"training diverged at step {done + 1}: lower qat's learning_rate")
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                for group in optimizer.param_groups:
                    group["lr"] = self._rate(done, steps)
                optimizer.step()
                optimizer.zero_grad()
                done += 1
                bar.update()
                bar.set_postfix(kl=f"{loss:.4f}", refresh=False)
                if time.monotonic() - saved_at >= SAVE_SECONDS:
                    save()
                    saved_at = time.monotonic()
        save()

    def _rate(self, done: int, steps: int) -> float:
        rising = min(1.0, (done + 1) / (WARMUP * steps))
        return self.learning_rate * rising * (1 + math.cos(math.pi * done / steps)) / 2


class Student:
    """A model that computes as its artifact will; `parameters` are the floats behind it."""

    def __init__(self, checkpoint: Checkpoint, activations: Activations, weights: Weights,
                 calibrated: Sequence[Sequence[int]], *, clip: bool = False, kv_dtype: KVCacheDtype = "int8",
                 device: str = "cpu") -> None:
        self.device = device
        self._checkpoint = checkpoint
        self._weights = weights
        self._kv_dtype = kv_dtype
        decoder = load_model(checkpoint, ReferenceBackend())
        blocks = list(decoder.blocks)
        self._bits: list[dict[Kind, Bits]] = []
        self._acts: list[dict[Kind, ActivationQuant | None]] = []
        states = HiddenStates(decoder.config, calibrated)
        states.run_stem(decoder.stem)
        for index, block in enumerate(blocks):
            work = block_work(checkpoint.spec, decoder.config, index, block, states)
            states.run_block(block)
            self._choose(work, activations, clip)
        head_float = activations.scheme == "float" or weights.head_bits == 16
        self._head_act = None if head_float else ActivationQuant(None, activations.grid)
        self.decoder = _on_device(decoder, device)
        self.parameters: list[torch.Tensor] = []
        for module in self._trained():
            module.weight = self._parameter(to_torch(module.weight))
            module.bias = None if module.bias is None else self._parameter(module.bias)

    def __call__(self, batch: StepInput) -> torch.Tensor:
        """Logits of every token. [M, V]"""
        stem, blocks, head = self.decoder.stem, self.decoder.blocks, self.decoder.head
        rounded = Decoder(
            self.decoder.config, stem,
            (self._rounded_block(block, bits, acts)
             for block, bits, acts in zip(blocks, self._bits, self._acts, strict=True)),
            Head(head.norm, self._rounded_head(head.lm_head), self._head_act),
        )
        logits: torch.Tensor = rounded(ReferenceOps(batch, None, self._kv_dtype, self.device))
        return logits

    def save(self, path: Path) -> Checkpoint:
        """As a float checkpoint; what was not trained is as in the source."""
        source = self._checkpoint
        spec, config, decoder = source.spec, source.model_config, self.decoder
        float_head = self._weights.head_bits == 16
        head = replace(decoder.head, lm_head=load_head(source).lm_head) if float_head else decoder.head
        modules = [*spec.stem_modules(Stem(load_stem(source).embedding, decoder.stem.norm)), *spec.head_modules(head)]
        for index, block in enumerate(decoder.blocks):
            modules += spec.block_modules(config, index, block)
        tied = float_head and config.tie_word_embeddings
        tensors: dict[str, Any] = {}
        for name, module in modules:
            if not (tied and name == spec.lm_head):
                tensors |= module_tensors(name, _moved(module, "cpu"))
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
        for block in decoder.blocks:
            yield from (block.input_norm, block.qkv, block.o, block.mlp_norm, block.up, block.down)
            yield from (norm for norm in (block.attention.q_norm, block.attention.k_norm) if norm is not None)
        yield decoder.head.norm
        if self._weights.head_bits != 16:
            yield decoder.head.lm_head

    def _parameter(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy: the checkpoint's own memory may be the teacher's too."""
        self.parameters.append(tensor.detach().clone().requires_grad_())
        return self.parameters[-1]

    @torch.inference_mode()
    def _choose(self, work: BlockWork, activations: Activations, clip: bool) -> None:
        """How the block's weights and inputs are quantized; static scales are the float model's."""
        activations.apply(work)
        bits = {kind: self._weights.bits(target.modules) for kind, target in work.targets.items()}
        self._bits.append(bits)
        self._acts.append({kind: None if bits[kind] == 16 else target.linear.act
                           for kind, target in work.targets.items()})
        for kind, target in work.targets.items():
            if clip and bits[kind] != 16:
                self._clip(target, bits[kind])

    def _clip(self, target: Target, bits: int) -> None:
        weight = target.weight
        ratio = search_clip(weight, target.stats.mean_square, bits, *self._grid(weight, bits)).clamp_max(1)  # [N, G]
        grouped = weight.reshape(*ratio.shape, -1)
        limit = grouped.abs().amax(-1, keepdim=True) * ratio[..., None]
        target.linear.weight = grouped.clamp(-limit, limit).reshape(weight.shape)

    def _grid(self, weight: torch.Tensor, bits: int) -> tuple[int | None, NumberType, ScaleRule]:
        """Group, numbers and scales, as `Weights` decides them for a block's linear."""
        grid, group = self._weights.grid, self._weights.group_size
        per_channel = group is None or weight.shape[1] % group or (grid == "float" and bits == 8)
        return None if per_channel else group, grid, self._weights.scales if bits == 4 else "float"

    def _rounded_block(self, block: Block, bits: dict[Kind, Bits], acts: dict[Kind, ActivationQuant | None]) -> Block:
        return replace(
            block, qkv=self._rounded(block.qkv, bits["qkv"]), o=self._rounded(block.o, bits["o"]),
            up=self._rounded(block.up, bits["up"]), down=self._rounded(block.down, bits["down"]),
            qkv_act=acts["qkv"], o_act=acts["o"], up_act=acts["up"], down_act=acts["down"],
        )

    def _rounded_head(self, linear: Linear) -> Linear:
        bits = self._weights.head_bits
        return linear if bits == 16 else self._rounded(linear, bits, per_channel=bits == 8)

    def _rounded(self, linear: Linear, bits: Bits, per_channel: bool = False) -> Linear:
        """Its weight on the grid; gradients go straight through."""
        weight = to_torch(linear.weight)
        exact = weight.detach()
        if bits == 16:
            rounded = exact.to(torch.bfloat16 if self._weights.dtype == "bf16" else torch.float16).float()
        else:
            group, grid, scales = self._grid(exact, bits)
            group = None if per_channel else group
            rounded = dequantize(*quantize_weight(exact, bits, group, None, torch.bfloat16, grid, scales))
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


def _passes(windows: Sequence[Sequence[int]], vocab_size: int) -> Iterator[StepInput]:
    """Few enough at a time that their logits are bounded."""
    size = max(1, LOGITS_FLOATS // (max(map(len, windows)) * vocab_size))
    for start in range(0, len(windows), size):
        yield pack_windows(windows[start : start + size])


def _backward(student: Student, teacher: Decoder, batch: StepInput, tokens: int) -> float:
    """Add the gradients of this pass's share of the mean KL over `tokens`. Returns the share."""
    with torch.no_grad():
        expected = teacher(ReferenceOps(batch, None, device=student.device)).log_softmax(-1)
    loss = F.kl_div(student(batch).log_softmax(-1), expected, reduction="sum", log_target=True) / tokens
    loss.backward()  # type: ignore[no-untyped-call]
    return float(loss.detach())


def _moved(value: Any, device: str) -> Any:
    """Parameters with their tensors on that device, detached."""
    if isinstance(value, torch.Tensor):
        return value.detach().to(device)
    if isinstance(value, list | tuple):
        return type(value)(_moved(item, device) for item in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: _moved(getattr(value, f.name), device) for f in fields(value)})
    return value


def _on_device(decoder: Decoder, device: str) -> Decoder:
    parts = (decoder.stem, list(decoder.blocks), decoder.head)
    return Decoder(decoder.config, *(_moved(part, device) for part in parts))


def _refuse_too_large(checkpoint: Checkpoint, device: str) -> None:
    needed, available = PARAMETER_BYTES * checkpoint.num_parameters, _available_memory(device)
    if available is not None and needed > available:
        raise QuantizationError(f"qat needs {needed >> 20} MB of memory for this model, and {available >> 20} MB are "
                                f"available on {device}; quantize it without training")


def _available_memory(device: str) -> int | None:
    """Bytes; None where the system does not say."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    with suppress(OSError):
        if found := re.search(r"MemAvailable: *(\d+) kB", Path("/proc/meminfo").read_text()):
            return int(found[1]) * 1024
    return None
