"""From a float checkpoint to an artifact: block by block, the quantized block feeding the next."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from fptq_runtime import __version__
from fptq_runtime.artifact.io import (
    CARD,
    ArtifactWriter,
    LayerRecord,
    Manifest,
    Provenance,
    Quality,
    check_output,
    check_room,
    hash_file,
)
from fptq_runtime.artifact.scheme import LayerScheme
from fptq_runtime.kernels.base import Linear, QuantizedWeight
from fptq_runtime.kernels.reference import ReferenceBackend
from fptq_runtime.memory import give_back_freed_memory
from fptq_runtime.models.block import Block, Model, Stem, prepare_block
from fptq_runtime.models.decoder import Decoder
from fptq_runtime.models.formats.compressed_tensors import linear_scheme, quantization_config
from fptq_runtime.models.loader import Checkpoint, load_head, load_stem
from fptq_runtime.models.readout import MOVING, READOUT, Basis, bases_to_bytes
from fptq_runtime.models.tensors import weight_files
from fptq_runtime.progress import progress_bar, tell
from fptq_runtime.quantizer.calibrate import ChosenExperts, HiddenStates, packaged_text, read_text
from fptq_runtime.quantizer.card import model_card
from fptq_runtime.quantizer.evaluate import MAX_WINDOW, text_windows
from fptq_runtime.quantizer.export import (
    block_modules,
    block_tensors,
    companions,
    copy_companions,
    stem_modules,
    tensors_of,
)
from fptq_runtime.quantizer.forecast import forecast
from fptq_runtime.quantizer.pickled import as_safetensors
from fptq_runtime.quantizer.recipe import Recipe, load_recipe
from fptq_runtime.quantizer.record import write_golden
from fptq_runtime.quantizer.samples import Calibration, CalibrationSet
from fptq_runtime.quantizer.source import Source, load_tokenizer, resolve_model
from fptq_runtime.quantizer.steps.base import BlockWork, QuantizationError, RefineWork, Step, Target, TuneWork
from fptq_runtime.quantizer.steps.weights import Weights
from fptq_runtime.quantizer.walk import Walk, float_part, float_stem


@dataclass(frozen=True)
class Watcher:
    """Sees the stem and then each block and the head, transformed and with its activation schemes chosen, before the
    weights are rounded. What it keeps of them is what they become, and can run max_positions tokens, at least."""

    stem: Callable[[Model, Stem], None] = lambda model, stem: None
    block: Callable[[BlockWork], None] = lambda work: None
    max_positions: int = 0


def quantize(
    model: str | Path,
    out: str | Path,
    recipe: Recipe | str | Path = "fptq-best",
    *,
    calibration: Calibration | CalibrationSet = Calibration(),
    text: str | Path | None = None,
    text_tokens: int = 8192,
    overwrite: bool = False,
    progress: bool = False,
    watcher: Watcher = Watcher(),
) -> Manifest:
    """Quantize `model` (a directory, or a hub id as name or name@revision) into the artifact directory `out`.

    calibration: how to draw the windows, or what was drawn for this model.
    text: what perplexity is measured on before and after, its first text_tokens tokens; None is a packaged text that
    calibration never sees. The same arguments on the same machine give the same bytes. Every error is an FptqError of
    one line; nothing is left at `out` then.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    check_output(Path(out), overwrite, Path(model))  # before a model is fetched
    source, checkpoint = open_float(model, "quantize the float model it was made from")
    needed = artifact_bytes(checkpoint, recipe.weights) + sum(file.stat().st_size for file in companions(source.path))
    check_room(Path(out).resolve().parent, int(1.03 * needed))  # golden values and the manifest, too
    config = checkpoint.model_config
    tokenizer = load_tokenizer(source.path)
    measured_on = packaged_text("heldout") if text is None else read_text(text)
    measured = text_windows(measured_on, tokenizer, config.max_position_embeddings, text_tokens)
    if progress and isinstance(calibration, Calibration):
        tokens = calibration.num_samples * calibration.length(config.max_position_embeddings)
        writes = calibration.source in ("self", "chat") or (calibration.source is None and recipe.reads_inputs)
        tell(f"quantizing {source.name} takes {forecast(checkpoint, recipe, tokens, measured, writes)}")
    calibrated = (calibration if isinstance(calibration, CalibrationSet)
                  else calibration.draw(checkpoint, tokenizer, recipe.reads_inputs, progress))
    checkpoint.max_positions = max(watcher.max_positions, *map(len, (*calibrated.windows, *measured)))

    with ArtifactWriter(Path(out), overwrite) as writer:
        run = _Run(checkpoint, recipe, writer, calibrated.windows, measured, watcher)
        state = Path(out).resolve().with_name(f".{Path(out).resolve().name}.state")
        run.tune(TuneWork(checkpoint, tokenizer, recipe.steps, calibrated, state, progress))
        with progress_bar(total=config.num_layers + 1, desc=f"quantizing {source.name}", unit="block",
                          shown=progress) as bar:
            for _ in run.walk():
                give_back_freed_memory()
                bar.update()
        run.finish(progress)
        run.write_config()
        copy_companions(source.path, writer)
        before, after, scored = run.perplexity()
        manifest = Manifest(
            recipe=recipe.model_dump(mode="json"),
            provenance=_provenance(source, config.architecture, calibrated),
            layers=tuple(run.records),
            quality=Quality(
                text=measured_on.record(scored),
                window=min(config.max_position_embeddings, MAX_WINDOW),
                perplexity_before=before,
                perplexity_after=after,
                routing=run.routing,
            ),
            golden=write_golden(writer, measured[0]),
            idle_bytes=run.idle_bytes,
        )
        writer.add_file(CARD, model_card(manifest, source.path, writer.tensor_bytes))
        manifest = writer.commit(manifest)
    if run.tuned:
        shutil.rmtree(state, ignore_errors=True)
    return manifest


def artifact_bytes(checkpoint: Checkpoint, weights: Weights) -> int:
    """What an artifact will take, within a few per cent: embeddings as they come, `keep` not counted."""
    model = checkpoint.model
    *blocks, head = model.parts
    embedding = load_stem(checkpoint).embedding.weight  # mapped: nothing is read
    bits = 8.0 * embedding.nbytes
    for linear in (linear for block in blocks for linear in block.linears):
        chosen = 16 if linear.kept else weights.num_bits
        bits += linear.n * linear.k * (chosen + (0.25 if chosen == 4 else 0))  # a bfloat16 scale for 64
    if not (checkpoint.tied and weights.num_bits == weights.head_bits == 16):
        width = 8 * embedding.itemsize if weights.head_bits == 16 else weights.head_bits
        bits += sum(linear.n * linear.k * width for linear in head.linears)
    return int(bits / 8)


def open_float(model: str | Path, instead: str) -> tuple[Source, Checkpoint]:
    """`resolve_model`, opened. Raises CheckpointError, and where it is quantized QuantizationError, which says what to
    do `instead`."""
    source = resolve_model(str(model))
    checkpoint = Checkpoint(as_safetensors(source.path), dequantize=True)
    if checkpoint.quantized:
        raise QuantizationError(f"{source.name} is quantized already; {instead}")
    return source, checkpoint


class _Run:
    """One model on its way through a recipe and into files, beside the measured text in float and quantized."""

    def __init__(self, checkpoint: Checkpoint, recipe: Recipe, writer: ArtifactWriter,
                 calibrated: Sequence[Sequence[int]], measured: Sequence[Sequence[int]], watcher: Watcher) -> None:
        self.records: list[LayerRecord] = []
        self.routing: dict[str, float] = {}  # as `Quality` has it
        self.idle_bytes = 0  # as `Manifest` has them
        self._source = checkpoint
        self._checkpoint = checkpoint  # what is quantized: the source, or what training made of it
        self._recipe = recipe
        self._writer = writer
        self._calibrated = calibrated
        self._watcher = watcher
        self._walk = self._start()
        self._float = HiddenStates(checkpoint.model, measured)
        self._quantized = HiddenStates(self._walk.model, measured)
        self._schemes: dict[str, LayerScheme] = {}
        self._linears: list[str] = []
        self._bases: dict[tuple[str, str], Basis] = {}
        self._layers_known = True
        self._losses: list[float] = []
        self._scored = 0
        self._tied = False
        self._chosen: dict[str, ChosenExperts] = {}  # by the float block of that name
        self._transformed = False  # the head, by a step
        self._held: list[Block] = []  # until steps have refined them
        self._refines = any(type(step).refine is not Step.refine for step in recipe.steps)

    def _start(self) -> Walk:
        return Walk(self._checkpoint, self._recipe.steps, self._calibrated, self._recipe.weights)

    def tune(self, work: TuneWork) -> None:
        """Before the walk, which then quantizes what the steps trained and compares it with the source."""
        for step in self._recipe.steps:
            self._checkpoint = step.tune(work) or self._checkpoint
        if self.tuned:
            self._walk = self._start()

    def walk(self) -> Iterator[None]:
        """Quantize and write everything; yields after each block and after the head."""
        self._stem = self._walk.stem(self._float_stem)
        self._watcher.stem(self._walk.model, self._stem)
        for name, module in stem_modules(self._stem):
            self._writer.add_tensors(tensors_of(name, module))
        self._quantized.run_stem(self._stem)
        untouched: list[Any] = []

        def loaded(block: Block) -> None:
            untouched[:] = [linear.weight for linear in block.linears.values()]
            self._float_block(block)

        for work in self._walk.blocks(loaded):
            self._watcher.block(work)
            if work.is_head:
                self._transformed = work.block.linears["head"].weight is not untouched[0]
            with torch.inference_mode():
                (self._recipe.weights.apply_head if work.is_head else self._recipe.weights.apply)(work)
            self.records += [_record(target) for target in work.targets.values()]
            if self._refines:
                self._held.append(work.block)
            else:
                self._finish_part(work.block)
            yield

    def finish(self, progress: bool) -> None:
        """After the walk: refine what was held, and close the tensors' file."""
        if self._refines:
            *blocks, head = self._held
            decoder = Decoder(self._walk.model.config, self._stem, blocks, head)
            for step in self._recipe.steps:
                step.refine(RefineWork(self._source, decoder, self._calibrated, progress))
            for part in self._held:
                self._finish_part(part)
        self._writer.finish_tensors()

    def perplexity(self) -> tuple[float, float, int]:
        """Before, after, and how many tokens were scored."""
        before, after = (math.exp(loss / self._scored) for loss in self._losses)
        if not (math.isfinite(before) and math.isfinite(after)):
            raise QuantizationError("the model's perplexity is not finite; its weights may be damaged")
        return before, after, self._scored

    def write_config(self) -> None:
        ignore = [name for name in self._linears if name not in self._schemes]
        config = {**self._walk.config, **self._walk.model.rewritten, "tie_word_embeddings": self._tied}
        config.pop("quantization_config", None)  # the source's
        if self._schemes:
            model = self._walk.model
            config["quantization_config"] = quantization_config(self._schemes, model.head_module, ignore,
                                                                (model.bare_prefix, model.loaded_prefix))
        else:
            config["dtype"] = {"bf16": "bfloat16", "fp16": "float16"}[self._recipe.weights.dtype]
        self._writer.add_file("config.json", json.dumps(config, indent=2) + "\n")
        bases = {key: basis for key, basis in self._bases.items() if self._layers_known or key[0] == ""}
        if bases or (self._layers_known and any(step.type in MOVING for step in self._recipe.steps)):
            self._writer.add_file(READOUT, bases_to_bytes(bases))

    @property
    def tuned(self) -> bool:
        """What is quantized is not the source."""
        return self._checkpoint is not self._source

    def _float_stem(self, stem: Stem) -> None:
        self._float.run_stem(float_stem(self._source) if self.tuned else stem)

    def _float_block(self, block: Block) -> None:
        """The measured text through the float model."""
        index = self._checkpoint.model.parts.index(block.spec)
        exact = float_part(self._source, index) if self.tuned else block
        if index == len(self._source.model.blocks):
            loss, self._scored = self._float.negative_log_likelihood(exact)
            self._losses.append(loss)
        else:
            chosen = self._chosen[block.spec.name] = ChosenExperts()
            self._float.run_block(exact, chosen.ops)

    def _finish_part(self, part: Block) -> None:
        """Written, and the measured text through it. A head that nothing changed is written as it came, or not at all
        where it is the embedding."""
        prepared = prepare_block(part, ReferenceBackend())
        if part.spec is not self._walk.model.head:
            self._write(part)
            chosen = ChosenExperts()
            self._quantized.run_block(prepared, chosen.ops)
            if (share := chosen.agreement(self._chosen.pop(part.spec.name))) is not None:
                self.routing[part.spec.name] = share
            return
        as_it_came = not self._transformed and linear_scheme(part.linears["head"]) is None
        self._tied = as_it_came and self._checkpoint.tied and not part.spec.linear("head").normalised
        if as_it_came:
            stored = load_head(self._checkpoint).linears["head"]
            self._write(replace(part, linears={"head": stored}), leave_out=self._tied)
        else:
            self._write(part)
        loss, _ = self._quantized.negative_log_likelihood(prepared)
        self._losses.append(loss)

    def _write(self, block: Block, leave_out: bool = False) -> None:
        """leave_out: the linears' weights, which are written elsewhere."""
        spec, routing = block.spec, block.spec.routing
        experts = {module for linear in spec.linears if linear.experts > 1 for module in spec.modules(linear.name)}
        for name, module in block_modules(block):
            if isinstance(module, Linear):
                self._linears.append(name)
                if (scheme := linear_scheme(module)) is not None:
                    self._schemes[name] = scheme
                if leave_out:
                    continue
            tensors = tensors_of(name, module)
            self._writer.add_tensors(tensors)
            if name in experts:
                assert routing is not None
                size = sum(tensor.nbytes for tensor in tensors.values())
                self.idle_bytes += size * (routing.num_experts - routing.top_k) // routing.num_experts
        self._writer.add_tensors(block_tensors(block))
        if block.bases is None:
            self._layers_known = False
        else:
            self._bases |= {(spec.name, linear.name): block.bases[linear.name] for linear in spec.linears
                            if linear.name in block.bases and linear.experts == 1}


def _record(target: Target) -> LayerRecord:
    linear, weight = target.linear, target.linear.weight
    activations: Literal["static", "dynamic", "float"] = (
        "float" if linear.act is None else "dynamic" if linear.act.scale is None else "static"
    )
    per_channel = not isinstance(weight, QuantizedWeight) or weight.group_size == weight.k
    return LayerRecord(
        name=linear.name,
        kind=target.name,
        modules=target.modules,
        range=target.range,
        peak_position=target.stats.peak_position,
        equalized=target.equalized,
        activations=activations,
        reason=target.reason,
        input_scale=None if linear.act is None else linear.act.scale,
        input_type="int" if linear.act is None else linear.act.type,
        num_bits=weight.num_bits if isinstance(weight, QuantizedWeight) else 16,
        group_size=weight.group_size if isinstance(weight, QuantizedWeight) and not per_channel else None,
        type=weight.type if isinstance(weight, QuantizedWeight) else "int",
        rank=0 if linear.low_rank is None else linear.low_rank[0].shape[0],
        experts=linear.experts,
        unseen=tuple(i for i, stats in enumerate(target.stats.experts) if not stats.rows),
        activation_error=target.activation_error,
        error=target.error,
    )


def _provenance(source: Source, architecture: str, calibrated: CalibrationSet) -> Provenance:
    return Provenance(
        source=source.name,
        revision=source.revision,
        architecture=architecture,
        source_files={file.name: hash_file(file)
                      for file in sorted([*source.path.glob("*.json"), *weight_files(source.path)])},
        calibration=calibrated.tokens,
        num_samples=calibrated.settings.num_samples,
        sample_length=calibrated.sample_length,
        lengths=calibrated.lengths,
        seed=calibrated.settings.seed,
        fptq_version=__version__,
    )
