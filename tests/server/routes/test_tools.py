"""Tools and reasoning in /v1/chat/completions; what the SDK's own accumulator makes of a stream is the oracle."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema_rs
import openai
import pytest

from fptq_runtime.engine.request import FinishReason
from fptq_runtime.models.tokenizer import Tokenizer
from tests.server.conftest import Served, events, scripted

TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "get_weather", "strict": True, "description": "The weather of a city.",
                                      "parameters": {"type": "object", "properties": {"city": {"type": "string"}},
                                                     "required": ["city"], "additionalProperties": False}}},
    {"type": "function", "function": {"name": "now", "strict": True, "parameters": {
        "type": "object", "properties": {}, "additionalProperties": False}}},
]
MESSAGES: list[Any] = [{"role": "user", "content": "Is it warm in Paris?"}]
OPTIONS: dict[str, Any] = {"model": "demo", "messages": MESSAGES, "tools": TOOLS, "temperature": 0}
CALLS = ('I look it up.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Pa\\"ris\\n😀"}}\n</tool_call>\n'
         '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>')
EXPECTED = [("get_weather", {"city": 'Pa"ris\n😀'}), ("now", {})]
TEMPLATE = """{%- if tools %}{{ '[TOOLS]' + tools | tojson + '[/TOOLS]' }}{% endif %}
{%- for m in messages %}
{{- '[' + m.role + ']' + m.content }}
{%- if m.reasoning_content %}{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}
{%- for call in m.tool_calls or [] %}
{{- '<tool_call>' + call.function.name + '|' + (call.function.arguments | tojson) + '</tool_call>' }}
{%- endfor %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '[assistant]' }}{% if enable_thinking is defined and enable_thinking %}
{{- '<think>\n' }}{% endif %}{% endif %}"""


@pytest.fixture(scope="module")
def native(model_path: Path, tmp_path_factory: pytest.TempPathFactory, run_server: Callable[..., Any]
           ) -> Iterator[Served]:
    """A model whose template takes tools and has it think."""
    path = tmp_path_factory.mktemp("native") / "model"
    shutil.copytree(model_path, path, ignore=shutil.ignore_patterns("*.safetensors"))
    (path / "chat_template.jinja").write_text(TEMPLATE)
    with run_server(tokenizer=Tokenizer(path)) as served:
        yield served


@pytest.fixture(scope="module")
def native_client(native: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=native.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def calls_of(message: Any) -> list[tuple[str, Any]]:
    return [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls or []]


def test_calls_whole_and_streamed(client: openai.OpenAI, served: Served) -> None:
    with scripted(served, CALLS):
        whole = client.chat.completions.create(**OPTIONS)
        with client.chat.completions.stream(**OPTIONS) as stream:
            kinds = [event.type for event in stream]
            streamed = stream.get_final_completion()
    for answer in (whole, streamed):
        [choice] = answer.choices
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content == "I look it up."
        assert calls_of(choice.message) == EXPECTED
        ids = [call.id for call in choice.message.tool_calls or []]
        assert len(set(ids)) == 2 and all(i.startswith("call_") for i in ids)
    assert kinds.count("tool_calls.function.arguments.done") == 2
    assert kinds.count("tool_calls.function.arguments.delta") > 4, "arguments come as they are written"


def test_deltas_are_openais(served: Served) -> None:
    """id, type and name once for each call; then pieces of its arguments; nothing but what changed."""
    with scripted(served, CALLS):
        chunks = events(served.http.post("/v1/chat/completions", json=OPTIONS | {"stream": True}).text)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert deltas[-1] == {}
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["tool_calls"]
    entries = [entry for delta in deltas for entry in delta.get("tool_calls", [])]
    for index in (0, 1):
        first, *rest = [entry for entry in entries if entry["index"] == index]
        assert set(first) == {"index", "id", "type", "function"}
        assert set(first["function"]) == {"name", "arguments"}
        assert all(set(entry) == {"index", "function"} and set(entry["function"]) == {"arguments"} for entry in rest)


def test_only_calls(client: openai.OpenAI, served: Served) -> None:
    with scripted(served, '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'):
        [choice] = client.chat.completions.create(**OPTIONS).choices
    assert choice.message.content is None
    assert calls_of(choice.message) == [("now", {})]


def test_cut_short(client: openai.OpenAI, served: Served) -> None:
    with scripted(served, CALLS[: CALLS.index('{"city') + 5], FinishReason.LENGTH):
        [choice] = client.chat.completions.create(**OPTIONS).choices
    assert choice.finish_reason == "length"
    [call] = choice.message.tool_calls or []
    assert call.function.arguments == '{"cit'  # type: ignore[union-attr]


@pytest.mark.parametrize("options", [{"tool_choice": "none"}, {"tools": []}])
def test_without_tools_it_is_text(client: openai.OpenAI, served: Served, options: dict[str, Any]) -> None:
    with scripted(served, CALLS):
        [choice] = client.chat.completions.create(**OPTIONS | options).choices
        chunks = list(client.chat.completions.create(**OPTIONS | options, stream=True))
    assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == (CALLS, None, "stop")
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == CALLS


def test_one_call_where_they_are_not_to_be_parallel(client: openai.OpenAI, served: Served) -> None:
    with scripted(served, CALLS):
        [choice] = client.chat.completions.create(**OPTIONS, parallel_tool_calls=False).choices
        with client.chat.completions.stream(**OPTIONS, parallel_tool_calls=False) as stream:
            [streamed] = stream.get_final_completion().choices
    assert calls_of(choice.message) == calls_of(streamed.message) == EXPECTED[:1]


def test_every_choice_has_its_own_calls(client: openai.OpenAI, served: Served) -> None:
    with scripted(served, CALLS):
        answer = client.chat.completions.create(**OPTIONS, n=2)
        with client.chat.completions.stream(**OPTIONS, n=2) as stream:
            streamed = stream.get_final_completion()
    for choices in (answer.choices, streamed.choices):
        assert [calls_of(choice.message) for choice in choices] == [EXPECTED, EXPECTED]


def test_an_answer_can_be_sent_back(client: openai.OpenAI, served: Served) -> None:
    """As the SDK dumps it; then what the calls returned."""
    with scripted(served, CALLS):
        message = client.chat.completions.create(**OPTIONS).choices[0].message
        results = [{"role": "tool", "tool_call_id": call.id, "content": "7"} for call in message.tool_calls or []]
        for dumped in (message, message.model_dump(), message.model_dump(exclude_none=True)):
            answer = client.chat.completions.create(**OPTIONS | {"messages": [*MESSAGES, dumped, *results]})
            assert answer.choices[0].finish_reason == "tool_calls"


def test_calls_and_results_as_agents_write_them(native: Served) -> None:
    """Without ids, without what is null, with parts, as objects: one conversation, and one prompt."""
    call = {"id": "c1", "type": "function", "function": {"name": "now", "arguments": '{"a": 1}'}}
    result: dict[str, Any] = {"role": "tool", "tool_call_id": "c1", "content": ""}
    said = {"role": "assistant", "content": "", "tool_calls": [call]}
    schema = {"type": "object", "properties": {"a": {"const": None}}}
    function = {"name": "now", "parameters": schema}
    plain = {"messages": [*MESSAGES, said, result], "tools": [{"type": "function", "function": function}]}
    nulls = {**function, "strict": None, "description": None, "parameters": {**schema, "required": None}}
    others = [
        {"messages": [*MESSAGES, {**said, "content": content, "tool_calls": [{**call, **of_call}]},
                      {**result, **of_result}], "tools": [{"function": nulls, "type": None}]}
        for content, of_call, of_result in [
            ([], {"index": 0, "type": None}, {"content": None}), (None, {"extra_content": {"x": 1}}, {"content": []}),
            ("", {"function": {"name": "now", "arguments": {"a": 1}}}, {"content": [""], "is_error": False}),
            ("", {"id": None}, {"tool_call_id": None}), ("", {"id": ""}, {"tool_call_id": ""})]]
    with scripted(native, "x") as asked:
        for body in (plain, *others):
            response = native.http.post("/v1/chat/completions", json={**body, "max_tokens": 1})
            assert response.status_code == 200, response.text
    assert all(prompt == asked[0][0] for prompt, _ in asked)


def test_some_of_the_tools_are_allowed(native: Served, tokenizer: Tokenizer) -> None:
    """In the shape of chat completions and in that of responses."""
    named = [{"type": "function", "function": {"name": "now"}}]
    flat = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "now"}]}
    with scripted(native, "x") as asked:
        for choice in ({"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": named}}, flat):
            body = {"messages": MESSAGES, "tools": TOOLS, "tool_choice": choice, "max_tokens": 1}
            assert native.http.post("/v1/chat/completions", json=body).status_code == 200
    for prompt, _ in asked:
        told = json.loads(tokenizer.decode(prompt).partition("[TOOLS]")[2].partition("[/TOOLS]")[0])
        assert [tool["function"]["name"] for tool in told] == ["now"]


def test_what_a_model_is_told_whose_template_takes_no_tools(served: Served, tokenizer: Tokenizer) -> None:
    """The functions in its system message, calls and results as text."""
    calls = [{"id": "c1", "type": "function", "function": {"name": "now", "arguments": "{}"}},
             {"id": "c2", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "é"}'}}]
    messages = [{"role": "system", "content": "Be brief."}, *MESSAGES,
                {"role": "assistant", "content": None, "tool_calls": calls},
                {"role": "tool", "tool_call_id": "c1", "content": "noon"},
                {"role": "tool", "tool_call_id": "c2", "content": [{"type": "text", "text": "7 °C"}]}]
    with scripted(served, "x") as asked:
        assert served.http.post("/v1/chat/completions", json=OPTIONS | {"messages": messages}).status_code == 200
    system = "\n".join(json.dumps(tool["function"]) for tool in TOOLS)
    said = ('<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>\n<tool_call>\n'
            '{"name": "get_weather", "arguments": {"city": "é"}}\n</tool_call>')
    back = "<tool_response>\nnoon\n</tool_response>\n<tool_response>\n7 °C\n</tool_response>"
    text = tokenizer.decode(asked[0][0])
    assert text.startswith("Be brief.\n\n")
    assert system in text
    assert text.endswith(f"\n\nIs it warm in Paris?\n\n{said}\n\n{back}\n\n")


def test_the_template_gets_tools_calls_and_reasoning(native: Served, tokenizer: Tokenizer) -> None:
    calls = [{"id": "c1", "type": "function", "function": {"name": "now", "arguments": '{"a": [1]}'}},
             {"id": "c2", "type": "function", "function": {"name": "now", "arguments": "not JSON"}}]
    messages = [*MESSAGES, {"role": "assistant", "content": None, "reasoning_content": "Hm.", "tool_calls": calls},
                {"role": "tool", "tool_call_id": "c1", "content": "noon"}]
    with scripted(native, "x") as asked:
        body = {"messages": messages, "tools": TOOLS, "max_tokens": 1}
        assert native.http.post("/v1/chat/completions", json=body).status_code == 200
        assert native.http.post("/v1/chat/completions", json=body | {"tool_choice": "none"}).status_code == 200
    history = ('[user]Is it warm in Paris?[assistant]<think>Hm.</think><tool_call>now|{"a": [1]}</tool_call>'
               '<tool_call>now|"not JSON"</tool_call>[tool]noon[assistant]')
    told, untold = [tokenizer.decode(prompt) for prompt, _ in asked]
    assert told == f"[TOOLS]{json.dumps(TOOLS)}[/TOOLS]{history}"
    assert untold == history


def test_reasoning(native: Served, native_client: openai.OpenAI) -> None:
    output = f"<think>\nHe asks for 😀.\n</think>\n\n{CALLS}"
    with scripted(native, output):
        [whole] = native_client.chat.completions.create(**OPTIONS).choices
        chunks = list(native_client.chat.completions.create(**OPTIONS, stream=True))
        [hidden] = native_client.chat.completions.create(**OPTIONS, extra_body={"include_reasoning": False}).choices
    assert whole.message.reasoning_content == "He asks for 😀."  # type: ignore[attr-defined]
    assert whole.message.content == "I look it up."
    assert calls_of(whole.message) == calls_of(hidden.message) == EXPECTED
    assert not hasattr(hidden.message, "reasoning_content")
    deltas = [chunk.choices[0].delta.model_dump() for chunk in chunks]
    assert "".join(delta.get("reasoning_content") or "" for delta in deltas) == "He asks for 😀."
    assert "".join(delta["content"] or "" for delta in deltas) == "I look it up."


def test_reasoning_that_the_prompt_begins(native: Served, native_client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "demo", "messages": MESSAGES}
    with scripted(native, "Hm.</think>Yes."):
        [thought] = native_client.chat.completions.create(**options, reasoning_effort="low").choices
        [kwargs] = native_client.chat.completions.create(
            **options, extra_body={"chat_template_kwargs": {"enable_thinking": True}}).choices
        [plain] = native_client.chat.completions.create(**options, reasoning_effort="none").choices
    for choice in (thought, kwargs):
        assert choice.message.content == "Yes."
        assert choice.message.reasoning_content == "Hm."  # type: ignore[attr-defined]
    assert plain.message.content == "Hm.</think>Yes."


@pytest.mark.parametrize(("extra", "param"), [
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
    ({"tool_choice": "any"}, "tool_choice"), ({"tool_choice": "some"}, "tool_choice"),
    ({"tool_choice": {"type": "function"}, "tools": TOOLS}, "tool_choice.function"),
    ({"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"name": "f"}]}}, "tool_choice"),
    ({"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"name": ["now"]}]}}, "tool_choice"),
    ({"tool_choice": {"type": "custom", "custom": {"name": "f"}}, "tools": TOOLS}, "tool_choice.type"),
    ({"tools": [*TOOLS, TOOLS[0]]}, "tools.2"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0"),
    ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
    ({"tools": [{"type": "function"}]}, "tools.0.function"),
    ({"tools": [{"type": "function", "function": {"name": "f", "params": {}}}]}, "tools.0.function.params"),
    ({"reasoning_effort": "high"}, "reasoning_effort"),
    ({"reasoning_effort": "huge"}, "reasoning_effort"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"id": "x", "type": "function"}]}]},
     "messages.0.tool_calls.0.function"),
], ids=str)
def test_refusals(served: Served, extra: dict[str, Any], param: str) -> None:
    response = served.http.post("/v1/chat/completions", json={"messages": MESSAGES} | extra)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize("extra", [{"tool_choice": "none"}, {"tool_choice": "auto"}, {"parallel_tool_calls": True},
                                   {"reasoning_effort": "none"}, {"include_reasoning": False}, {"tools": None}])
def test_what_asks_for_nothing_is_taken(served: Served, extra: dict[str, Any]) -> None:
    body = {"messages": MESSAGES, "max_tokens": 1}
    assert served.http.post("/v1/chat/completions", json=body | extra).status_code == 200


def check_call(call: Any) -> None:
    """Its name is a tool's, its arguments match that one's schema, by jsonschema-rs."""
    [schema] = [tool["function"]["parameters"] for tool in FORCED if tool["function"]["name"] == call.function.name]
    jsonschema_rs.validate(schema, json.loads(call.function.arguments))


FORCED: list[Any] = [
    {"type": "function", "function": {"name": "book", "parameters": {
        "type": "object", "required": ["city", "nights"], "additionalProperties": False,
        "properties": {"city": {"enum": ["Paris", "Rome"]},
                       "nights": {"type": "integer", "minimum": 1, "maximum": 30}}}}},
    {"type": "function", "function": {"name": "cancel", "parameters": {
        "type": "object", "required": ["id"], "additionalProperties": False,
        "properties": {"id": {"type": "string", "pattern": "^[a-c]{3}$"}}}}},
]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "cancel"}}], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_required_calls_match_their_schemas(client: openai.OpenAI, choice: Any, seed: int) -> None:
    """A model that never learned to call has no other choice; hot, too."""
    options: dict[str, Any] = {"model": "demo", "messages": MESSAGES, "tools": FORCED, "tool_choice": choice,
                               "temperature": 2.0, "seed": seed, "max_completion_tokens": 900}
    [choice_] = client.chat.completions.create(**options).choices
    chunks = list(client.chat.completions.create(**options, stream=True))
    calls = choice_.message.tool_calls or []
    assert choice_.message.content is None
    assert choice_.finish_reason == "tool_calls"
    assert calls
    for call in calls:
        check_call(call)
    if choice != "required":
        assert [call.function.name for call in calls] == ["cancel"]  # type: ignore[union-attr]
    arguments: dict[int, str] = {}
    for chunk in chunks:
        assert not chunk.choices[0].delta.content
        for entry in chunk.choices[0].delta.tool_calls or []:
            arguments[entry.index] = arguments.get(entry.index, "") + (entry.function.arguments or "")  # type: ignore[union-attr]
    assert list(arguments.values()) == [call.function.arguments for call in calls]  # type: ignore[union-attr]


def test_one_required_call_where_they_are_not_to_be_parallel(client: openai.OpenAI) -> None:
    for seed in range(4):
        [choice] = client.chat.completions.create(
            model="demo", messages=MESSAGES, tools=FORCED, tool_choice="required", parallel_tool_calls=False, seed=seed,
            temperature=2.0, max_completion_tokens=400).choices
        assert len(choice.message.tool_calls or []) == 1


def test_strict_calls_in_text_match_their_schemas(served: Served, client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    """Where a call begins, and nowhere else, the grammar binds."""
    tools: list[Any] = [{**tool, "function": {**tool["function"], "strict": True}} for tool in FORCED]
    [free] = client.chat.completions.create(model="demo", messages=MESSAGES, tools=tools, seed=1, temperature=1.5,
                                            max_completion_tokens=20).choices
    assert free.message.content
    with scripted(served, "x") as asked:
        client.chat.completions.create(model="demo", messages=MESSAGES, tools=tools)
    grammar = asked[0][1].structured
    assert grammar is not None
    matcher = served.engine.engine.grammars.parser(grammar).deep_copy()
    good = 'Well.\n<tool_call>\n{"name": "cancel", "arguments": {"id": "abc"}}\n</tool_call>\n'
    for output, accepted in ((good, True), ("Well, <tool", True), (good + good, True),
                             (good.replace("abc", "abd"), False), (good.replace("cancel", "drop"), False)):
        ids = tokenizer.encode(output, add_special_tokens=False)
        fresh = matcher.deep_copy()
        assert (fresh.try_consume_tokens(ids) == len(ids) and fresh.is_accepting()) is accepted


def test_an_answer_in_a_form_or_a_call(client: openai.OpenAI) -> None:
    """Agents ask for both at once: the last answer in a form, and calls before it."""
    schema = {"type": "object", "properties": {"warm": {"type": "boolean"}}, "required": ["warm"],
              "additionalProperties": False}
    form: Any = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    kinds = set()
    for seed in range(8):
        [choice] = client.chat.completions.create(
            model="demo", messages=MESSAGES, tools=FORCED, response_format=form, seed=seed, temperature=2.0,
            max_completion_tokens=800).choices
        kinds.add(choice.finish_reason)
        if choice.message.tool_calls:
            assert choice.message.content is None
        else:
            jsonschema_rs.validate(schema, json.loads(choice.message.content or ""))
    assert "stop" in kinds


def test_a_schema_that_cannot_be_enforced_is_named(served: Served) -> None:
    tools = [FORCED[0], {"type": "function", "function": {"name": "f", "strict": True, "parameters": {
        "type": "object", "properties": {"v": {"not": {"type": "string"}}}}}}]
    for choice in ("required", "auto"):
        body = {"messages": MESSAGES, "tools": tools, "tool_choice": choice}
        error = served.http.post("/v1/chat/completions", json=body).json()["error"]
        assert error["param"] == "tools.1.function.parameters"
        assert "not" in error["message"]
    del tools[1]["function"]["strict"]
    with scripted(served, "x"):
        assert served.http.post("/v1/chat/completions", json=body).status_code == 200, "not asked to hold it"
