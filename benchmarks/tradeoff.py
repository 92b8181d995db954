"""What a model's loss costs: a plot of loss against bytes and against CPU time, from what `fptq compare` wrote.

    python -m benchmarks.tradeoff benchmarks/results/quality-smollm2.json ... > docs/quality.svg

The recipes of several files of one model and text are drawn together; a file's calibration is said behind its recipes
where it differs between files.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from fptq_runtime.analysis.plots import STYLE, svg

PANEL, HEIGHT, MARGIN = 460, 300, 60
LABEL = 12  # between two texts, at least


def points(files: Sequence[Path]) -> list[tuple[str, float, float, float]]:
    """Name, loss in percent, MB and CPU seconds of every recipe that was measured. Raises SystemExit where the files
    are of different models or texts."""
    found: list[dict[str, Any]] = [json.loads(file.read_text()) for file in files]
    if len({(each["model"], each["text_sha256"], each["tokens"]) for each in found}) != 1:
        raise SystemExit("the files are of different models or texts")
    several = len({each["calibration"] for each in found}) > 1
    return [
        (row["recipe"] + f", {each['calibration']}" * several,
         100 * (row["perplexity"] / each["float"]["perplexity"] - 1), row["bytes"] / 1e6, row["quantize_cpu_seconds"])
        for each in found for row in each["rows"] if row["error"] is None
    ]


def panel(x: float, title: str, rows: Sequence[tuple[str, float, float]]) -> str:
    """rows: name, loss in percent, and what it costs. Both from zero; of losses the logarithm."""
    left, right, bottom, top = x + MARGIN, x + PANEL - 20, HEIGHT - 40, 34
    most = max(cost for _, _, cost in rows) * 1.08
    losses = [loss for _, loss, _ in rows]
    low, high = math.floor(math.log2(min(losses))), math.ceil(math.log2(max(losses)))

    def place(loss: float, cost: float) -> tuple[float, float]:
        height = (math.log2(loss) - low) / max(1, high - low)
        return left + cost / most * (right - left), bottom - height * (bottom - top)

    parts = [f'<text class="strong" x="{left}" y="20">{escape(title)}</text>']
    for power in range(low, high + 1):
        y = place(2.0**power, 0)[1]
        parts.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
                     f'<text class="soft end" x="{left - 6}" y="{y + 4:.1f}">{2.0**power:.2g} %</text>')
    step = round_step(most / 5)
    for tick in range(int(most / step) + 1):
        at = place(2.0**low, tick * step)[0]
        parts.append(f'<text class="soft middle" x="{at:.1f}" y="{bottom + 18}">{tick * step:g}</text>')
    taken: list[tuple[float, float]] = []
    for name, loss, cost in sorted(rows, key=lambda row: -row[1]):
        at, y = place(loss, cost)
        text = y + 4
        while any(abs(text - other) < LABEL and abs(at - beside) < 120 for beside, other in taken):
            text += LABEL
        taken.append((at, text))
        side = ' class="soft end"' if at > (left + right) / 2 else ' class="soft"'
        shift = -8 if at > (left + right) / 2 else 8
        parts.append(f'<g><title>{escape(f"{name}: {loss:.2f} %, {cost:.0f}")}</title>'
                     f'<circle class="one" cx="{at:.1f}" cy="{y:.1f}" r="4.5"/>'
                     f'<text{side} x="{at + shift:.1f}" y="{text:.1f}">{escape(name)}</text></g>')
    return "".join(parts)


def round_step(size: float) -> float:
    """1, 2 or 5 times a power of ten, at least `size`."""
    power = 10.0 ** math.floor(math.log10(size))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= size)


def plot(rows: Sequence[tuple[str, float, float, float]]) -> str:
    width = 2 * PANEL
    return svg(
        f'<style>{STYLE}</style><rect width="{width}" height="{HEIGHT}" style="fill: var(--card)"/>'
        + panel(0, "perplexity loss against MB", [(name, loss, size) for name, loss, size, _ in rows])
        + panel(PANEL, "and against CPU seconds of quantizing", [(name, loss, time) for name, loss, _, time in rows]),
        width, HEIGHT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="COMPARE.json")
    print(plot([row for row in points(parser.parse_args().files) if row[1] > 0]))


if __name__ == "__main__":
    main()
