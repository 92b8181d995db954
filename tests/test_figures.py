"""README's figures are those of the results files."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def table(title: str) -> list[list[str]]:
    """The cells, without emphasis, of the first table of a section of README."""
    section = (ROOT / "README.md").read_text().split(f"\n## {title}\n")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip(" *") for cell in row.strip("|").split("|")] for row in rows if "---" not in row]


LABELS = {
    "prefill, 512 tokens": "prefill, 512 tokens",
    "decode, batch 1": "decode, batch 1, context 512",
    "decode, batch 8": "decode, batch 8, context 512",
    "decode, batch 32": "decode, batch 32, context 512",
    "decode, batch 8, context 2048": "decode, batch 8, context 2048",
    "8 streaming HTTP clients, output": "HTTP, 8 clients: output tokens/s",
    "and their median time to first token": "HTTP, 8 clients: median ms to first token",
}


def test_speed() -> None:
    """The best of each engine's runs, and the peers' too."""
    (_, *engines), *rows = table("How fast")
    results = {row["label"]: row for row in json.loads((RESULTS / "peers-llama-3.2-1b.json").read_text())["rows"]}
    assert [name for name, *_ in rows] == list(LABELS)
    for name, *cells in rows:
        row = results[LABELS[name]]
        for engine, cell in zip(engines, cells, strict=True):
            runs = row["runs"].get(engine.removesuffix(" GenAI"), [])
            if not cell:
                assert not runs, f"{engine}: {name} was measured"
                continue
            best = min(runs) / 1000 if row["lower_is_better"] else max(runs)
            assert cell == (f"{best:.1f} s" if row["lower_is_better"] else f"{best:.0f}"), f"{engine}: {name}"


@pytest.mark.parametrize("model", ["SmolLM2-135M-Instruct, WikiText-2", "Gemma 3 270M, WikiText-2"])
def test_quality(model: str) -> None:
    """Of real models; every figure stands in the table that `benchmarks.quality` and `fptq compare` filled."""
    header, *rows = table("What quantization costs")
    cells = next(row for row in rows if row[0] == model)[1:]
    measured = (RESULTS / "quality.md").read_text().split("\n## Real models\n")[1]
    for column, cell in zip(header[1:], cells, strict=True):
        assert not cell or re.search(rf"(?<![\d.]){re.escape(cell.removesuffix(' %'))}", measured), f"{column}: {cell}"
