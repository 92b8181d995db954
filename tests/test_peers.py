"""benchmarks/peers: what its tables say, and how its workers are asked. The peers themselves are not run here."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.peers import report
from benchmarks.peers.base import DENSE, Row, Worker, made_once, sizes

ECHO = """
import json, sys
print("a library says hello")
print(json.dumps({"ready": "1"}), flush=True)
for line in sys.stdin:
    if "end" in line:
        sys.exit(3)
    print(json.dumps({"tokens_per_s": json.loads(line)["batch"]}), flush=True)
"""


def results(*rows: dict[str, Any]) -> dict[str, Any]:
    return {"shape": "s", "machine": "m", "threads": 2, "rounds": 2, "date": "today", "runs": ["run me"],
            "versions": {"FPTQ Serve": "1"}, "unavailable": {"C": "too large"}, "commands": {"B": ["b -x"]},
            "rows": list(rows)}


def row(label: str, lower: bool = False, **runs: list[float]) -> dict[str, Any]:
    return {"label": label, "lower_is_better": lower,
            "runs": {report.OURS if name == "ours" else name: values for name, values in runs.items()}}


def test_a_row_is_ours_to_the_best_peer() -> None:
    table = report.markdown(results(
        row("decode", ours=[20.0, 30.0], A=[8.0, 10.0], B=[15.0, 12.0]),
        row("memory", lower=True, ours=[50.0, 60.0], A=[100.0], B=[200.0]),
        row("alone", ours=[1.0]),
    ))
    cells = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
             for line in table.splitlines() if line.startswith("| ")}
    assert cells[""] == ["FPTQ Serve", "A", "B", "×"]
    assert cells["decode"] == ["**30**", "10", "15", "2.00"]
    assert cells["memory"] == ["**50**", "100", "200", "0.50"]
    assert cells["alone"] == ["**1**", "", "", ""]
    assert "C: too large" in table and "b -x" in table and "run me" in table


def test_the_plot_is_the_same_for_the_same_numbers(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name in ("one.svg", "two.svg"):
        report.plot(results(row("decode", ours=[20.0], A=[8.0])), tmp_path / name)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()


def test_pictures_of_results_are_small_and_have_their_numbers_beside_them() -> None:
    pictures = sorted((Path(report.__file__).parents[1] / "results").glob("*.svg"))
    assert pictures
    for picture in pictures:
        assert picture.stat().st_size < 100_000, picture.name
        words = " ".join(re.findall(r">([^<>]+)</(?:text|tspan)>", picture.read_text()))
        for row in json.loads(picture.with_suffix(".json").read_text())["rows"]:
            assert len(row["runs"]) < 2 or row["label"] in words, (picture.name, row["label"])


def test_a_worker_answers_and_its_end_is_told() -> None:
    worker = Worker([sys.executable, "-c", ECHO], os.environ)
    assert [worker.ask({"batch": batch})["tokens_per_s"] for batch in (3, 5)] == [3, 5]
    assert worker.resident_mib() > 1
    with pytest.raises(RuntimeError, match="ended with 3"):
        worker.ask({"end": True})
    worker.close()


def test_a_stopped_worker_is_closed() -> None:
    worker = Worker([sys.executable, "-c", ECHO], os.environ)
    worker.close()


def test_what_failed_is_made_again(tmp_path: Path) -> None:
    path = tmp_path / "made"

    def fail() -> None:
        with made_once(path) as out:
            assert out is not None
            out.write_text("half")
            raise ValueError

    with pytest.raises(ValueError):
        fail()
    assert not path.exists()
    with made_once(path) as out:
        assert out is not None
        out.write_text("whole")
    with made_once(path) as out:
        assert out is None
    assert path.read_text() == "whole"


@pytest.mark.parametrize("shape", DENSE)
def test_a_shape_in_the_words_of_others(shape: str) -> None:
    words = sizes(shape)
    json.dumps(words)
    assert words["hidden_size"] == words["num_attention_heads"] * words["head_dim"]


def test_labels_tell_rows_apart() -> None:
    rows = [Row("prefill", 1, 512), Row("prefill", 8, 512), Row("decode", 1, 512), Row("decode", 1, 2048),
            Row("decode", 1, 512, "avx2")]
    assert len({row.label for row in rows}) == len(rows)
