"""What templates that differ get of a conversation with tools."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from fptq_runtime.models.tokenizer import Tokenizer
from fptq_server.chat_format import ChatFormat
from fptq_server.tools import NO_TOOLS, Tools, template_call
from tests.models.test_tokenizer import DEMO, IGNORED

TOOLS = Tools(({"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}},
               {"type": "function", "function": {"name": "f"}}))
NATIVE = "{{ tools | tojson if tools else '' }}<tool_call>{% for m in messages %}{{ m | tojson }}{% endfor %}"
CALL = template_call("call_0123456789abc", "now", '{"a": 1}')
HISTORY: list[dict[str, Any]] = [
    {"role": "user", "content": "u"}, {"role": "assistant", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call_0123456789abc", "content": "r"}, {"role": "user", "content": "v"}]


def chat_format(path: Path, template: str, special: tuple[str, ...] = (), **parsers: str) -> ChatFormat:
    shutil.copytree(DEMO, path, ignore=IGNORED)
    (path / "chat_template.jinja").write_text(template)
    backend = Backend.from_file(str(path / "tokenizer.json"))
    backend.add_special_tokens([AddedToken(token, special=True) for token in special])
    backend.save(str(path / "tokenizer.json"))
    return ChatFormat(Tokenizer(path), **parsers)


def test_a_template_that_takes_tools_gets_them_as_they_are(tmp_path: Path) -> None:
    chat = chat_format(tmp_path / "m", NATIVE)
    assert chat.variables(TOOLS) == {"tools": list(TOOLS.functions)}
    assert chat.variables(NO_TOOLS) == {}
    messages = chat.messages(HISTORY, TOOLS)
    assert messages[1] == {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert [message["role"] for message in messages] == ["user", "assistant", "tool", "user"]


def test_ids_of_mistrals_length(tmp_path: Path) -> None:
    chat = chat_format(tmp_path / "m", NATIVE.replace("<tool_call>", "[TOOL_CALLS]"))
    _, assistant, tool, _ = chat.messages(HISTORY, TOOLS)
    assert assistant["tool_calls"][0]["id"] == tool["tool_call_id"] == "456789abc"


def test_a_template_that_takes_arguments_as_text(tmp_path: Path) -> None:
    chat = chat_format(tmp_path / "m", "{{ tools }}<tool_call>{% for m in messages %}{% for c in m.tool_calls or [] %}"
                                       "{{ '' + c.function.arguments }}{% endfor %}{% endfor %}")
    assert chat.messages(HISTORY, TOOLS)[1]["tool_calls"][0]["function"]["arguments"] == '{"a": 1}'


@pytest.mark.parametrize(("limit", "calls"), [("", 2), ("{% if (m.tool_calls or []) | length > 1 %}"
                                                        "{{ raise_exception('one') }}{% endif %}", 1)])
def test_a_template_that_takes_one_call_gets_no_more_to_take(tmp_path: Path, limit: str, calls: int) -> None:
    template = f"{{{{ tools }}}}<tool_call>{{% for m in messages %}}{limit}{{{{ m.content }}}}{{% endfor %}}"
    chat = chat_format(tmp_path / "m", template)
    text = '<tool_call>{"name": "now", "arguments": {}}</tool_call>' * 2
    assert len(chat.reading([5], TOOLS).answer(0, [text]).calls) == calls


def test_a_template_that_takes_tools_in_the_system_message(tmp_path: Path) -> None:
    template = ("{% for m in messages %}{{ m.role }}{{ m.content }}{% if m.tools %}<|tool|>{{ m.tools }}<|/tool|>"
                "{% endif %}{% endfor %}")
    chat = chat_format(tmp_path / "m", template)
    for system in ([], [{"role": "system", "content": "s"}]):
        messages = chat.messages([*system, *HISTORY], TOOLS)
        assert json.loads(messages[0]["tools"]) == [tool["function"] for tool in TOOLS.functions]
        assert messages[0]["content"] == "".join(message["content"] for message in system)
        assert messages[-3]["tool_calls"] == [CALL]


@pytest.mark.parametrize("template", [
    "{% for m in messages %}{{ m.role }}{{ m.content }}{% endfor %}",
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}{{ m.content }}"
    "{% endfor %}",
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('no') }}{% endif %}"
    "{{ m.content }}{% endfor %}",
])
@pytest.mark.parametrize("system", [[], [{"role": "system", "content": "s"}]])
def test_a_template_that_takes_no_tools_is_told_of_them_in_text(tmp_path: Path, template: str, system: list[Any]
                                                               ) -> None:
    chat = chat_format(tmp_path / "m", template)
    given = system if "raise" not in template else []
    messages = chat.messages([*given, *HISTORY], TOOLS)
    assert chat.variables(TOOLS) == {}
    chat._tokenizer.apply_chat_template(messages)
    assert all(json.dumps(tool["function"]) in messages[0]["content"] for tool in TOOLS.functions)
    assert messages[0]["content"].startswith("s\n\n") is bool(given)
    *_, assistant, response = messages
    assert assistant == {"role": "assistant",
                         "content": '<tool_call>\n{"name": "now", "arguments": {"a": 1}}\n</tool_call>'}
    assert response == {"role": "user", "content": "<tool_response>\nr\n</tool_response>\n\nv"}


@pytest.mark.parametrize(("template", "role"), [(NATIVE, "system"), (NATIVE + "{# developer #}", "developer")])
def test_developers_are_systems_where_a_template_knows_none(tmp_path: Path, template: str, role: str) -> None:
    chat = chat_format(tmp_path / "m", template)
    assert chat.messages([{"role": "developer", "content": "x"}])[0]["role"] == role


def test_the_special_tokens_that_are_read_are_shown(tmp_path: Path) -> None:
    special = ("<tool_call>", "</tool_call>", "<think>", "</think>", "<|x|>")
    chat = chat_format(tmp_path / "m", NATIVE + "</think>", special)
    added = chat._tokenizer.added_tokens
    assert {added[i] for i in chat.shown_special_tokens(TOOLS)} == set(special[:4])
    assert {added[i] for i in chat.shown_special_tokens(NO_TOOLS)} == {"<think>", "</think>"}
    chat = chat_format(tmp_path / "n", NATIVE, ("<|start|>", "<|channel|>"), tool_parser="harmony")
    assert len(chat.shown_special_tokens(NO_TOOLS)) == 2, "its answers are messages too"


@pytest.mark.parametrize(("parsers", "content", "reasoning", "calls"), [
    ({}, "", "Hm.", 1),
    ({"tool_parser": "none"}, '<tool_call>{"name": "f"}</tool_call>', "Hm.", 0),
    ({"reasoning_parser": "none"}, "<think>Hm.</think>", "", 1),
    ({"tool_parser": "granite", "reasoning_parser": "mistral"}, "<think>Hm.</think>", "", 1),
    ({"tool_parser": "phi4"}, '<tool_call>{"name": "f"}</tool_call>', "Hm.", 0),
])
def test_parsers_by_name(tmp_path: Path, parsers: dict[str, str], content: str, reasoning: str, calls: int) -> None:
    chat = chat_format(tmp_path / "m", NATIVE + "</think>", **parsers)
    answer = chat.reading([5], TOOLS).answer(0, ['<think>Hm.</think><tool_call>{"name": "f"}</tool_call>'])
    assert (answer.content, answer.reasoning, len(answer.calls)) == (content, reasoning, calls)
