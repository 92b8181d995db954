"""What to do next, from an analysis: the rules are few, and each says the numbers that it decides on."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from fptq_runtime.quantizer.recipe import PRESETS
from fptq_runtime.quantizer.report import quantize_command

GOOD = 0.01  # a loss that nobody notices
BAD = 0.05  # a loss that rounding alone seldom mends
FEW = 0.15  # of all linears
MOST = 0.5  # of the divergence
NOTABLE = 0.05  # a relative difference worth a word
OUTLIER = 20.0  # largest channel to median channel
STRONGEST = ("fptq-best", "fptq")
FOR_INPUTS = ("fptq-best", "fptq", "os+", "rtn-dynamic")

Data = Mapping[str, Any]


def advise(data: Data, recipe: str | None = None) -> dict[str, Any]:
    """verdict: a sentence. path: the questions of the workflow that were asked, each with its answer, and where they
    led. reasons: what else the numbers say. keep: `Weights.keep` for the linears that cost most. next_recipe: a preset,
    or None. qat: whether quantization-aware training is worth its time. commands: what to run next, in a shell.

    recipe: how the user named it, where that is not its own name but a file.
    """
    loss, share = loss_of(data), weights_share(data)
    ranking, few = rank(data)
    concentrated = few is not None and len(few) <= max(1, FEW * len(ranking))
    outcome = (
        "serve" if loss <= GOOD else "keep" if concentrated else "inputs" if share < 0.5
        else "weights" if loss <= BAD else "qat"
    )
    current = data["recipe"]["name"]
    following = None if outcome == "serve" else _next(current, FOR_INPUTS if share < 0.5 else STRONGEST)
    keep = _keep(data, few or []) if outcome != "serve" else {}
    return {
        "outcome": outcome, "loss": loss, "weights_share": share,
        "verdict": _verdict(outcome, loss, few or [], following, current),
        "path": _path(loss, concentrated, few or [], ranking, share, outcome),
        "reasons": [*_kinds(data), *_keeping(few, ranking, data), *_outliers(data), *_calibration(data), _qat(
            loss, share, outcome, following)],
        "keep": keep, "next_recipe": following, "qat": outcome == "qat",
        "commands": [] if outcome == "serve" else _commands(data["model"], recipe or current, following,
                                                            outcome == "qat"),
    }


def _commands(model: str, recipe: str, following: str | None, qat: bool) -> list[str]:
    commands = []
    if following:
        commands.append(f"fptq compare {shlex.quote(model)} --recipes {shlex.quote(f'{recipe},{following}')}")
    if qat:
        commands.append(quantize_command(model, "qat", "qat"))
    return [*commands, f"{quantize_command(model, recipe, 'max-loss')} --max-loss 1%"]


def loss_of(data: Data) -> float:
    """What a perplexity rises by: measured, or as the divergence foretells on text that the model itself would write,
    whichever is more. On little text the first is noisy, and may well fall."""
    measured = data["quantized"]["perplexity"] / data["float"]["perplexity"] - 1
    return float(max(measured, math.expm1(min(data["quantized"]["kl"], 20.0))))


def weights_share(data: Data) -> float:
    """Of the divergence that weights alone and inputs alone make."""
    weights, inputs = data["parts"]["weights"]["kl"], data["parts"]["activations"]["kl"]
    return float(weights / max(weights + inputs, 1e-12))


def rank(data: Data) -> tuple[list[tuple[str, float]], list[str] | None]:
    """Linears (or layers, where only these were measured) with their own divergence, the worst first, and the fewest
    that make half of the sum."""
    if data["linears"]:
        parts = [(f"{row['layer']}.{row['kind']}", row["kl"]) for row in data["linears"]]
    else:
        parts = [(str(layer), row["kl"]) for layer, row in enumerate(data["one_only"]["layers"])]
    ranking = sorted(parts, key=lambda part: -part[1])
    total, so_far, few = sum(kl for _, kl in ranking), 0.0, []
    for name, kl in ranking:
        if so_far >= MOST * total:
            break
        few.append(name)
        so_far += kl
    return ranking, few if total > 0 else None


def _next(current: str, candidates: Sequence[str]) -> str | None:
    known = {preset.name for preset in PRESETS}
    return next((name for name in candidates if name in known and name != current), None)


def _verdict(outcome: str, loss: float, few: Sequence[str], following: str | None, current: str) -> str:
    recipe = f"the recipe {following}" if following else "a recipe with GPTQ and smaller groups"
    return {
        "serve": f"Serve it: {current} costs {loss:.1%}, which post-training quantization need not improve.",
        "keep": f"Keep {_list(few)} in 8 bits: half of the damage is done there.",
        "inputs": f"The 8-bit inputs do more damage than the 4-bit weights: try {recipe} next.",
        "weights": f"The 4-bit weights do most of the damage, evenly: try {recipe} next.",
        "qat": f"{loss:.0%} is much, and it is spread over all weights: try {recipe}, then train for it (QAT).",
    }[outcome]


def _path(loss: float, concentrated: bool, few: Sequence[str], ranking: Sequence[Any], share: float, outcome: str
          ) -> list[dict[str, Any]]:
    """The workflow's questions in order, with the numbers they were answered by; those not asked have no answer."""
    few_of = f"{len(few)} of {len(ranking)}" if ranking else "not measured"
    asked: list[tuple[str, str, str, bool, str, str]] = [
        ("loss", f"Loss at most {GOOD:.0%}?", f"{loss:.1%}", loss <= GOOD, "serve", "Serve it"),
        ("few", "Do few make half of it?", few_of, concentrated, "keep", "Keep these in 8 bits"),
        ("inputs", "More from inputs than weights?", f"inputs {1 - share:.0%}", share < 0.5, "inputs",
         "Tame the inputs"),
        ("large", f"Loss at most {BAD:.0%}?", f"{loss:.1%}", loss <= BAD, "weights", "Round better"),
    ]
    path, open_ = [], True
    for key, question, measured, yes, leaf, action in asked:
        path.append({"question": question, "measured": measured, "asked": open_, "yes": open_ and yes, "leaf": leaf,
                     "action": action, "key": key})
        open_ = open_ and not yes
    path.append({"question": "", "measured": "", "asked": open_, "yes": open_, "leaf": "qat", "key": "qat",
                 "action": "Train for it (QAT)"})
    return path


def _kinds(data: Data) -> list[str]:
    kinds = data["one_only"]["kinds"]
    if not kinds:
        return []
    worst = max(kinds, key=lambda kind: kinds[kind]["kl"])
    total = sum(row["kl"] for row in kinds.values())
    return [f"Of the kinds of linear, {worst} costs most: alone it makes {kinds[worst]['kl']:.4f} nats of divergence, "
            f"{kinds[worst]['kl'] / max(total, 1e-12):.0%} of what all make one by one."]


def _keeping(few: Sequence[str] | None, ranking: Sequence[Any], data: Data) -> list[str]:
    if not few or not data["linears"]:
        return []
    return [f"{len(few)} of {len(ranking)} linears make half of the divergence: {_list(few[:8])}"
            f"{' …' if len(few) > 8 else ''}. fptq quantize --max-loss spends bytes on them first."]


def _outliers(data: Data) -> list[str]:
    rows = data["activations"]
    if not rows:
        return []
    wide = [row for row in rows if row["range_before"] > OUTLIER * max(row["median_before"], 1e-9)]
    said = []
    if wide:
        tamed = sum(row["range_after"] <= OUTLIER * max(row["median_after"], 1e-9) for row in wide)
        said.append(f"{len(wide)} of {len(rows)} inputs have a channel over {OUTLIER:.0f} times their median one; the "
                    f"recipe tames {tamed} of them.")
    if spiked := [f"layer {row['layer']} {row['kind']}" for row in rows if row.get("spiked")]:
        said.append(f"Massive activations at the first token: {', '.join(spiked[:8])}"
                    f"{' …' if len(spiked) > 8 else ''}. No static scale suits them and other tokens alike: they need "
                    "scales per token.")
    first = sum(row["peak_position"] == 0 for row in rows)
    if first > len(rows) / 4:
        said.append(f"The first token sets the maximum of {first} of {len(rows)} inputs: calibrate with it exactly as "
                    "it is served, or go per token there.")
    return said


def _calibration(data: Data) -> list[str]:
    said = []
    sizes = [row for row in data["sizes"] if "kl" in row]
    if len(sizes) > 1:
        best, worst = min(sizes, key=lambda row: row["kl"]), max(sizes, key=lambda row: row["kl"])
        if worst["kl"] > (1 + NOTABLE) * best["kl"]:
            said.append(f"The number of calibration samples matters: {best['samples']} give {best['kl']:.4f} nats, "
                        f"{worst['samples']} give {worst['kl']:.4f}.")
        else:
            said.append(f"{sizes[0]['samples']} calibration samples are enough: more change the divergence by less "
                        f"than {NOTABLE:.0%}.")
    ranges = {row["method"]: row["kl"] for row in data["ranges"] if "kl" in row}
    if "minmax" in ranges:
        best_method = min(ranges, key=ranges.__getitem__)
        if ranges["minmax"] > (1 + NOTABLE) * ranges[best_method]:
            said.append(f"range: {best_method} in the recipe lowers the divergence from {ranges['minmax']:.4f} "
                        f"(minmax) to {ranges[best_method]:.4f} nats.")
        else:
            said.append("No way of choosing static ranges is notably better than minmax here.")
    return said


def _qat(loss: float, share: float, outcome: str, following: str | None) -> str:
    if outcome == "qat":
        return (f"QAT is worth it if {following or 'a stronger recipe'} leaves more than {BAD:.0%}: {share:.0%} of the "
                "damage comes from weights, which training can move.")
    if loss <= GOOD:
        return "QAT is not worth its time here."
    return f"QAT is the last resort: first do what is cheaper, and measure again whether more than {BAD:.0%} is left."


def _keep(data: Data, few: Sequence[str]) -> dict[str, int]:
    """Patterns for `Weights.keep`; whole layers where only layers were measured."""
    modules = {f"{row['name'].removeprefix('layers.')}": row["modules"] for row in data["quantization"]}
    if data["linears"]:
        return {modules[name][0]: 8 for name in few}
    return {row["modules"][0]: 8 for row in data["quantization"]
            if row["name"].split(".")[1:2] and row["name"].split(".")[1] in few and row["kind"] != "head"}


def _list(names: Sequence[str]) -> str:
    shown = [f"layer {name.replace('.', ' ')}" if name.isdigit() else name for name in names[:8]]
    return ", ".join(shown)
