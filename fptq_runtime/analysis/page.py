"""An analysis as one HTML file: plots and styles inside, no script, nothing to fetch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined

from fptq_runtime.analysis import plots
from fptq_runtime.analysis.analyze import EXPONENTS, STUDIES
from fptq_runtime.artifact.io import format_size

Data = Mapping[str, Any]


def page(data: Data, advice: Data) -> str:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    template = resources.files("fptq_runtime.analysis").joinpath("page.html.j2").read_text("utf-8")
    quantization = {row["name"]: row for row in data["quantization"]}
    rows = []
    for row in data["activations"]:
        record = quantization[f"layers.{row['layer']}.{row['kind']}"]
        policy = f"equalized, {record['activations']}" if record["equalized"] else record["activations"]
        rows.append({**row, "name": f"{row['layer']} {row['kind']}", "policy": policy,
                     "num_bits": record["num_bits"], "error": record["error"]})
    return environment.from_string(template).render(
        data=data, advice=advice, rows=rows, style=plots.STYLE, font=plots.FONT, number=plots.number,
        change=100 * (data["quantized"]["perplexity"] / data["float"]["perplexity"] - 1),
        size=format_size(data["bytes"]), plots=_plots(data), flow=_flow(advice["path"]),
        histograms=_histograms(rows), absent=[study for study in STUDIES if study not in data["studies"]],
        recipe=yaml.safe_dump(data["recipe"], sort_keys=False).strip(),
    )


def _plots(data: Data) -> dict[str, str | None]:
    one, out, layers = data["one_only"], data["leave_one_out"], [str(i) for i in range(data["layers"])]
    total = data["quantized"]["kl"]
    drawn: dict[str, str | None] = dict.fromkeys(
        ("linears", "kinds", "kinds_out", "layers", "cumulative", "weight_error", "sizes", "ranges"))
    if data["linears"]:
        drawn["linears"] = _grid(data["linears"], "kl", layers, "nats")
    if one["kinds"]:
        drawn["kinds"] = plots.bars([_bar(kind, row["kl"]) for kind, row in one["kinds"].items()])
    if out["kinds"]:
        drawn["kinds_out"] = plots.bars([_bar(kind, max(0.0, total - row["kl"])) for kind, row in out["kinds"].items()])
    if one["layers"]:
        series = [("only this layer quantized", [row["kl"] for row in one["layers"]])]
        if out["layers"]:
            series.append(("gained when only this layer stays in float",
                           [max(0.0, total - row["kl"]) for row in out["layers"]]))
        drawn["layers"] = plots.lines(layers, series, "nats")
    if data["cumulative"]:
        drawn["cumulative"] = plots.lines(layers, [("", [row["kl"] for row in data["cumulative"]])], "nats")
    if data["activations"]:
        drawn["weight_error"] = _grid(data["activations"], "weight_error", layers, "")
    if data["sizes"]:
        drawn["sizes"] = plots.bars([_result(f"{row['samples']} samples", row) for row in data["sizes"]])
    if data["ranges"]:
        best = min((row for row in data["ranges"] if "kl" in row), key=lambda row: row["kl"], default=None)
        drawn["ranges"] = plots.bars([_result(row["method"], row) for row in data["ranges"]],
                                     [] if best is None else [best["method"]])
    return drawn


def _grid(rows: Sequence[Data], key: str, layers: Sequence[str], unit: str) -> str:
    values = {(row["kind"], row["layer"]): row[key] for row in rows}
    kinds = tuple(dict.fromkeys(kind for kind, _ in values))
    return plots.heatmap(kinds, layers, [[values.get((kind, i)) for i in range(len(layers))] for kind in kinds], unit)


def _bar(name: str, kl: float) -> tuple[str, float, str]:
    return name, kl, f"{plots.number(kl)} nats"


def _result(name: str, row: Data) -> tuple[str, float | None, str]:
    if "error" in row:
        return name, None, "refused"
    return name, row["kl"], f"{plots.number(row['kl'])} nats, perplexity {row['perplexity']:.3f}"


def _histograms(rows: Sequence[Data]) -> list[dict[str, Any]]:
    ordered = sorted(rows, key=lambda row: -row["range_before"] / max(row["median_before"], 1e-9))
    return [{
        "name": f"layer {row['layer']} {row['kind']}",
        "note": f"max {plots.number(row['range_before'])} → {plots.number(row['range_after'])}, {row['policy']}",
        "plot": plots.histograms(EXPONENTS, [("after the recipe's transforms", row["histogram_after"]),
                                             ("as the model came", row["histogram_before"])]),
    } for row in ordered]


def _flow(path: Sequence[Data]) -> str:
    """Questions downwards, what a yes leads to at their right; what was asked and where it ended stands out."""
    width, step, box = 640, 74, 250
    parts = []
    for index, node in enumerate(path):
        y = 8 + index * step
        on = "on" if node["asked"] else "off"
        ended = "on" if node["yes"] else "off"
        if not node["question"]:
            parts.append(_box(0, y, box, node["action"], "", f"end {ended}"))
            continue
        no = "on" if node["asked"] and not node["yes"] else ""
        parts.append(f'<path class="{ended if node["yes"] else ""}" d="M{box} {y + 23} H{box + 130}"/>'
                     f'<text class="soft" x="{box + 52}" y="{y + 17}">yes</text>'
                     f'<path class="{no}" d="M{box / 2} {y + 46} V{y + step}"/>'
                     f'<text class="soft" x="{box / 2 + 8}" y="{y + 64}">no</text>')
        parts.append(_box(0, y, box, node["question"], node["measured"] if node["asked"] else "", on))
        parts.append(_box(box + 130, y, 220, node["action"], "", f"end {ended}"))
    return plots.svg(f'<g class="flow">{"".join(parts)}</g>', width, 8 + len(path) * step - 18)


def _box(x: int, y: int, width: int, text: str, below: str, kind: str) -> str:
    middle = x + width / 2
    second = f'<text class="soft middle" x="{middle}" y="{y + 37}">{escape(below)}</text>' if below else ""
    return (f'<g class="{kind}"><rect x="{x + 1}" y="{y}" width="{width - 2}" height="46" rx="9"/><text class="middle" '
            f'x="{middle}" y="{y + (20 if below else 28)}">{escape(text)}</text>{second}</g>')
