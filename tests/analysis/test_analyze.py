"""An analysis: complete, resumable, and one page that needs nothing else."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fptq_runtime import cli
from fptq_runtime.analysis import analyze as module
from fptq_runtime.analysis.advice import advise
from fptq_runtime.analysis.analyze import AnalysisError, Journal, analyze
from fptq_runtime.analysis.page import page
from fptq_runtime.analysis.sensitivity import Probe
from fptq_runtime.quantizer.calibrate import Text
from fptq_runtime.quantizer.recipe import load_recipe
from fptq_runtime.quantizer.samples import Calibration
from tests.quantizer.models import save_model

TEXT = Text("fox", "The quick brown fox jumps over the lazy dog, and then some more. " * 9, "0" * 64)
SMALL: dict[str, Any] = {"calibration": Calibration(num_samples=4), "max_tokens": 200, "sizes": (2, 3)}
LAYERS = 2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    save_model("llama", path, num_hidden_layers=LAYERS)
    return path


@pytest.fixture(scope="module")
def data(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return analyze(model, load_recipe("fptq"), TEXT, tmp_path_factory.mktemp("report"), **SMALL)


def test_every_study_is_there(data: dict[str, Any]) -> None:
    assert data["studies"] == list(module.STUDIES)
    assert len(data["one_only"]["layers"]) == len(data["leave_one_out"]["layers"]) == len(data["cumulative"]) == LAYERS
    assert set(data["one_only"]["kinds"]) == set(data["leave_one_out"]["kinds"]) == {"qkv", "o", "up", "down", "head"}
    assert len(data["linears"]) == len(data["activations"]) == 4 * LAYERS
    assert [row["samples"] for row in data["sizes"]] == [2, 3]
    assert [row["method"] for row in data["ranges"]] == ["minmax", "percentile", "mse", "kl", "aciq"]
    for row in (*data["linears"], *data["one_only"]["layers"], *data["cumulative"], data["quantized"], *data["sizes"]):
        assert row["kl"] > 0 and row["perplexity"] > 1
    for row in data["activations"]:
        assert sum(row["histogram_before"]) == pytest.approx(1, abs=1e-4)
        assert sum(row["histogram_after"]) == pytest.approx(1, abs=1e-4)
        assert 0 < row["weight_error"] < 0.1 and 0 <= row["peak_position"] < 128
        assert row["range_before"] >= row["median_before"] > 0
    assert json.loads(json.dumps(data)) == data


def test_what_was_measured_as_default_is_measured_alike(data: dict[str, Any]) -> None:
    """minmax is the recipe's own method, and quantizing twice gives the same model."""
    assert data["ranges"][0]["kl"] == pytest.approx(data["quantized"]["kl"], rel=1e-6)
    assert data["cumulative"][0]["kl"] == pytest.approx(data["one_only"]["layers"][0]["kl"], rel=1e-6)


def test_an_interrupted_run_goes_on(data: dict[str, Any], model: Path, tmp_path: Path,
                                    monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(Exception):
        pass

    measured: list[int] = []
    only = Probe.only

    def failing(self: Probe, layer: int, *arguments: Any) -> Any:
        if len(measured) == 3:
            raise Interrupted
        measured.append(layer)
        return only(self, layer, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Probe, "only", failing)
        with pytest.raises(Interrupted):
            analyze(model, load_recipe("fptq"), TEXT, tmp_path, **SMALL)
    with (tmp_path / "analysis.jsonl").open("a") as file:
        file.write('{"key": "linears/1')  # the line that was being written
    kept = [json.loads(line)["key"] for line in (tmp_path / "analysis.jsonl").read_text().splitlines()[1:-1]]
    assert {"all", "weights", "inputs", "one-only/0", "one-only/1"} <= set(kept)
    again: list[int] = []

    def counting(self: Probe, layer: int, *arguments: Any) -> Any:
        again.append(layer)
        return only(self, layer, *arguments)

    monkeypatch.setattr(Probe, "only", counting)
    resumed = analyze(model, load_recipe("fptq"), TEXT, tmp_path, **SMALL)
    assert len(again) == LAYERS + 4 * LAYERS - 3
    for name in ("quantized", "one_only", "leave_one_out", "linears", "cumulative", "activations"):
        assert resumed[name] == data[name]

    def never(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("nothing is left to measure")

    monkeypatch.setattr(module, "capture", never)
    assert analyze(model, load_recipe("fptq"), TEXT, tmp_path, **SMALL) == resumed


def test_another_subject_is_not_mixed_in(model: Path, tmp_path: Path) -> None:
    Journal(tmp_path / "analysis.jsonl", {"recipe": "a"}).put("all", 1)
    assert Journal(tmp_path / "analysis.jsonl", {"recipe": "a"}).results == {"all": 1}
    with pytest.raises(AnalysisError, match="another --out"):
        Journal(tmp_path / "analysis.jsonl", {"recipe": "b"})
    assert Journal(tmp_path / "analysis.jsonl", {"recipe": "b"}, overwrite=True).results == {}
    (tmp_path / "analysis.jsonl").write_text('{"subj')  # interrupted within the first line
    assert Journal(tmp_path / "analysis.jsonl", {"recipe": "b"}).results == {}


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [value or "" for name, value in attrs
                         if name in ("src", "href", "srcset", "data", "xlink:href")]


def test_the_page_needs_nothing_else(data: dict[str, Any]) -> None:
    html = page(data, advise(data))
    parser = _Page()
    parser.feed(html)
    assert parser.fetched == [] and not {"script", "link", "img", "iframe"} & set(parser.tags)
    assert not re.search(r"url\(|@import", html)
    assert "prefers-color-scheme: dark" in html
    assert parser.tags.count("svg") >= 15
    assert "Not measured" not in html
    assert {f"--{name}" for name in re.findall(r"var\(--(\w+)\)", html)} <= set(re.findall(r"(--\w+):", html))


def test_names_are_escaped(data: dict[str, Any]) -> None:
    html = page({**data, "model": "<script>alert(1)</script>"}, advise(data))
    assert "<script" not in html


def test_a_quick_page_says_what_it_lacks(model: Path, tmp_path: Path) -> None:
    quick = analyze(model, load_recipe("rtn-dynamic"), TEXT, tmp_path, studies=module.QUICK, **SMALL)
    assert quick["studies"] == ["one-only", "activations"]
    html = page(quick, advise(quick))
    assert "linears, leave-one-out, cumulative, sizes, ranges" in " ".join(html.split())


def test_ranges_are_compared_where_some_input_is_static(model: Path, tmp_path: Path) -> None:
    dynamic = analyze(model, load_recipe("rtn-dynamic"), TEXT, tmp_path, studies=["ranges"], **SMALL)
    assert dynamic["ranges"] == []


def test_the_command(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["analyze", str(model), "--quick", "--out", str(tmp_path / "r"), "--num-samples", "2", "--max-tokens",
                 "100"]
    with pytest.raises(SystemExit) as exit_code:
        cli.main([*arguments, "--json"])
    assert exit_code.value.code == 0
    out, err = capsys.readouterr()
    assert "results are kept as they come\n" in err
    answer = json.loads(out)
    assert answer == json.loads((tmp_path / "r" / "analysis.json").read_text())
    assert {"outcome", "verdict", "reasons", "keep", "next_recipe", "qat"} <= set(answer["recommendation"])
    assert (tmp_path / "r" / "index.html").read_text().startswith("<!doctype html>")
    with pytest.raises(SystemExit):
        cli.main(arguments)
    assert "the report is" in capsys.readouterr().out
    with pytest.raises(SystemExit) as exit_code:
        cli.main([*arguments, "--recipe", "rtn"])
    assert exit_code.value.code == 1
    assert "choose another --out" in capsys.readouterr().err
    with pytest.raises(SystemExit) as exit_code:
        cli.main([*arguments, "--only", "sizes"])
    assert exit_code.value.code == 2


def test_the_command_offers_every_study() -> None:
    """It lists them itself, since help must not import torch."""
    [option] = [parameter for parameter in cli.cli.commands["analyze"].params if parameter.name == "studies"]
    assert list(option.type.choices) == list(module.STUDIES)  # type: ignore[attr-defined]
