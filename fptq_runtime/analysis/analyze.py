"""Where a recipe hurts a model and why: layer sensitivity, activation ranges, calibration, as one table of results that
grows on disk while it is measured."""

from __future__ import annotations

import hashlib
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from tqdm import tqdm

from fptq_runtime import __version__
from fptq_runtime.analysis.sensitivity import Loss, Probe, capture
from fptq_runtime.artifact.io import Manifest, hash_file
from fptq_runtime.errors import FptqError
from fptq_runtime.kernels.base import QuantizedWeight
from fptq_runtime.kernels.reference import dequantized
from fptq_runtime.models.block import Model
from fptq_runtime.models.loader import Checkpoint
from fptq_runtime.models.tensors import weight_files
from fptq_runtime.models.tokenizer import Tokenizer
from fptq_runtime.progress import progress_bar
from fptq_runtime.quantizer.calibrate import HiddenStates, InputStats, Text, observe_block
from fptq_runtime.quantizer.evaluate import text_windows
from fptq_runtime.quantizer.pipeline import open_float
from fptq_runtime.quantizer.ranges import RangeMethod
from fptq_runtime.quantizer.recipe import Recipe
from fptq_runtime.quantizer.samples import Calibration, CalibrationSet
from fptq_runtime.quantizer.walk import float_part, float_stem

STUDIES = ("one-only", "linears", "leave-one-out", "cumulative", "activations", "sizes", "ranges")
QUICK = ("one-only", "activations")
SIZES = (100, 200, 500)  # samples
JOURNAL = "analysis.jsonl"
EXPONENTS = tuple(range(-12, 13))  # the histograms' bins: |x| from 2^-12 to 2^12


class AnalysisError(FptqError):
    """An analysis that cannot start. One line, for the user."""


@dataclass(frozen=True)
class Unit:
    """One result: its key in the journal, its cost in passes of a block over the text, and how to get it."""

    key: str
    passes: float
    measure: Callable[[Probe], Any]


class Journal:
    """Results as they come, a JSON line each; the first line says what they are results of."""

    def __init__(self, path: Path, subject: Mapping[str, Any], overwrite: bool = False) -> None:
        """Goes on where a run of the same subject stopped. Raises AnalysisError where the file has another one."""
        self._path = path
        self.results: dict[str, Any] = {}
        first = json.dumps({"subject": subject}, sort_keys=True)
        lines = path.read_text("utf-8").split("\n")[:-1] if path.is_file() and not overwrite else []
        if lines and lines[0] != first:
            raise AnalysisError(f"{path} holds an analysis of another model or of other settings; choose another "
                                "--out, or --overwrite it")
        for line in lines[1:]:  # without what was being written when a run was interrupted
            entry = json.loads(line)
            self.results[entry["key"]] = entry["result"]
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = path.with_name(f"{path.name}.part")
        whole.write_text("".join(f"{line}\n" for line in (first, *lines[1:])), "utf-8")
        whole.replace(path)

    def put(self, key: str, result: Any) -> None:
        self.results[key] = result
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, "result": result}) + "\n")


def analyze(
    model: str | Path, recipe: Recipe, text: Text, out: Path, *, name: str | None = None,
    calibration: Calibration = Calibration(), max_tokens: int = 4096, studies: Sequence[str] = STUDIES,
    sizes: Sequence[int] = SIZES, overwrite: bool = False, progress: bool = False,
) -> dict[str, Any]:
    """Measure the studies on the text's first max_tokens tokens and return all results, those of an interrupted run in
    out/analysis.jsonl included.

    Hidden states at every block boundary are kept, in float and quantized, so that a variant runs from the block where
    it begins to differ. Keys and values stay in float here: what the cache costs belongs to no layer. Raises
    FptqError.
    """
    source, checkpoint = open_float(model, "analyze the float model it was made from")
    layers = _linears(checkpoint.model)
    tokenizer = Tokenizer(source.path)
    windows = text_windows(text, tokenizer, checkpoint.model_config.max_position_embeddings, max_tokens)
    subject = {
        "version": __version__, "model": hash_file(source.path / "config.json"),
        "weights": [(file.name, file.stat().st_size, file.stat().st_mtime_ns)
                    for file in weight_files(source.path)],
        "recipe": hashlib.sha256(recipe.model_dump_json().encode()).hexdigest(), "text": text.sha256,
        "tokens": max_tokens, "calibration": {name: hash_file(value) if isinstance(value, Path) else value
                                              for name, value in asdict(calibration).items()},
    }
    journal = Journal(out / JOURNAL, json.loads(json.dumps(subject)), overwrite)
    study = _Study(str(model), checkpoint, tokenizer, recipe, windows, calibration, sizes, journal, progress)
    missing = [unit for unit in study.plan(studies) if unit.key not in journal.results]
    with progress_bar(total=sum(unit.passes for unit in missing), desc="analyzing", unit="pass",
                      shown=progress and bool(missing), counts=False) as bar:
        study.run(missing, bar, quick={*studies} <= {*QUICK})
    results = journal.results
    return {
        "model": name or source.name, "version": __version__, "recipe": recipe.model_dump(mode="json"),
        "text": text.name, "text_sha256": text.sha256, "tokens": sum(len(window) - 1 for window in windows),
        "calibration": results["manifest"]["provenance"]["calibration"]["name"],
        "num_samples": calibration.num_samples, "seed": calibration.seed, "layers": len(layers),
        "studies": [each for each in STUDIES if _whole(results, each, layers, sizes)],
        "float": results["float"], "quantized": results["all"],
        "parts": {"weights": results["weights"], "activations": results["inputs"]},
        "one_only": _by(results, "one-only", layers), "leave_one_out": _by(results, "leave-one-out", layers),
        "linears": [{"layer": int(layer), "kind": kind, **row} for key, row in _whole(
            results, "linears", layers, sizes).items() for _, layer, kind in [key.split("/")]],
        "cumulative": list(_whole(results, "cumulative", layers, sizes).values()),
        "activations": [row for rows in _whole(results, "activations", layers, sizes).values() for row in rows],
        "quantization": results["manifest"]["layers"], "bytes": results["manifest"]["bytes"],
        "active_bytes": results["manifest"].get("active_bytes"),
        "sizes": [{"samples": size, **results[f"sizes/{size}"]} for size in sizes if f"sizes/{size}" in results],
        "ranges": [{"method": method, **results[f"ranges/{method}"]} for method in get_args(RangeMethod)
                   if f"ranges/{method}" in results],
    }


class _Study:
    def __init__(self, model: str, checkpoint: Checkpoint, tokenizer: Tokenizer, recipe: Recipe,
                 windows: Sequence[Sequence[int]], calibration: Calibration, sizes: Sequence[int], journal: Journal,
                 progress: bool) -> None:
        self._model = model
        self._checkpoint = checkpoint
        self._tokenizer = tokenizer
        self._recipe = recipe
        self._windows = windows
        self._calibration = calibration
        self._sizes = sizes
        self._journal = journal
        self._progress = progress
        self._drawn: dict[Calibration, CalibrationSet] = {}
        self._layers = len(checkpoint.model.blocks)
        self._linears = _linears(checkpoint.model)
        self._source: HiddenStates | None = None
        self._reached = 0

    def plan(self, studies: Sequence[str]) -> list[Unit]:
        """What is measured, the cheap and telling first."""
        layers = range(self._layers)
        total = float(self._layers)

        def passes(start: int) -> float:
            return max(1.0, total - start)

        kinds = _kinds(self._linears)

        def kind_passes(kind: str) -> float:
            return 1.0 if kind == "head" else total

        def calls(method: Callable[..., Loss], *arguments: Any) -> Callable[[Probe], Any]:
            return lambda probe: asdict(method(probe, *arguments))

        by_study: dict[str, list[Unit]] = {
            "one-only": [
                *(Unit(f"one-only/{kind}", kind_passes(kind), calls(Probe.only_kind, kind)) for kind in kinds),
                *(Unit(f"one-only/{layer}", passes(layer), calls(Probe.only, layer)) for layer in layers),
            ],
            "activations": [Unit(f"activations/{layer}", 3, self._observe(layer)) for layer in layers],
            "linears": [Unit(f"linears/{layer}/{kind}", passes(layer), calls(Probe.only, layer, (kind,)))
                        for layer in layers for kind in self._linears[layer]],
            "cumulative": [Unit(f"cumulative/{layer}", passes(layer + 1), calls(Probe.up_to, layer))
                           for layer in layers],
            "leave-one-out": [
                *(Unit(f"leave-one-out/{kind}", kind_passes(kind), calls(Probe.all_but_kind, kind)) for kind in kinds),
                *(Unit(f"leave-one-out/{layer}", passes(layer), calls(Probe.all_but, layer)) for layer in layers),
            ],
            "ranges": [self._again(f"ranges/{method}", _with_range(self._recipe, method), self._calibration)
                       for method in get_args(RangeMethod) if _chooses_ranges(self._recipe)],
            "sizes": [self._again(f"sizes/{size}", self._recipe, replace(self._calibration, num_samples=size))
                      for size in self._sizes],
        }
        return [
            Unit("all", total, calls(Probe.all)),
            Unit("weights", total, calls(Probe.part, True, False)),
            Unit("inputs", total, calls(Probe.part, False, True)),
            *(unit for study in by_study if study in studies for unit in by_study[study]),
        ]

    def run(self, units: Sequence[Unit], bar: tqdm[Any], quick: bool) -> None:
        """Measure what the journal does not have. A unit's passes are counted when it is through. quick: there is
        nothing that takes less time to point to."""
        if not units and "manifest" in self._journal.results:
            return
        calibrated = self._draw(self._calibration)
        own = self._walk_passes(self._calibration) + self._layers
        bar.total = own + sum(unit.passes for unit in units)
        bar.set_description("quantizing")
        model, manifest = capture(self._model, self._recipe, self._windows, calibrated)
        probe = Probe(model, self._windows)
        bar.update(own)
        self._journal.put("manifest", _summary(manifest))
        self._journal.put("float", {"perplexity": probe.original})
        if not any(unit.key == "all" for unit in units):  # its states are what some start from
            probe.all()
        started, done = time.monotonic(), 0.0
        for unit in units:
            bar.set_description(unit.key)
            self._journal.put(unit.key, unit.measure(probe))
            bar.update(unit.passes)
            done += unit.passes
            if unit.key == "inputs" and bar.total:
                seconds = (time.monotonic() - started) / done * (sum(unit.passes for unit in units) - done)
                bar.write(f"about {_minutes(seconds)} for {len(units)} measurements; results are kept as they come"
                          + ("" if quick else ", --quick measures fewer"), file=sys.stderr)

    def _draw(self, calibration: Calibration) -> CalibrationSet:
        """Once for all that is calibrated alike."""
        if calibration not in self._drawn:
            self._drawn[calibration] = calibration.draw(self._checkpoint, self._tokenizer, self._recipe.reads_inputs,
                                                        self._progress)
        return self._drawn[calibration]

    def _walk_passes(self, calibration: Calibration) -> float:
        """The quantizer's walk in passes over the measured text: observing, searching and running on, roughly."""
        tokens = calibration.num_samples * calibration.length(self._checkpoint.model_config.max_position_embeddings)
        return 4 * self._layers * tokens / sum(map(len, self._windows))

    def _again(self, key: str, recipe: Recipe, calibration: Calibration) -> Unit:
        """The loss of a model quantized otherwise, on the same text; an error where it cannot be."""
        def measure(probe: Probe) -> dict[str, Any]:
            started = time.monotonic()
            try:
                model, _ = capture(self._model, recipe, self._windows, self._draw(calibration))
            except FptqError as error:
                return {"error": " ".join(str(error).split())}
            seconds = time.monotonic() - started
            return {**asdict(Probe(model, self._windows, logits=probe.logits).all()), "seconds": seconds}
        return Unit(key, self._walk_passes(calibration), measure)

    def _observe(self, layer: int) -> Callable[[Probe], list[dict[str, Any]]]:
        def measure(probe: Probe) -> list[dict[str, Any]]:
            return _activations(layer, self._before(layer), probe)
        return measure

    def _before(self, layer: int) -> Mapping[str, InputStats]:
        """The inputs in the model as it came. Layers are asked for in order, so that each is run once."""
        if self._source is None or self._reached > layer:
            self._source = HiddenStates(self._checkpoint.model, self._windows)
            self._source.run_stem(float_stem(self._checkpoint))
            self._reached = 0
        for index in range(self._reached, layer):
            self._source.run_block(float_part(self._checkpoint, index))
        self._reached = layer
        return observe_block(self._source, float_part(self._checkpoint, layer))


def _activations(layer: int, before: Mapping[str, InputStats], probe: Probe) -> list[dict[str, Any]]:
    """The inputs of a layer's linears on the measured text, as they came and after the transforms, and the error of
    its weights."""
    probe.states.states = list(probe.exact[layer])
    exact = probe.model.exact[layer]
    after = observe_block(probe.states, exact)
    rows = []
    for kind in exact.spec.quantizable:
        was, now = before[kind], after[kind]
        rows.append({
            "layer": layer, "kind": kind, "range_before": was.range, "range_after": now.range,
            "median_before": float(was.amax.median()), "median_after": float(now.amax.median()),
            "peak_position": was.peak_position, "spiked": was.spiked, "histogram_before": _histogram(was.sample),
            "histogram_after": _histogram(now.sample),
            "weight_error": _weight_error(exact.linears[kind].weight,
                                          probe.model.quantized[layer].linears[kind].weight),
        })
    return rows


def _histogram(sample: torch.Tensor) -> list[float]:
    """Shares of |x| by power of two; zeros and what is smaller count to the first bin, what is larger to the last."""
    exponents = sample.abs().clamp_min(2.0 ** EXPONENTS[0]).log2().floor().clamp(EXPONENTS[0], EXPONENTS[-1] - 1)
    counts = torch.histc(exponents, len(EXPONENTS) - 1, EXPONENTS[0], EXPONENTS[-1] - 1)
    return [round(float(count) / sample.numel(), 7) for count in counts]


def _weight_error(exact: torch.Tensor, stored: Any) -> float:
    """|W - Ŵ|² / |W|²"""
    read = dequantized(stored) if isinstance(stored, QuantizedWeight) else stored.float()
    return float((exact - read).square().sum() / exact.square().sum().clamp_min(1e-30))


def _chooses_ranges(recipe: Recipe) -> bool:
    """Some step can choose static ranges, and none says that all inputs are per token or float."""
    return any("range" in type(step).model_fields for step in recipe.steps) and not any(
        getattr(step, "scheme", None) in ("dynamic", "float") for step in recipe.steps)


def _with_range(recipe: Recipe, method: str) -> Recipe:
    steps = tuple(step.model_copy(update={"range": method}) if "range" in type(step).model_fields else step
                  for step in recipe.steps)
    return recipe.model_copy(update={"steps": steps})


def _summary(manifest: Manifest) -> dict[str, Any]:
    layers = [layer.model_dump(mode="json", include={
        "name", "kind", "modules", "range", "peak_position", "equalized", "activations", "reason", "num_bits",
        "group_size", "activation_error", "error"}) for layer in manifest.layers]
    return {"layers": layers, "bytes": manifest.size, "active_bytes": manifest.active_size,
            "provenance": {"calibration": manifest.provenance.calibration.model_dump(mode="json")}}


def _linears(model: Model) -> list[tuple[str, ...]]:
    """The names of each layer's linears that are quantized."""
    return [block.quantizable for block in model.blocks]


def _kinds(linears: Sequence[tuple[str, ...]]) -> list[str]:
    """Names of linears that layers share, and the head."""
    return [*dict.fromkeys(name for names in linears for name in names), "head"]


def _by(results: Mapping[str, Any], study: str, linears: Sequence[tuple[str, ...]]) -> dict[str, Any]:
    whole = _whole(results, study, linears, ())
    return {
        "layers": [whole[f"{study}/{layer}"] for layer in range(len(linears)) if whole],
        "kinds": {kind: whole[f"{study}/{kind}"] for kind in _kinds(linears) if whole},
    }


def _whole(results: Mapping[str, Any], study: str, linears: Sequence[tuple[str, ...]],
           sizes: Sequence[int]) -> dict[str, Any]:
    """A study's results by key where it is complete, else nothing: half a study misleads."""
    layers, kinds = range(len(linears)), _kinds(linears)
    keys = {
        "linears": [f"linears/{layer}/{kind}" for layer in layers for kind in linears[layer]],
        "sizes": [f"sizes/{size}" for size in sizes], "ranges": [f"ranges/{name}" for name in get_args(RangeMethod)],
        "one-only": [f"one-only/{name}" for name in (*kinds, *layers)],
        "leave-one-out": [f"leave-one-out/{name}" for name in (*kinds, *layers)],
    }.get(study, [f"{study}/{layer}" for layer in layers])
    return {key: results[key] for key in keys} if all(key in results for key in keys) else {}


def _minutes(seconds: float) -> str:
    if seconds < 90:
        return f"{math.ceil(seconds)} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
