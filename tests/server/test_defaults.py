"""What generation_config.json says, and what a request says against it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from fptq_runtime.errors import FptqError
from fptq_server.defaults import sampling_defaults

PROMPT = "Once upon a time there was a king who"


def test_none_without_the_file(tmp_path: Path) -> None:
    assert sampling_defaults(tmp_path) == {}


def test_what_transformers_writes(tmp_path: Path) -> None:
    GenerationConfig(do_sample=True, temperature=0.6, top_p=0.95, top_k=20, min_p=0.05, repetition_penalty=1.1,
                     max_new_tokens=40, eos_token_id=1).save_pretrained(tmp_path)
    assert sampling_defaults(tmp_path) == {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.05,
                                           "repetition_penalty": 1.1, "max_tokens": 40}


@pytest.mark.parametrize(("config", "expected"), [
    ({"do_sample": False, "temperature": 0.6}, {"temperature": 0.0}),
    ({"do_sample": True}, {}),
    ({"temperature": None, "top_p": 0.9, "transformers_version": "5"}, {"top_p": 0.9}),
], ids=str)
def test_do_sample(tmp_path: Path, config: dict[str, Any], expected: dict[str, Any]) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(config))
    assert sampling_defaults(tmp_path) == expected


@pytest.mark.parametrize("config", [{"top_p": 0}, {"temperature": "hot"}, {"max_new_tokens": -1}, {"top_k": 0.5}],
                         ids=str)
def test_what_cannot_be_used_is_named(tmp_path: Path, config: dict[str, Any]) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(config))
    with pytest.raises(FptqError, match=r"generation_config\.json cannot give .*--generation-config none"):
        sampling_defaults(tmp_path)


@pytest.mark.parametrize(("path", "prompt"), [
    ("/v1/completions", {"prompt": PROMPT}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": PROMPT}]}),
])
def test_a_request_wins(run_server: Callable[..., Any], path: str, prompt: dict[str, Any]) -> None:
    """The defaults are what the same request without them would have to ask for; each of its own values wins, a larger
    number of tokens too."""
    sampling = {"temperature": 0.0, "repetition_penalty": 1.7, "max_tokens": 5, "top_k": 3}
    with run_server(sampling=sampling) as served:
        def choices(**body: Any) -> Any:
            response = served.http.post(path, json=prompt | {"ignore_eos": True} | body)
            assert response.status_code == 200, response.text
            answer = response.json()
            return answer["choices"], answer["usage"]["completion_tokens"]

        plain = choices()
        assert plain == choices(**sampling)
        assert plain[1] == 5
        assert choices(max_tokens=9)[1] == 9
        off = {"temperature": 1.0, "repetition_penalty": 1.0, "top_k": 0, "max_tokens": 20, "seed": 3}
        ours = choices(**off)
        assert ours != choices(max_tokens=20)
        assert served.http.get("/info").json()["model"]["sampling"] == {"top_p": 1.0, "min_p": 0.0, **sampling}
    with run_server() as served:
        assert choices(**off) == ours
