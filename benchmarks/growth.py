"""How cost grows: tokens a second against batch, context and threads, beside what the machine's roofs let through.

    python -m benchmarks.growth [--shape qwen2.5-0.5b] [--out benchmarks/results/growth-SHAPE]

Each point is a row of `fptq bench`, all in one run of about five minutes. Writes OUT.json, OUT.md and OUT.svg, for
which it needs matplotlib; `--draw` makes the last two of the first again.
"""

from __future__ import annotations

import argparse
import datetime
import json
from pathlib import Path
from typing import Any

from fptq_runtime.kernels.cpu import available_threads
from fptq_runtime.measure.bench import Measurement, bench
from fptq_runtime.measure.shapes import SHAPES

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
CONTEXTS = (128, 512, 2048, 8192, 16384)
LABELS = {
    "batch": "decoding, by sequences (512 tokens of context)",
    "context": "decoding one sequence, by tokens of context",
    "prompt": "computing one prompt, by its tokens",
    "threads": "decoding 8 sequences, by threads (512 tokens of context)",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="qwen2.5-0.5b")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--draw", action="store_true")
    options = parser.parse_args()
    out = options.out or Path(__file__).parent / "results" / f"growth-{options.shape}"
    file = out.with_suffix(".json")
    if not options.draw:
        file.write_text(json.dumps(measured(options.shape), indent=1) + "\n")
    results = json.loads(file.read_text())
    out.with_suffix(".md").write_text(page(results))
    draw(results, out.with_suffix(".svg"))


def measured(shape: str) -> dict[str, Any]:
    """panels: of each of LABELS, x, tokens a second, and what the roofs would let through."""
    by_batch = bench(shape, phases=["decode"], batches=BATCHES, contexts=[512], seconds=1)
    by_context = bench(shape, batches=[1], contexts=CONTEXTS, seconds=1)
    threads = range(1, available_threads() + 1)
    by_threads = [bench(shape, phases=["decode"], batches=[8], contexts=[512], seconds=1, threads=count)
                  for count in threads]
    decoded, prefilled = ([row for row in by_context.results if row.phase == phase] for phase in ("decode", "prefill"))
    panels = {
        "batch": [_point(row.batch, row) for row in by_batch.results],
        "context": [_point(row.context, row) for row in decoded],
        "prompt": [_point(row.context, row) for row in prefilled],
        "threads": [_point(count, one.results[0]) for count, one in zip(threads, by_threads, strict=True)],
    }
    said = by_batch.to_json()
    return {"shape": shape, **{name: said[name] for name in ("machine", "kernels", "version", "roofs")},
            "date": datetime.date.today().isoformat(), "panels": panels}


def _point(x: int, row: Measurement) -> dict[str, Any]:
    roof = None if row.percent_of_roof is None else row.tokens_per_s / row.percent_of_roof * 100
    return {"x": x, "tokens_per_s": row.tokens_per_s, "roof": roof, "bound": row.bound,
            "percent_outside_kernels": row.percent_outside_kernels}


def page(results: dict[str, Any]) -> str:
    roofs = results["roofs"]
    lines = [
        f"# How cost grows: {results['shape']}", "",
        f"`python -m benchmarks.growth --shape {results['shape']}` on {results['machine']}, {results['date']}, random "
        f"weights; roofs measured in the same run: {roofs['gops']:.0f} GOPS of int8, {roofs['read_gb_per_s']:.1f} GB/s "
        "read. The roof of a row is the time that its multiply-adds or its bytes of weights, keys and values need, "
        "whichever is longer.", "", *(f"{kind}: {kernel}  " for kind, kernel in results["kernels"].items()), "",
    ]
    for panel, label in LABELS.items():
        lines += [f"## {label[0].upper()}{label[1:]}", "", "| | tokens/s | of the roof | bound by | outside kernels |",
                  "|---|---|---|---|---|"]
        for point in results["panels"][panel]:
            share = "" if point["roof"] is None else f"{100 * point['tokens_per_s'] / point['roof']:.0f} %"
            lines.append(f"| {point['x']:,} | {point['tokens_per_s']:.1f} | {share} | {point['bound'] or ''} | "
                         f"{point['percent_outside_kernels']:.1f} % |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def draw(results: dict[str, Any], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = results["shape"]  # the same file for the same numbers
    mpl.rcParams["svg.fonttype"] = "none"
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, layout="constrained", figsize=(9, 6))
    for axis, (panel, label) in zip(axes.flat, LABELS.items(), strict=True):
        points = results["panels"][panel]
        xs = [point["x"] for point in points]
        axis.plot(xs, [point["tokens_per_s"] for point in points], "o-", color="#1f5fa8", label="measured",
                  markersize=4)
        if all(point["roof"] is not None for point in points):
            axis.plot(xs, [point["roof"] for point in points], "--", color="#999999", label="roof")
        axis.set_title(label, fontsize=9, loc="left")
        axis.set_xscale("log", base=2)
        axis.set_xticks(xs, [f"{x:,}" for x in xs], fontsize=8)
        axis.minorticks_off()
        axis.set_ylim(bottom=0)
        axis.tick_params(axis="y", labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].legend(fontsize=8, frameon=False)
    figure.suptitle(f"{results['shape']}, tokens per second, {results['machine']}", fontsize=10, x=0.01, ha="left")
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
