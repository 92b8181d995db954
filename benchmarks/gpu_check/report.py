"""Parts of a check, run within a budget, and what is written about them."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu_check.check import Check, Row, poisoned


@dataclass(frozen=True)
class Part:
    """seconds: what it takes at most, of the default budget. parity: a row that is not ok, or an error, fails, and
    nothing is left out; other parts are cut short there."""

    run: Callable[[Check], Iterator[Row]]
    seconds: float
    parity: bool = False

    @property
    def name(self) -> str:
        return self.run.__name__


class Report:
    """gpu-NAME.json and gpu-NAME.md, whole after every row."""

    def __init__(self, out: Path, facts: Row) -> None:
        self.facts = facts
        self.parts: dict[str, Row] = {}
        self._stem = out / f"gpu-{facts['name']}"
        out.mkdir(parents=True, exist_ok=True)

    def write(self) -> None:
        for suffix, text in ((".json", json.dumps({**self.facts, "parts": self.parts}, indent=1) + "\n"),
                             (".md", self.markdown())):
            temporary = self._stem.with_name(f"{self._stem.name}{suffix}.tmp")
            temporary.write_text(text)
            temporary.replace(self._stem.with_name(f"{self._stem.name}{suffix}"))

    def markdown(self) -> str:
        lines = [f"# {self.facts['device']}", "", ", ".join(f"{key} {value}" for key, value in self.facts.items()
                                                          if key not in ("device", "name")), ""]
        for name, part in self.parts.items():
            rows = part["rows"]
            state = "" if part["ok"] is None else " passed" if part["ok"] else " FAILED"
            lines += [f"## {name}:{state or ' timed'} in {part['seconds']:.0f} s", ""]
            if part.get("about"):
                lines += [part["about"], ""]
            columns = list(dict.fromkeys(key for row in rows for key in row))
            if rows:
                lines += [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
                lines += [f"| {' | '.join(_cell(row.get(column)) for column in columns)} |" for row in rows]
                lines.append("")
            for key in ("cut short", "error"):
                if part.get(key):
                    lines += [f"{key}: {part[key]}", ""]
        speedups = self._speedups()
        return "\n".join([*lines, *speedups])

    def _speedups(self) -> list[str]:
        """Ours against bfloat16, once both were measured."""
        rows = {name: part["rows"] for name, part in self.parts.items()}
        bf16 = {(row["case"], row["batch"]): row["ms"] for row in rows.get("baseline", ())}
        ours = [row for part in ("decode", "prefill", "two_level") for row in rows.get(part, ())]
        lines = [f"- decode, {row['profile']}, batch {row['batch']}: {bf16['decode', row['batch']] / row['ms']:.2f} × "
                 f"bfloat16 ({bf16['decode', row['batch']] / row['device ms']:.2f} × without the host)"
                 for row in ours if ("decode", row.get("batch")) in bf16]
        lines += [f"- prefill, {row['profile']}: {bf16[key] / row['ms']:.2f} × bfloat16"
                  for row in ours if (key := (f"prefill {row.get('tokens')}", 1)) in bf16]
        return ["## Against bfloat16", "", *lines, ""] if lines else []


def _rows(part: Part, check: Check) -> Iterator[Row]:
    with poisoned() if part.parity else nullcontext():
        yield from part.run(check)


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return "" if value is None else str(value)


def run(check: Check, report: Report, parts: Sequence[Part], scale: float) -> bool:
    """Whether all parity holds. What a part does not use of its time, the later ones have."""
    spare = 0.0
    for part in parts:
        started = time.monotonic()
        limit = scale * part.seconds + spare
        entry: Row = {"about": " ".join((part.run.__doc__ or "").split()), "rows": [], "ok": part.parity or None,
                      "seconds": 0.0}
        report.parts[part.name] = entry
        print(f"== {part.name}, at most {limit:.0f} s", flush=True)
        try:
            for row in _rows(part, check):
                entry["rows"].append(row)
                entry["seconds"] = time.monotonic() - started
                print("  " + ", ".join(f"{key} {_cell(value)}" for key, value in row.items()), flush=True)
                if part.parity and not row.get("ok", True):
                    entry["ok"] = False
                report.write()
                if entry["seconds"] > limit and not part.parity:
                    entry["cut short"] = f"after {limit:.0f} s"
                    break
        except Exception as error:
            traceback.print_exc()
            entry["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            entry["ok"] = False
        entry["seconds"] = time.monotonic() - started
        spare = limit - entry["seconds"]
        report.write()
    return all(report.parts[part.name]["ok"] for part in parts if part.parity)
