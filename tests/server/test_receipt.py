"""Answers with receipts, computed again by `fptq verify`."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fptq_runtime.cli import main
from fptq_runtime.engine.llm import load_engine
from fptq_runtime.engine.receipt import read_receipt
from fptq_runtime.errors import FptqError
from fptq_runtime.kernels.select import select_backend
from fptq_runtime.locate import DEMO_MODEL
from fptq_runtime.models.loader import Checkpoint, load_model
from fptq_runtime.quantizer.pipeline import quantize
from fptq_runtime.quantizer.samples import Calibration
from tests.server.conftest import Served

_native = pytest.importorskip("fptq_runtime._native", reason="the native extension is not built")

CHOICE = {"temperature": 1, "structured_outputs": {"choice": ["a king", "a queen"]}}


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("receipt") / "artifact"
    quantize(DEMO_MODEL, path, "rtn-dynamic", calibration=Calibration("random", 2, 16), text_tokens=200)
    return path


@pytest.fixture(scope="module")
def made(artifact: Path, run_server: Callable[..., Any]) -> Iterator[Served]:
    """The artifact's engine as `load_engine` describes it, with the tests' server around it."""
    identity = load_engine(artifact, max_model_len=1024).identity
    backend = select_backend()
    with run_server(decoder=(load_model(Checkpoint(artifact), backend), backend), max_loras=1) as served:
        served.engine.engine.identity = identity
        yield served


def ask(served: Served, route: str, **body: Any) -> Any:
    answer = served.http.post(f"/v1/{route}", json={"max_tokens": 9, "return_receipt": True, **body})
    return answer.json() if answer.status_code == 200 else answer.json()["error"]


@pytest.mark.parametrize("body", [
    {"temperature": 0}, {"n": 2, "temperature": 1.3, "top_p": 0.9, "logit_bias": {"40": 3}, "stop": ["e"]},
    {"best_of": 3, "seed": 5, "frequency_penalty": 1, "min_tokens": 2}, CHOICE,
], ids=str)
def test_completions_are_computed_again(made: Served, artifact: Path, body: dict[str, Any], tmp_path: Path,
                                        capsys: pytest.CaptureFixture[str]) -> None:
    answer = ask(made, "completions", prompt=["Once upon a time", "The king"], **body)
    assert sum(choice["tokens"] for choice in answer["receipt"]["choices"]) == answer["usage"]["completion_tokens"]
    (tmp_path / "answer.json").write_text(json.dumps(answer))
    assert verify(artifact, tmp_path / "answer.json", "--threads", "1") == 0
    tokens, choices = answer["usage"]["completion_tokens"], len(answer["receipt"]["choices"])
    assert f"{tokens} tokens of {choices} choices are the receipt's" in capsys.readouterr().out


def test_what_is_something_else_is_named(made: Served, artifact: Path, tmp_path: Path,
                                         capsys: pytest.CaptureFixture[str]) -> None:
    answer = ask(made, "chat/completions", messages=[{"role": "user", "content": "Once"}])
    file = tmp_path / "receipt.json"
    file.write_text(json.dumps(answer["receipt"]))
    assert verify(artifact, file) == 0
    changed = json.loads(file.read_text())
    for change, message in [
        ({"params": {**changed["params"], "seed": changed["params"]["seed"] ^ 1}}, "choice 0 has other tokens"),
        ({"made_by": {**changed["made_by"], "artifact": "0" * 64}}, "its artifact is 000"),
        ({"made_by": {**changed["made_by"], "kernels": "generic 00"}}, "its kernels is generic 00, here it is "),
        ({"made_by": {**changed["made_by"], "max_model_len": 1 << 29}}, "max_model_len"),
        ({"choices": changed["choices"] * 2}, "has 2 choices"),
        ({"params": {"top_q": 1}}, "is no receipt"), ({"prompt_token_ids": "Once"}, "is no receipt"),
        ({"choices": [1]}, "is no receipt"), ({"more": 1}, "is no receipt"),
    ]:
        file.write_text(json.dumps({**changed, **change}))
        capsys.readouterr()
        assert verify(artifact, file) == 1
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("isa", _native.available_isas())
def test_every_isa_computes_them_again(made: Served, artifact: Path, isa: str, tmp_path: Path,
                                       monkeypatch: pytest.MonkeyPatch) -> None:
    answer = ask(made, "completions", prompt="Once upon a time", temperature=1.5, n=2, max_tokens=60)
    (tmp_path / "answer.json").write_text(json.dumps(answer))
    monkeypatch.setenv("FPTQ_ISA", isa)
    assert verify(artifact, tmp_path / "answer.json") == 0


RECEIPT: dict[str, Any] = {
    "made_by": {"artifact": "0" * 64, "version": "1", "kernels": "native", "activations": "checkpoint",
                "kv_cache_dtype": "int8", "block_size": 32, "max_model_len": 1024, "close_structured": True},
    "prompt_token_ids": [[1, 2]], "choices": [{"tokens": 1, "sha256": "0" * 64}],
    "params": {"seed": 1, "n": 2, "temperature": 0.5, "stop": ["e"], "logit_bias": {"3": 1}, "stop_token_ids": [2],
               "structured": {"kind": "regex", "text": "a"}, "shown_special_tokens": [3], "skip_special_tokens": False},
}
SPOILT: list[Any] = [None, True, -1, 1 << 70, 1e300, "x", "1\n2", [], [[]], {}, {"a": 1}]


@pytest.mark.parametrize(("path", "value", "message"), [
    (("made_by", "block_size"), "32", 'made_by.block_size must be an integer within 0..1073741824, not "32"'),
    (("made_by", "activations"), "int4", 'made_by.activations must be checkpoint or int8, not "int4"'),
    (("made_by", "close_structured"), 1, "made_by.close_structured must be true or false, not 1"),
    (("made_by", "path"), "/etc", 'made_by has "path", which no receipt has'),
    (("made_by", "version"), "1\n2", 'made_by.version must be a name, not "1\\n2"'),
    (("params", "temperature"), "hot", 'params.temperature must be a number, not "hot"'),
    (("params", "temperature"), 1000, "params.temperature must be between 0 and 100"),
    (("params", "seed"), 1.5, "params.seed must be an integer"),
    (("params", "structured"), {"kind": "regex"}, "params.structured.text is missing"),
    (("params", "logit_bias"), {"x": 1}, "params.logit_bias must be an object of token ids"),
    (("prompt_token_ids",), [[1], [2, -7]], "prompt_token_ids[1][1] must be an integer within 0..2147483647, not -7"),
    (("choices",), [{"tokens": 1, "sha256": "0"}], "choices[0].sha256 must be a SHA-256"),
])
def test_a_damaged_receipt_is_told_where(path: tuple[str, ...], value: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(FptqError) as caught:
        read_receipt(spoilt(path, value, tmp_path))
    assert message in str(caught.value)


def spoilt(path: tuple[str, ...], value: Any, directory: Path) -> Path:
    data = copy.deepcopy(RECEIPT)
    inner = data
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = value
    (directory / "receipt.json").write_text(json.dumps(data))
    return directory / "receipt.json"


def test_whatever_a_receipt_holds_is_read_or_refused_in_one_line(tmp_path: Path) -> None:
    read_receipt(spoilt(("prompt_token_ids",), [[1]], tmp_path))
    places = [(name,) for name in RECEIPT] + [
        (name, inner) for name in ("made_by", "params") for inner in RECEIPT[name]] + [("params", "structured", "kind")]
    refused = []
    for path, value in itertools.product(places, SPOILT):
        file = spoilt(path, value, tmp_path)
        try:
            read_receipt(file)
        except FptqError as error:
            refused.append(str(error))
    assert len(refused) > 200
    assert all(line.startswith(f"{file} is no receipt: ") and "\n" not in line for line in refused)
    for text in ("", "[", "null", "[]", "NaN", '{"receipt": 3}', '{"receipt": {"receipt": {}}}', "[" * 10**5):
        file.write_text(text)
        with pytest.raises(FptqError, match=r"is no receipt: [^\n]*$"):
            read_receipt(file)


def test_where_there_is_none(made: Served, served: Served) -> None:
    for where, body, message in [(made, {"stream": True}, "is not supported in a stream"),
                                 (served, {}, "is for answers of an artifact on its own")]:
        error = ask(where, "completions", prompt="Once", **body)
        assert message in error["message"] and error["param"] == "return_receipt"
    assert "receipt" not in ask(made, "completions", prompt="Once", return_receipt=False)


def verify(artifact: Path, file: Path, *options: str) -> int:
    try:
        main(["verify", str(artifact), "--receipt", str(file), *options])
    except SystemExit as error:
        return int(error.code or 0)
    return 0
