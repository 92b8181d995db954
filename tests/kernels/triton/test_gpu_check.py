"""The check itself: its parity parts run here in the interpreter, its report with made-up parts."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from benchmarks.gpu_check.__main__ import BUDGET, all_parts, main
from benchmarks.gpu_check.check import Check, Row
from benchmarks.gpu_check.report import Part, Report, run
from benchmarks.gpu_check.timing import _roofline
from fptq_runtime.kernels.base import Curve, Roofs

ROOT = Path(__file__).parents[3]
STOCK = {"numpy", "ml_dtypes", "safetensors", "tokenizers", "torch", "tqdm", "triton"}
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


def test_it_imports_nothing_that_a_stock_image_lacks() -> None:
    """Of what we depend on: with all else out of reach, each part can be imported, and the engine behind them."""
    listed = (ROOT / "pyproject.toml").read_text().split("\ndependencies = [")[1].split("\n]")[0]
    ours = {name.replace("-", "_") for name in re.findall(r'^    "([\w-]+)', listed, re.MULTILINE)} - STOCK
    assert {"pydantic", "llguidance"} <= ours
    script = f"""
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {ours | {"transformers", "yaml"}!r} or name == "fptq_runtime._native":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Missing())
from benchmarks.gpu_check.__main__ import all_parts, stand_in
stand_in()
assert [part.name for part in all_parts()][:3] == ["ops", "roofs", "decode"]
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr


def test_the_whole_ends_within_eight_minutes_and_what_matters_most_within_four() -> None:
    parts = all_parts()
    essential = [part.name for part in parts].index("attend") + 1
    share = sum(part.seconds for part in parts[:essential]) / sum(part.seconds for part in parts)
    assert BUDGET <= 480
    assert share * BUDGET <= 240


def test_parity_reads_no_memory_that_nothing_wrote(tmp_path: Path) -> None:
    def unwritten(check: Check) -> Iterator[Row]:
        yield {"ok": bool(torch.empty(8).isnan().all()) and bool((torch.empty(8, dtype=torch.int8) == 127).all())}

    assert run(Check(tiny=True, threads=1), Report(tmp_path, FACTS), [Part(unwritten, 1, parity=True)], 1)
    assert not torch.are_deterministic_algorithms_enabled()


def test_rows_are_written_before_the_roofs_are_known() -> None:
    check = Check(tiny=True, threads=1)
    assert _roofline(check, 10**9, 10**12, 0.5) == {"GB/s": 2.0, "TOPS": 4.0}
    check.roofs = Roofs(4000.0, 4.0)
    row = _roofline(check, 10**9, 10**12, 0.5)
    assert row == {"GB/s": 2.0, "TOPS": 4.0, "of the roof": pytest.approx(1), "bound": "compute"}
