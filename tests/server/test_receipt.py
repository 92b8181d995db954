"""Answers with receipts, computed again by `fptq verify`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fptq_runtime.cli import main
from fptq_runtime.engine.llm import load_engine
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


def test_what_is_something_else_is_named(made: Served, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
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
        ({"choices": changed["choices"] * 2}, "has 2 choices"),
        ({"params": {"top_q": 1}}, "is no receipt"), ({"prompt_token_ids": "Once"}, "is no receipt"),
        ({"choices": [1]}, "is no receipt"), ({"more": 1}, "is no receipt"),
    ]:
        file.write_text(json.dumps({**changed, **change}))
        capsys.readouterr()
        assert verify(artifact, file) == 1
        assert message in capsys.readouterr().err
    if len(_native.available_isas()) > 1:
        file.write_text(json.dumps(changed))
        monkeypatch.setenv("FPTQ_ISA", "generic")
        assert verify(artifact, file) == 1
        assert "its kernels is" in capsys.readouterr().err


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
