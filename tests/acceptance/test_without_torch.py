"""Where torch and transformers are not installed: all of serving works, and what needs them says how to get them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.acceptance.harness import DEMO, HELDOUT, Fptq, Server, environment


@pytest.fixture(scope="module")
def without_torch(fptq: Fptq, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    """The environment of a process that cannot import them, nor triton."""
    folder = tmp_path_factory.mktemp("without")
    for name in ("torch", "transformers", "triton"):
        (folder / f"{name}.py").write_text(f"raise ModuleNotFoundError('No module named {name}', name={name!r})\n")
    return {"PYTHONPATH": f"{folder}:{environment(fptq.cache)['PYTHONPATH']}"}


def test_it_serves(fptq: Fptq, without_torch: Mapping[str, str], demo_artifact: Path, server: Server,
                   tmp_path: Path) -> None:
    request = {"model": "demo", "prompt": "Once upon a time", "max_tokens": 16, "temperature": 0.0}
    with Server(fptq, tmp_path / "serve.log", demo_artifact, "--served-model-name", "demo", **without_torch) as bare:
        assert bare.openai.completions.create(**request).choices[0].text == (
            server.openai.completions.create(**request).choices[0].text)
        shown = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"], "additionalProperties": False}
        chat = bare.openai.chat.completions.create(
            model="demo", messages=[{"role": "user", "content": "Tell a tale."}], max_tokens=64, temperature=0.0,
            response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": shown}})
        assert chat.choices[0].finish_reason == "stop"
        assert bare.http.get("/").status_code == bare.http.get("/metrics").status_code == 200


@pytest.mark.parametrize("line", [
    "inspect ARTIFACT", "verify ARTIFACT", "config ARTIFACT", "generate ARTIFACT Once --max-tokens 4 --json",
    "bench ARTIFACT --phase decode --batch 1 --context 32 --steps 2 --seconds 0", "batch ARTIFACT in.jsonl out.jsonl",
])
def test_a_command_that_reads_an_artifact_works(fptq: Fptq, without_torch: Mapping[str, str], demo_artifact: Path,
                                                tmp_path: Path, line: str) -> None:
    body = {"prompt": "Once", "max_tokens": 4}
    request = {"custom_id": "1", "method": "POST", "url": "/v1/completions", "body": body}
    (tmp_path / "in.jsonl").write_text(json.dumps(request))
    result = fptq(*line.replace("ARTIFACT", str(demo_artifact)).split(), env=without_torch, cwd=tmp_path)
    assert result.code == 0, result.stderr


@pytest.mark.parametrize("line", [
    "quantize MODEL out", "quantize hub/model out", "serve MODEL --quantize fptq --port 0",
    "eval ARTIFACT --text TEXT", "compare MODEL --recipes rtn", "analyze MODEL", "export ARTIFACT out --target vllm",
    "generate ARTIFACT Once --backend reference",
])
def test_a_command_that_needs_torch_names_the_extra(fptq: Fptq, without_torch: Mapping[str, str], demo_artifact: Path,
                                                    tmp_path: Path, line: str) -> None:
    for name, path in (("MODEL", DEMO), ("ARTIFACT", demo_artifact), ("TEXT", HELDOUT)):
        line = line.replace(name, str(path))
    result = fptq(*line.split(), env=without_torch, cwd=tmp_path)
    result.assert_error(r"needs torch, .*pip install 'fptq-serve\[quantize\]'$")
    assert not list(tmp_path.iterdir())
