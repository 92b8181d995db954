"""What requests and the server tell the chat template, with transformers as the oracle."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers

from fptq_runtime.errors import FptqError
from fptq_runtime.models.tokenizer import Tokenizer
from fptq_server.config import ServerConfig
from fptq_server.main import check_template_variables, read_template
from tests.server.conftest import Served

TEMPLATE = """{%- set style = style | default("plain") -%}
{%- for message in messages -%}
[{{ message.role }}] {{ message.content | trim if trimmed else message.content }}
{% endfor -%}
{%- if enable_thinking is defined and enable_thinking %}(think){% endif -%}
{%- if add_generation_prompt %}[assistant] {{ style }} {{ "|".join(words or []) }}{% endif -%}"""
MESSAGES: list[dict[str, Any]] = [{"role": "user", "content": "A king?"}, {"role": "assistant", "content": "He lived "}]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("template") / "chat.jinja"
    path.write_text(TEMPLATE)
    return path


@pytest.fixture(scope="module")
def talking(run_server: Callable[..., Any], model_path: Path, template: Path) -> Iterator[Served]:
    with run_server(ServerConfig(chat_template_kwargs={"style": "grim"}),
                    tokenizer=Tokenizer(model_path, read_template(template))) as served:
        yield served


@pytest.fixture(scope="module")
def oracle(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("oracle")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model_path / name, path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def tokens(served: Served, **body: Any) -> list[int]:
    response = served.http.post("/tokenize", json={"messages": MESSAGES} | body)
    assert response.status_code == 200, response.text
    ids: list[int] = response.json()["tokens"]
    return ids


@pytest.mark.parametrize(("body", "variables"), [
    ({}, {"style": "grim", "add_generation_prompt": True}),
    ({"add_generation_prompt": False}, {"style": "grim"}),
    ({"chat_template_kwargs": {"style": "gay", "words": ["a", "b"]}},
     {"style": "gay", "words": ["a", "b"], "add_generation_prompt": True}),
    ({"chat_template_kwargs": {"enable_thinking": True, "nothing": None, "false": False, "messages": []}},
     {"style": "grim", "enable_thinking": True, "add_generation_prompt": True}),
    ({"continue_final_message": True}, {"style": "grim", "continue_final_message": True}),
    ({"continue_final_message": True, "add_generation_prompt": False, "chat_template_kwargs": {"trimmed": 1}},
     {"style": "grim", "continue_final_message": True, "trimmed": True}),
], ids=str)
def test_as_transformers_renders(talking: Served, oracle: Any, body: dict[str, Any], variables: dict[str, Any]) -> None:
    ids = tokens(talking, **body)
    expected = oracle.apply_chat_template(MESSAGES, tokenize=False, **variables)
    assert ids == oracle(expected, add_special_tokens=False).input_ids
    answer = talking.http.post("/v1/chat/completions", json={"messages": MESSAGES, "max_tokens": 1} | body)
    assert answer.json()["usage"]["prompt_tokens"] == len(ids)


@pytest.mark.parametrize(("body", "param", "named"), [
    ({"chat_template_kwargs": {"mood": 1}}, "chat_template_kwargs.mood", "it reads enable_thinking, style, trimmed"),
    ({"chat_template_kwargs": {"messages": [1]}}, "chat_template_kwargs.messages", "nothing that this model's"),
    ({"chat_template_kwargs": {"style": "\ud800"}}, "chat_template_kwargs", "not valid Unicode"),
    ({"add_generation_prompt": True, "continue_final_message": True}, "continue_final_message", "exclude each other"),
], ids=str)
def test_refusals(talking: Served, body: dict[str, Any], param: str, named: str) -> None:
    for path in ("/v1/chat/completions", "/tokenize"):
        response = talking.http.post(path, content=json.dumps({"messages": MESSAGES} | body),
                                     headers={"Content-Type": "application/json"})
        assert response.status_code == 400
        assert response.json()["error"]["param"] == param
        assert named in response.json()["error"]["message"]


def test_files_that_are_no_template(tmp_path: Path) -> None:
    for name, content, why in (("syntax", b"{% if %}", "chat template"), ("constant", b"Hello", "reads no messages"),
                               ("bytes", b"\xff", "cannot be read"), ("none", None, "cannot be read")):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(FptqError, match=why):
            read_template(tmp_path / name)


def test_a_default_that_is_not_read_is_named(model_path: Path, template: Path) -> None:
    tokenizer = Tokenizer(model_path, read_template(template))
    check_template_variables(ServerConfig(chat_template_kwargs={"style": "x"}), tokenizer)
    with pytest.raises(FptqError, match="reads no mood; it reads enable_thinking, style, trimmed, words"):
        check_template_variables(ServerConfig(chat_template_kwargs={"mood": "x"}), tokenizer)
