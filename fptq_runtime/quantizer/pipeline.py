"""From a float checkpoint to an artifact: block by block, the quantized block feeding the next."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from fptq_runtime import __version__
from fptq_runtime.artifact.io import (
    ArtifactWriter,
    LayerRecord,
    Manifest,
    Provenance,
    Quality,
    check_output,
    hash_file,
)
from fptq_runtime.artifact.scheme import LayerScheme
from fptq_runtime.kernels.base import Embedding, Linear, Norm, QuantizedWeight
from fptq_runtime.kernels.reference import ReferenceBackend, to_torch
from fptq_runtime.models.decoder import Block, Decoder, Head, prepare_block, prepare_head, prepare_stem
from fptq_runtime.models.golden import compute_golden
from fptq_runtime.models.loader import Checkpoint, load_block, load_head, load_stem
from fptq_runtime.quantizer.calibrate import (
    HiddenStates,
    observe_head,
    packaged_text,
    read_text,
)
from fptq_runtime.quantizer.evaluate import MAX_WINDOW, text_windows
from fptq_runtime.quantizer.export import copy_companions, linear_scheme, module_tensors, quantization_config
from fptq_runtime.quantizer.recipe import Recipe, RecipeError, load_recipe
from fptq_runtime.quantizer.samples import Calibration, CalibrationSet
from fptq_runtime.quantizer.source import Source, load_tokenizer, resolve_model
from fptq_runtime.quantizer.steps.base import (
    HeadWork,
    QuantizationError,
    Target,
    TuneWork,
    block_work,
    matches,
)

GOLDEN_TOKENS = 32


def quantize(
    model: str | Path,
    out: str | Path,
    recipe: Recipe | str | Path = "fptq-best",
    *,
    calibration: Calibration = Calibration(),
    text: str | Path | None = None,
    text_tokens: int = 16384,
    overwrite: bool = False,
    progress: bool = False,
) -> Manifest:
    """Quantize `model` (a directory, or a hub id as name or name@revision) into the artifact directory `out`.

    text: what perplexity is measured on before and after, its first text_tokens tokens; None is a packaged text that
    calibration never sees. The same arguments on the same machine give the same bytes. Every error is a ValueError of
    one line; nothing is left at `out` then.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    check_output(Path(out), overwrite, Path(model))  # before a model is fetched
    source, checkpoint = open_float(model, "quantize the float model it was made from")
    config = checkpoint.model_config
    tokenizer = load_tokenizer(source.path)
    measured_on = packaged_text("heldout") if text is None else read_text(text)
    measured = text_windows(measured_on, tokenizer, config.max_position_embeddings, text_tokens)
    calibrated = calibration.draw(checkpoint, tokenizer)

    with ArtifactWriter(Path(out), overwrite) as writer:
        run = _Run(checkpoint, recipe, writer, calibrated.windows, measured)
        state = Path(out).resolve().with_name(f".{Path(out).resolve().name}.state")
        run.tune(TuneWork(checkpoint, tokenizer, recipe.steps, calibration, calibrated.windows, state, progress))
        with tqdm(total=config.num_layers + 1, desc=f"quantizing {source.name}", unit="block",
                  disable=not progress) as bar:
            for _ in run.walk():
                bar.update()
        run.write_config()
        copy_companions(source.path, writer)
        before, after, scored = run.perplexity()
        manifest = writer.commit(Manifest(
            recipe=recipe.model_dump(mode="json"),
            provenance=_provenance(source, config.architecture, calibration, calibrated),
            layers=tuple(run.records),
            quality=Quality(
                text=measured_on.record(scored),
                window=min(config.max_position_embeddings, MAX_WINDOW),
                perplexity_before=before,
                perplexity_after=after,
            ),
            golden=_golden(writer.directory, measured[0][:GOLDEN_TOKENS]),
        ))
    if run.tuned:
        shutil.rmtree(state, ignore_errors=True)
    return manifest


def open_float(model: str | Path, instead: str) -> tuple[Source, Checkpoint]:
    """`resolve_model`, opened. Raises CheckpointError, and where it is quantized QuantizationError, which says what to
    do `instead`."""
    source = resolve_model(str(model))
    checkpoint = Checkpoint(source.path)
    if checkpoint.quantized:
        raise QuantizationError(f"{source.name} is quantized already; {instead}")
    return source, checkpoint


class _Run:
    """One model on its way through a recipe. Three sets of hidden states go through it side by side: calibration
    samples (quantized so far, and in float where a step wants it), and the measured text in float and quantized."""

    def __init__(self, checkpoint: Checkpoint, recipe: Recipe, writer: ArtifactWriter,
                 calibrated: Sequence[Sequence[int]], measured: Sequence[Sequence[int]]) -> None:
        self.records: list[LayerRecord] = []
        source = checkpoint.model_config
        self._source = checkpoint
        self._checkpoint = checkpoint  # what is quantized: the source, or what training made of it
        self._recipe = recipe
        self._writer = writer
        self._config = source  # of the artifact
        for step in recipe.steps:
            step.check(self._config)
            self._config = step.transform_config(self._config)
        self._calibrated = HiddenStates(self._config, calibrated)
        self._exact: HiddenStates | None = None
        if any(step.wants_exact for step in recipe.steps):
            self._exact = HiddenStates(self._config, calibrated)
        self._float = HiddenStates(source, measured)
        self._quantized = HiddenStates(self._config, measured)
        self._schemes: dict[str, LayerScheme] = {}
        self._linears: list[str] = []
        self._losses: list[float] = []
        self._scored = 0
        self._tied = False
        self._check_patterns()

    def tune(self, work: TuneWork) -> None:
        """Before the walk, which then quantizes what the steps trained and compares it with the source."""
        for step in self._recipe.steps:
            self._checkpoint = step.tune(work) or self._checkpoint

    def walk(self) -> Iterator[None]:
        """Quantize and write everything; yields after each block and after the head."""
        self._stem()
        for index in range(self._config.num_layers):
            self._block(index)
            yield
        self._head()
        self._writer.finish_tensors()
        yield

    def perplexity(self) -> tuple[float, float, int]:
        """Before, after, and how many tokens were scored."""
        before, after = (math.exp(loss / self._scored) for loss in self._losses)
        if not (math.isfinite(before) and math.isfinite(after)):
            raise QuantizationError("the model's perplexity is not finite; its weights may be damaged")
        return before, after, self._scored

    def write_config(self) -> None:
        spec = self._checkpoint.spec
        ignore = [name for name in self._linears if name not in self._schemes]
        config = {**self._checkpoint.config, "tie_word_embeddings": self._tied, **self._changed_sizes()}
        if self._schemes:
            config["quantization_config"] = quantization_config(self._schemes, spec.lm_head, ignore)
        else:
            config["dtype"] = {"bf16": "bfloat16", "fp16": "float16"}[self._recipe.weights.dtype]
        self._writer.add_file("config.json", json.dumps(config, indent=2) + "\n")

    @property
    def tuned(self) -> bool:
        """What is quantized is not the source."""
        return self._checkpoint is not self._source

    def _changed_sizes(self) -> dict[str, int]:
        before, after = self._checkpoint.model_config.intermediate_size, self._config.intermediate_size
        return {} if after == before else {"intermediate_size": after}

    def _stem(self) -> None:
        stem = prepare_stem(load_stem(self._checkpoint), ReferenceBackend())
        _refuse_not_finite(self._checkpoint.spec.stem_modules(stem))
        self._float.run_stem(prepare_stem(load_stem(self._source), ReferenceBackend()) if self.tuned else stem)
        for step in self._recipe.steps:
            step.transform_stem(self._config, stem)
        for name, module in self._checkpoint.spec.stem_modules(stem):
            self._writer.add_tensors(module_tensors(name, module))
        for states in (self._calibrated, self._quantized, self._exact):
            if states is not None:
                states.run_stem(stem)

    def _block(self, index: int) -> None:
        spec, config = self._checkpoint.spec, self._config
        loaded = load_block(self._checkpoint, index)
        _refuse_not_finite(spec.block_modules(self._checkpoint.model_config, index, loaded))
        block = prepare_block(loaded, ReferenceBackend())
        self._float.run_block(
            prepare_block(load_block(self._source, index), ReferenceBackend()) if self.tuned else block)
        for step in self._recipe.steps:
            step.transform_block(config, index, block)
        work = block_work(spec, config, index, block, self._calibrated)
        work.exact = self._exact
        for target in work.targets.values():
            target.rounding = self._recipe.weights.rounding(target.modules)
        with torch.inference_mode():
            exact = [] if self._exact is None else list(self._exact.block_outputs(block))
            for step in self._recipe.steps:
                step.apply(work)
        for name, module in spec.block_modules(config, index, block):
            self._writer.add_tensors(module_tensors(name, module))
            if isinstance(module, Linear):
                self._linears.append(name)
                if (scheme := linear_scheme(module)) is not None:
                    self._schemes[name] = scheme
        self.records += [_record(target) for target in work.targets.values()]
        quantized = prepare_block(block, ReferenceBackend())  # as the runtime will compute it
        self._calibrated.run_block(quantized)
        self._quantized.run_block(quantized)
        if self._exact is not None:
            self._exact.states = exact

    def _head(self) -> None:
        spec = self._checkpoint.spec
        loaded = load_head(self._checkpoint)
        _refuse_not_finite(spec.head_modules(loaded))
        head = prepare_head(loaded, ReferenceBackend())
        loss, self._scored = self._float.negative_log_likelihood(
            prepare_head(load_head(self._source), ReferenceBackend()) if self.tuned else head)
        untouched = head.lm_head.weight
        for step in self._recipe.steps:
            step.transform_head(self._config, head)
        transformed = head.lm_head.weight is not untouched
        target = Target("head", head.lm_head, (spec.lm_head,), observe_head(self._calibrated, head), head.norm)
        with torch.inference_mode():
            for step in self._recipe.steps:
                step.apply_head(HeadWork(self._config, head, target, self._calibrated))
        self._linears.append(spec.lm_head)
        scheme = linear_scheme(head.lm_head)
        self._tied = scheme is None and self._config.tie_word_embeddings and not transformed
        if scheme is not None:
            self._schemes[spec.lm_head] = scheme
        exported = head if scheme is not None or transformed else Head(head.norm, loaded.lm_head)
        for name, module in spec.head_modules(exported):
            if not (self._tied and name == spec.lm_head):
                self._writer.add_tensors(module_tensors(name, module))
        self.records.append(_record(target))
        quantized = prepare_head(head, ReferenceBackend())
        self._losses = [loss, self._quantized.negative_log_likelihood(quantized)[0]]

    def _check_patterns(self) -> None:
        """Before any work is done."""
        spec = self._checkpoint.spec
        names = tuple(spec.layer(index, module) for index in range(self._config.num_layers)
                      for module in (*spec.qkv, spec.o, *spec.up, spec.down))
        for pattern in (pattern for step in self._recipe.steps for pattern in step.patterns()):
            if not matches(pattern, names):
                raise RecipeError(f"no linear layer of this model matches {pattern!r}; they are named like {names[0]}")


def _refuse_not_finite(modules: Sequence[tuple[str, Linear | Norm | Embedding]]) -> None:
    for name, module in modules:
        bias = None if isinstance(module, Embedding) else module.bias
        for suffix, array in (("weight", module.weight), ("bias", bias)):
            if array is not None and not bool(torch.isfinite(to_torch(array)).all()):
                raise QuantizationError(f"{name}.{suffix} holds NaN or infinity; the checkpoint is damaged")


def _record(target: Target) -> LayerRecord:
    linear, weight = target.linear, target.linear.weight
    activations: Literal["static", "dynamic", "float"] = (
        "float" if linear.act is None else "dynamic" if linear.act.scale is None else "static"
    )
    per_channel = not isinstance(weight, QuantizedWeight) or weight.group_size == weight.k
    return LayerRecord(
        name=linear.name,
        kind=target.kind,
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
        activation_error=target.activation_error,
        error=target.error,
    )


def _provenance(source: Source, architecture: str, calibration: Calibration, calibrated: CalibrationSet) -> Provenance:
    return Provenance(
        source=source.name,
        revision=source.revision,
        architecture=architecture,
        source_files={file.name: hash_file(file) for file in sorted(source.path.iterdir())
                      if file.suffix in (".json", ".safetensors")},
        calibration=calibrated.tokens,
        num_samples=calibration.num_samples,
        sample_length=calibrated.sample_length,
        lengths=calibrated.lengths,
        seed=calibration.seed,
        fptq_version=__version__,
    )


class _StreamedBlocks:
    """Blocks that are loaded when they are reached: a pass over a model that does not fit in memory as floats."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def __iter__(self) -> Iterator[Block]:
        for index in range(self._checkpoint.model_config.num_layers):
            yield prepare_block(load_block(self._checkpoint, index), ReferenceBackend())


def _golden(directory: Path, prompt: Sequence[int]) -> dict[str, object]:
    """From the tensors as written, so that they are read back once before anybody else does."""
    checkpoint, backend = Checkpoint(directory), ReferenceBackend()
    stem, head = load_stem(checkpoint), load_head(checkpoint)
    decoder = Decoder(
        checkpoint.model_config,
        prepare_stem(stem, backend),
        _StreamedBlocks(checkpoint),
        prepare_head(head, backend),
    )
    return compute_golden(decoder, backend, prompt)
