"""The results as a Markdown table and a plot. Both are made from the JSON file, which keeps every run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

OURS = "FPTQ Serve"


def best(runs: dict[str, list[float]], lower: bool = False) -> dict[str, float]:
    """Of each peer: what else runs on a machine only ever makes it slower."""
    return {name: (min if lower else max)(values) for name, values in runs.items() if values}


def ratio(values: dict[str, float], lower: bool = False) -> float | None:
    """Ours to the best peer's."""
    peers = [value for name, value in values.items() if name != OURS]
    if OURS not in values or not peers:
        return None
    return values[OURS] / (min if lower else max)(peers)


def markdown(results: dict[str, Any]) -> str:
    rows: list[dict[str, Any]] = results["rows"]
    names = list(dict.fromkeys([OURS, *(name for row in rows for name in row["runs"])]))
    lines = [
        f"# {results['shape']}: ours and peers", "",
        f"{results['machine']}, {results['threads']} threads, {results['date']}. Random weights. Each number is the "
        f"best of {results['rounds']} rounds in which the peers took turns, row by row; × is ours to the best peer's. "
        "Prefill and decode are tokens per second.", "",
        f"| | {' | '.join(names)} | × |", "|---" * (len(names) + 2) + "|",
    ]
    for row in rows:
        values = best(row["runs"], row["lower_is_better"])
        top = (min if row["lower_is_better"] else max)(values.values())
        cells = [_cell(values.get(name), values.get(name) == top) for name in names]
        factor = ratio(values, row["lower_is_better"])
        lines.append(f"| {row['label']} | {' | '.join(cells)} | {'' if factor is None else f'{factor:.2f}'} |")
    lines += ["", "## Versions", "", *(f"- {name}: {text}" for name, text in results["versions"].items())]
    if results["unavailable"]:
        lines += ["", "## Not run", "", *(f"- {name}: {reason}" for name, reason in results["unavailable"].items())]
    lines += ["", "## Commands", "", "```", *results["runs"], "```", ""]
    for name, commands in results["commands"].items():
        lines += [f"{name}:", "", "```", *commands, "```", ""]
    return "\n".join(lines).rstrip() + "\n"


def plot(results: dict[str, Any], path: Path) -> None:
    """A panel for each row that has a peer, a bar for each."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = results["shape"]  # the same file for the same numbers
    mpl.rcParams["svg.fonttype"] = "none"  # text as text; a path for each letter makes a file five times as large
    mpl.rcParams["font.sans-serif"] = ["DejaVu Sans", "Verdana", "sans-serif"]
    import matplotlib.pyplot as plt

    rows: list[dict[str, Any]] = [row for row in results["rows"] if len(row["runs"]) > 1]
    if not rows:
        return
    names = list(dict.fromkeys([OURS, *(name for row in rows for name in row["runs"])]))
    most = max(len(row["runs"]) for row in rows)
    palette = ["#1f5fa8", "#e0a458", "#8fb8a8", "#b9a7c9", "#c9c9c9"]
    colors = {name: palette[min(i, len(palette) - 1)] for i, name in enumerate(names)}
    columns = 3
    figure, axes = plt.subplots(math.ceil(len(rows) / columns), columns, squeeze=False, layout="constrained",
                                figsize=(11, 1.55 * math.ceil(len(rows) / columns) + 0.6))
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, row in zip(axes.flat, rows, strict=False):
        values = best(row["runs"], row["lower_is_better"])
        shown = [name for name in names if name in values]
        axis.set_axis_on()
        axis.barh(shown, [values[name] for name in shown], color=[colors[name] for name in shown], height=0.72)
        axis.set_ylim(most - 0.4, -0.6)
        axis.set_title(row["label"], fontsize=9, loc="left")
        for i, name in enumerate(shown):
            axis.text(values[name], i, " " + _number(values[name]), va="center", fontsize=8)
        axis.set_xlim(0, 1.2 * max(values.values()))
        axis.set_xticks([])
        axis.tick_params(axis="y", length=0, labelsize=8)
        axis.spines[:].set_visible(False)
    figure.suptitle(f"{results['shape']}, {results['machine']}, {results['threads']} threads", fontsize=10, x=0.01,
                    ha="left")
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _cell(value: float | None, top: bool) -> str:
    if value is None:
        return ""
    return f"**{_number(value)}**" if top else _number(value)


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
