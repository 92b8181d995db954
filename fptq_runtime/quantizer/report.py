"""An artifact's manifest for a person."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from fptq_runtime.artifact.io import LayerRecord, Manifest, Provenance, TextRecord, format_size

NOTABLE = 0.05  # a loss that few uses tolerate unseen, and a better recipe often mends
TRAINING = {"qat", "distill"}  # steps
SEVERE = 0.2  # more than a model of half the size loses (Llama 2: 4.88 with 13 billion weights, 5.47 with 7)

ORDER = ("static", "{}+static", "dynamic", "{}+dynamic", "fp8 static", "fp8 dynamic", "float")


def policy(record: LayerRecord, scaled: str = "scaled") -> str:
    """How a layer's input is quantized, as the policy table says it. scaled: what to call channels that were divided
    by a scale before, for free."""
    return f"{scaled}+" * record.equalized + "fp8 " * (record.input_type == "float") + record.activations


def _scaled(manifest: Manifest) -> str:
    """FPTQ's scaling has a name of its own."""
    return "lae" if any(step["type"] == "fptq" for step in manifest.recipe["steps"]) else "scaled"


def summarize(manifest: Manifest, model: str | None = None, recipe: str | None = None) -> str:
    """What quantization did and cost: perplexity before and after, the policy table and the size; where it cost too
    much, that it did and what to do next. model and recipe: as the user named them, where that is known."""
    quality = manifest.quality
    change = perplexity_loss(manifest)
    return "\n".join((
        f"perplexity {quality.perplexity_before:.3f} before, {quality.perplexity_after:.3f} after ({change:+.2%}) on "
        f"{text_name(quality.text)}, windows of {quality.window}",
        "",
        *_policy_table(manifest.layers, _scaled(manifest)),
        *_experts(manifest),
        *_first_token_warning(manifest.layers),
        *_group_warning(manifest),
        "",
        f"size {format_size(manifest.size)} in {len(manifest.files)} files"
        + f", of which a token reads {format_size(manifest.active_size)} at most" * (manifest.idle_bytes > 0),
        *_loss_warning(manifest, model or _source(manifest), recipe or manifest.recipe["name"]),
    ))


def _source(manifest: Manifest) -> str:
    """A hub id; where a directory was is not recorded."""
    source = manifest.provenance.source
    return source if "/" in source else "MODEL"


def perplexity_loss(manifest: Manifest) -> float:
    return manifest.quality.perplexity_after / manifest.quality.perplexity_before - 1


def _loss_warning(manifest: Manifest, model: str, recipe: str) -> list[str]:
    """Last, where it is read first."""
    loss, made = perplexity_loss(manifest), manifest.provenance
    if loss <= NOTABLE:
        return []
    said = f"note: perplexity rose by {loss:.1%}, which may be noticed" + (
        f"; {made.num_samples} calibration samples are few" if 0 < made.num_samples < 16 else "")
    if loss > SEVERE:
        said = (f"warning: perplexity rose by {loss:.0%}, more than what a model of half the size loses: this will be "
                "noticed, do not serve it as it is")
    stronger = stronger_recipe(manifest)
    steps = [] if stronger is None else [f"{quantize_command(model, stronger, stronger)}  # may lose less"]
    if stronger == "fptq-best":
        steps.append(f"{quantize_command(model, 'w8a8-dynamic', 'w8a8-dynamic')}  # 8 bits: larger, and loses little")
    trained = {step["type"] for step in manifest.recipe["steps"]} & TRAINING
    alike = "fptq-best" if trained else recipe  # training has no parts that a layer could be blamed for
    steps.append(f"fptq analyze {shlex.quote(model)} --recipe {shlex.quote(alike)}  # which layers lose it, and why")
    if min(layer.num_bits for layer in manifest.layers) < 16:
        steps.append(f"{quantize_command(model, alike, 'max-loss')} --max-loss 5%  # more bits where they gain most")
    return ["", said, "next, one of:", *(f"  {step}" for step in steps)]


def quantize_command(model: str, recipe: str, suffix: str) -> str:
    """For a shell, into a directory that is named after the model."""
    out = f"{Path(model).resolve().name}-{suffix}"
    return f"fptq quantize {shlex.quote(model)} {shlex.quote(out)} --recipe {shlex.quote(recipe)}"


def stronger_recipe(manifest: Manifest) -> str | None:
    """The preset that loses less than what was done: of 4-bit weights with 8-bit inputs the best one, then 8-bit
    weights with inputs per token."""
    bits = Counter(layer.num_bits for layer in manifest.layers if layer.kind != "head").most_common(1)[0][0]
    activations = {layer.activations for layer in manifest.layers if layer.kind != "head"}
    if bits == 4:
        best = activations == {"float"} or manifest.recipe["name"] in ("fptq-best", "fptq-max")
        return "w8a8-dynamic" if best else "fptq-best"
    return "w8a8-dynamic" if bits == 8 and "static" in activations else None


def _experts(manifest: Manifest) -> list[str]:
    """Of a mixture of experts: whether tokens still go where they went, and what calibration did not reach."""
    routing, lines = manifest.quality.routing, []
    if routing:
        least = min(routing, key=routing.__getitem__)
        lines += ["", f"{sum(routing.values()) / len(routing):.1%} of the experts that tokens go to are the float "
                  f"model's; in {least}, the least, {routing[least]:.1%}"]
    unseen = [f"{layer.name} {', '.join(map(str, layer.unseen))}" for layer in manifest.layers if layer.unseen]
    if unseen:
        count = sum(len(layer.unseen) for layer in manifest.layers)
        lines += ["", f"warning: no calibration token reached {count} of the experts' linears, which were rounded "
                  f"without data: {'; '.join(unseen)}; calibrate on more samples"]
    return lines


def _group_warning(manifest: Manifest) -> list[str]:
    """Where 4-bit weights were to have a scale a group, and have one a row."""
    if all(step.get("group_size") is None for step in manifest.recipe["steps"]):
        return []
    four = [layer for layer in manifest.layers if layer.num_bits == 4]
    whole = [layer for layer in four if layer.group_size is None]
    if not whole:
        return []
    kinds = ", ".join(dict.fromkeys(layer.kind for layer in whole))
    return ["", f"note: {len(whole)} of {len(four)} linears with 4-bit weights ({kinds}) have one scale a row, since "
            "no group divides their rows; they lose more so, and --max-loss gives them 8 bits where it shows"]


def inspect_text(manifest: Manifest) -> str:
    """`summarize`, and where the artifact comes from, its recipe, and every layer."""
    made = manifest.provenance
    revision = f" at {made.revision}" if made.revision else ""
    return "\n".join((
        f"model       {made.source}{revision} ({made.architecture})",
        f"made by     fptq {made.fptq_version}, seed {made.seed}",
        f"calibration {calibration_text(made)}",
        f"recipe      {manifest.recipe['name']}",
        *(f"  {step_text(step)}" for step in manifest.recipe["steps"]),
        "",
        summarize(manifest),
        "",
        _peaks(manifest.layers),
        "",
        *_layer_table(manifest.layers, _scaled(manifest)),
        "",
        *_legend(manifest),
    ))


def _legend(manifest: Manifest) -> list[str]:
    """What the tables' words mean, as far as they occur."""
    scaled, layers = _scaled(manifest), manifest.layers
    activations = {layer.activations for layer in layers}
    words = [
        ("static", "static" in activations, "the input has one scale for all tokens, which calibration set"),
        ("dynamic", "dynamic" in activations, "the input has a scale of its own for each token"),
        (scaled, any(layer.equalized for layer in layers),
         "channels of the input are divided by scales, by which the weights are multiplied"),
        ("v", any(layer.reason.startswith("v") for layer in layers),
         "the range; the recipe's v0 and v1 decide between static, lae+static and dynamic, unless that errs too much"),
        ("range", True, "the largest |input| in calibration, and at which token of its sample"),
        ("errors", True, "squared, relative to the float output: of rounding the input alone, and of the weights too"),
    ]
    return _align([[word, meaning] for word, occurs, meaning in words if occurs])


def calibration_text(made: Provenance) -> str:
    return f"{text_name(made.calibration)}, {_samples(made)}"


def _samples(made: Provenance) -> str:
    if made.lengths is None:
        return f"{made.num_samples} samples of {made.sample_length}"
    lengths = made.lengths
    least, low, median, high, most = lengths.quantiles
    clipped = f", {lengths.clipped:.0%} of which exceed the context" if lengths.clipped else ""
    return (f"{lengths.windows} samples of {least} to {most} (10 %: {low}, median {median}, 90 %: {high}) as in "
            f"{lengths.name} (sha256 {lengths.sha256[:12]}){clipped}")


def _peaks(layers: Sequence[LayerRecord]) -> str:
    """Which token positions set the ranges, the commonest first."""
    counts = Counter(layer.peak_position for layer in layers).most_common()
    shown = [f"{position} ({count})" for position, count in counts[:6]] + ["…"] * (len(counts) > 6)
    return f"ranges are set at positions (layers) {', '.join(shown)}"


def _first_token_warning(layers: Sequence[LayerRecord]) -> list[str]:
    """Where the first token alone makes most static ranges as wide as they are."""
    static = [layer for layer in layers if layer.activations == "static"]
    first = sum(layer.peak_position == 0 for layer in static)
    if 2 * first <= len(static):
        return []
    return ["", f"warning: the first token of a sample sets {first} of {len(static)} static ranges, which are too wide "
            "for all others; calibrate with BOS as it is served, or use a range that clips or per-token inputs"]


def _policy_table(layers: Sequence[LayerRecord], scaled: str) -> list[str]:
    """One row a kind of layer, one column a policy in use."""
    counts = Counter((layer.kind, policy(layer, scaled)) for layer in layers)
    names = [name.format(scaled) for name in ORDER]
    shown = [name for name in names if name in names[:3] or any(key[1] == name for key in counts)]
    kinds = dict.fromkeys(layer.kind for layer in layers)
    rows = [["inputs", *shown, "weights"]]
    for kind in kinds:
        weights = dict.fromkeys(weights_text(layer) for layer in layers if layer.kind == kind)
        rows.append([kind, *(str(counts[kind, p]) for p in shown), ", ".join(weights)])
    return _align(rows)


def _layer_table(layers: Sequence[LayerRecord], scaled: str) -> list[str]:
    rows = [["layer", "range", "at token", "policy", "why", "weights", "input error", "output error", "modules"]]
    for layer in layers:
        own = layer.modules[: len(layer.modules) // layer.experts]
        modules = [own[0], *(module.rpartition(".")[2] for module in own[1:])]
        if layer.experts > 1:
            modules.append(f"of {layer.experts} experts")
        rows.append([layer.name, f"{layer.range:.2f}", str(layer.peak_position), policy(layer, scaled), layer.reason,
                     weights_text(layer), f"{layer.activation_error:.5f}", f"{layer.error:.5f}", " ".join(modules)])
    return _align(rows)


def _align(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def weights_text(layer: LayerRecord) -> str:
    if layer.num_bits == 16:
        return "float"
    number = "int" if layer.type == "int" else "fp"
    group = "per channel" if layer.group_size is None else f"group {layer.group_size}"
    return f"{number}{layer.num_bits} {group}" + f" + rank {layer.rank}" * (layer.rank > 0)


def step_text(step: dict[str, object]) -> str:
    settings = (f"{name}={value}" for name, value in step.items() if name != "type" and value not in ({}, None))
    return f"{step['type']}: {', '.join(settings)}"


def text_name(text: TextRecord) -> str:
    return f"{text.name} ({text.tokens} tokens, sha256 {text.sha256[:12]})"
