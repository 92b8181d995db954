"""The check itself: its parity parts run here in the interpreter, its report with made-up parts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest

from benchmarks.gpu_check.__main__ import main
from benchmarks.gpu_check.check import Check, Row
from benchmarks.gpu_check.report import Part, Report, run
from fptq_runtime.kernels.base import Curve

FACTS = {"name": "made-up", "device": "a device", "torch": "2"}


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_parity_of_every_op_in_the_interpreter(tmp_path: Path) -> None:
    assert main(["--interpret", "--only", "ops", "--out", str(tmp_path)]) == 0
    data = json.loads((tmp_path / "gpu-interpreter.json").read_text())
    rows = data["parts"]["ops"]["rows"]
    assert {"embed", "rms norm", "layer norm", *get_args(Curve), "softcap", "linear", "sample"} == {
        r["op"] for r in rows}
    assert all(row["ok"] for row in rows)
    assert "nothing was timed" in (tmp_path / "gpu-interpreter.md").read_text()


def right(check: Check) -> Iterator[Row]:
    """Is right."""
    yield {"op": "norm", "ok": True}


def wrong(check: Check) -> Iterator[Row]:
    yield {"op": "norm", "ok": True}
    yield {"op": "linear", "ok": False}


def broken(check: Check) -> Iterator[Row]:
    yield {"ms": 1.25}
    raise RuntimeError("out of\nmemory")


def endless(check: Check) -> Iterator[Row]:
    while True:
        yield {"ms": 2.5}


@pytest.mark.parametrize(("parts", "passes"), [
    ([Part(right, 1, parity=True)], True),
    ([Part(right, 1, parity=True), Part(broken, 1), Part(endless, 0.01)], True),
    ([Part(wrong, 0, parity=True), Part(right, 1, parity=True)], False),
    ([Part(broken, 1, parity=True), Part(right, 1, parity=True)], False),
])
def test_a_part_that_fails_loses_no_other(tmp_path: Path, parts: list[Part], passes: bool) -> None:
    report = Report(tmp_path, FACTS)
    assert run(Check(tiny=True, threads=1), report, parts, 0.1) == passes
    data: dict[str, Any] = json.loads((tmp_path / "gpu-made-up.json").read_text())
    text = (tmp_path / "gpu-made-up.md").read_text()
    assert list(data["parts"]) == [part.name for part in parts]
    for part in parts:
        entry = data["parts"][part.name]
        assert entry["rows"]
        assert f"## {part.name}:" in text
        if part.run is broken:
            assert entry["error"] == "RuntimeError: out of memory"
            assert entry["rows"] == [{"ms": 1.25}]
        if part.run is endless:
            assert entry["cut short"]


def test_speedups_are_told_once_both_were_measured(tmp_path: Path) -> None:
    report = Report(tmp_path, FACTS)
    rows = {"decode": [{"profile": "grouped", "batch": 1, "ms": 2.0, "device ms": 1.0}],
            "prefill": [{"profile": "grouped", "tokens": 8192, "ms": 50.0}]}
    report.parts = {name: {"rows": made, "ok": None, "seconds": 1.0} for name, made in rows.items()}
    assert "bfloat16" not in report.markdown()
    report.parts["baseline"] = {"ok": None, "seconds": 1.0, "rows": [
        {"case": "decode", "batch": 1, "ms": 6.0}, {"case": "prefill 8192", "batch": 1, "ms": 60.0}]}
    assert "batch 1: 3.00 × bfloat16 (6.00 × without the host)" in report.markdown()
    assert "prefill, grouped: 1.20 × bfloat16" in report.markdown()
