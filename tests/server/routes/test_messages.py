"""/v1/messages through the anthropic SDK; what its accumulator makes of a stream is the oracle."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import anthropic
import jsonschema_rs
import pytest

from fptq_runtime.engine.engine import QueueFullError
from fptq_runtime.engine.request import FinishReason
from fptq_runtime.models.tokenizer import Tokenizer
from fptq_server.config import ServerConfig
from tests.server.conftest import Served, refuse_first, scripted
from tests.server.routes.test_tools import CALLS, EXPECTED, native  # noqa: F401

MESSAGES: list[Any] = [{"role": "user", "content": "Is it warm in Paris?"}]
TOOLS: list[Any] = [
    {"name": "get_weather", "description": "The weather of a city.", "input_schema": {
        "type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"],
        "additionalProperties": False}},
    {"name": "now", "input_schema": {"type": "object", "properties": {}, "additionalProperties": False}},
]
OPTIONS: dict[str, Any] = {"model": "demo", "max_tokens": 20, "messages": MESSAGES}
GREEDY: dict[str, Any] = {"extra_body": {"temperature": 0}}  # what the SDK of today has no parameter for


@pytest.fixture(scope="module")
def claude(served: Served) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=served.url, api_key="none", max_retries=0) as client:
        yield client


def final(claude: anthropic.Anthropic, **options: Any) -> Any:
    with claude.messages.stream(**options) as stream:
        return stream.get_final_message()


def blocks(message: Any) -> list[Any]:
    """Of a message, without what is random in them."""
    return [block.model_dump(exclude={"id", "parsed_output"}, exclude_none=True) for block in message.content]


def test_text(claude: anthropic.Anthropic, served: Served, tokenizer: Tokenizer) -> None:
    whole = claude.messages.create(**OPTIONS, system="Be brief.", **GREEDY)
    streamed = final(claude, **OPTIONS, system=[{"type": "text", "text": "Be brief."}], **GREEDY)
    [block] = whole.content
    assert block.type == "text"
    assert (whole.role, whole.stop_reason, whole.model) == ("assistant", "max_tokens", "demo")
    assert blocks(streamed) == blocks(whole)
    prompt = len(tokenizer.apply_chat_template([{"role": "system", "content": "Be brief."}, *MESSAGES]))
    for message in (whole, streamed):
        usage = message.usage
        assert usage.input_tokens + (usage.cache_read_input_tokens or 0) == prompt
        assert usage.output_tokens == 20
        assert message.stop_reason == "max_tokens"
    chat = served.http.post("/v1/chat/completions", json={
        "messages": [{"role": "system", "content": "Be brief."}, *MESSAGES], "temperature": 0, "max_tokens": 20}).json()
    assert chat["choices"][0]["message"]["content"] == block.text


def test_events_come_in_anthropics_order(claude: anthropic.Anthropic, served: Served) -> None:
    with scripted(served, CALLS):
        events = list(claude.messages.create(**OPTIONS, tools=TOOLS, stream=True))
    kinds = [event.type for event in events]
    assert kinds[0] == "message_start"
    assert kinds[-2:] == ["message_delta", "message_stop"]
    order = [(event.type, event.index) for event in events if "block" in event.type]  # type: ignore[union-attr]
    for index in (0, 1, 2):
        own = [kind for kind, at in order if at == index]
        assert own == ["content_block_start", *["content_block_delta"] * (len(own) - 2), "content_block_stop"]
    assert [at for _, at in order] == sorted(at for _, at in order)


def test_tool_use(claude: anthropic.Anthropic, served: Served) -> None:
    with scripted(served, CALLS):
        whole = claude.messages.create(**OPTIONS, tools=TOOLS)
        streamed = final(claude, **OPTIONS, tools=TOOLS)
        [_, one] = claude.messages.create(**OPTIONS, tools=TOOLS, tool_choice={
            "type": "auto", "disable_parallel_tool_use": True}).content
        [text] = claude.messages.create(**OPTIONS, tools=TOOLS, tool_choice={"type": "none"}).content
    for message in (whole, streamed):
        assert message.stop_reason == "tool_use"
        first, *calls = blocks(message)
        assert first == {"type": "text", "text": "I look it up."}
        assert [(call["name"], call["input"]) for call in calls] == EXPECTED
    assert one.type == "tool_use"
    assert text.type == "text" and text.text == CALLS


def test_an_answer_and_its_results_can_be_sent_back(claude: anthropic.Anthropic, served: Served, tokenizer: Tokenizer
                                                   ) -> None:
    with scripted(served, CALLS):
        answer = claude.messages.create(**OPTIONS, tools=TOOLS)
        results: Any = [{"type": "tool_result", "tool_use_id": block.id, "content": content} for block, content in zip(
            answer.content[1:], ["7", [{"type": "text", "text": "noon"}]], strict=True) if block.type == "tool_use"]
    turns = [{"role": "assistant", "content": answer.content},
             {"role": "user", "content": [*results, {"type": "text", "text": "Well?", "cache_control": {
                 "type": "ephemeral"}}]}]
    with scripted(served, "x") as asked:
        claude.messages.create(**OPTIONS | {"messages": [*MESSAGES, *turns]}, tools=TOOLS)
        turns[0]["content"] = [block.model_dump() for block in answer.content]
        claude.messages.create(**OPTIONS | {"messages": [*MESSAGES, *turns]}, tools=TOOLS)
    one, two = [tokenizer.decode(prompt) for prompt, _ in asked]
    assert one == two
    assert "<tool_response>\n7\n</tool_response>\n<tool_response>\nnoon\n</tool_response>\n\nWell?" in one


@pytest.mark.parametrize("choice", [{"type": "any", "disable_parallel_tool_use": True},
                                    {"type": "tool", "name": "get_weather"}], ids=str)
def test_forced_calls_match_their_schemas(claude: anthropic.Anthropic, choice: Any) -> None:
    for seed in range(3):
        options: dict[str, Any] = {**OPTIONS, "max_tokens": 400, "tools": TOOLS, "tool_choice": choice,
                                   "extra_body": {"temperature": 1 + seed / 3}}
        for message in (claude.messages.create(**options), final(claude, **options)):
            assert message.stop_reason == "tool_use"
            for block in message.content:
                [schema] = [tool["input_schema"] for tool in TOOLS if tool["name"] == block.name]
                jsonschema_rs.validate(schema, block.input)


def test_a_form(claude: anthropic.Anthropic) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"],
              "additionalProperties": False}
    message = claude.messages.create(**OPTIONS | {"max_tokens": 200}, output_config={
        "format": {"type": "json_schema", "schema": schema}})
    [block] = message.content
    assert block.type == "text"
    jsonschema_rs.validate(schema, json.loads(block.text))


def test_thinking(native: Served) -> None:  # noqa: F811
    with anthropic.Anthropic(base_url=native.url, api_key="none") as claude:
        options = OPTIONS | {"tools": TOOLS}
        with scripted(native, f"Hm.</think>{CALLS}") as asked:
            asks: Any = {"type": "enabled", "budget_tokens": 1024}
            whole = claude.messages.create(**options, thinking=asks)
            streamed = final(claude, **options, thinking=asks)
        for message in (whole, streamed):
            thought, text, *calls = message.content
            assert (thought.type, thought.thinking) == ("thinking", "Hm.")
            assert (text.type, text.text) == ("text", "I look it up.")
            assert len(calls) == 2
        with scripted(native, "<think>Hm.</think>Yes."):
            [only] = claude.messages.create(**options).content
        assert (only.type, only.text) == ("text", "Yes."), "not asked to think"
        with scripted(native, "x") as again:
            claude.messages.create(**options | {"messages": [*MESSAGES, {"role": "assistant", "content": whole.content},
                                                             {"role": "user", "content": "So?"}]})
        decode = native.engine.engine.tokenizer.decode
        assert decode(asked[0][0]).endswith("[assistant]<think>\n")
        assert "<think>Hm.</think>" in decode(again[0][0])


def test_stop_sequences(claude: anthropic.Anthropic, served: Served) -> None:
    text = claude.messages.create(**OPTIONS, **GREEDY).content[0].text  # type: ignore[union-attr]
    stop = text[8:12]
    message = claude.messages.create(**OPTIONS, **GREEDY, stop_sequences=[stop])
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", stop)
    with scripted(served, "x", FinishReason.STOP):
        assert claude.messages.create(**OPTIONS).stop_reason == "end_turn"


def test_count_tokens(claude: anthropic.Anthropic) -> None:
    plain = claude.messages.count_tokens(model="demo", messages=MESSAGES).input_tokens
    told = claude.messages.count_tokens(model="demo", messages=MESSAGES, tools=TOOLS, system="Be brief.").input_tokens
    assert told > plain + 40
    usage = claude.messages.create(**OPTIONS).usage
    assert usage.input_tokens + (usage.cache_read_input_tokens or 0) == plain


@pytest.mark.parametrize("extra", [
    {"thinking": {"type": "adaptive"}}, {"thinking": {"type": "between_tools"}}, {"context_management": {"edits": []}},
    {"context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}},
    {"user_profile_id": "x", "workspace_id": "x", "diagnostics": {"previous_message_id": None}, "speed": "standard"},
    {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": []},
                  {"role": "user", "content": []}]},
    {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": [
        {"type": "tool_use", "id": "t", "name": "f", "input": None, "toolset_name": None}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": None}]}]},
], ids=str)
def test_what_agents_send(served: Served, extra: dict[str, Any]) -> None:
    response = served.http.post("/v1/messages", json=OPTIONS | extra)
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(("extra", "said"), [
    ({"max_tokens": 0}, "max_tokens"), ({"messages": []}, "messages"), ({"top_k": -1}, "top_k"),
    ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "image"),
    ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "web_search_20250305"),
    ({"tools": TOOLS, "tool_choice": {"type": "tool", "name": "f"}}, "tool_choice"),
    ({"tools": TOOLS, "tool_choice": {"type": "tool"}}, "tool_choice.name"),
    ({"tool_choice": {"type": "any"}}, "tool_choice"),
    ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking"),
    ({"mcp_servers": [{"url": "x"}]}, "mcp_servers"), ({"nonsense": 1}, "nonsense"),
    ({"messages": [{"role": "user", "content": "king " * 2000}]}, "maximum context length"),
], ids=str)
def test_refusals_are_anthropics(claude: anthropic.Anthropic, extra: dict[str, Any], said: str) -> None:
    with pytest.raises(anthropic.BadRequestError) as error:
        claude.messages.create(**OPTIONS | {name: value for name, value in extra.items() if name in (
            "max_tokens", "messages", "tools", "tool_choice", "thinking")}, extra_body=extra)
    body: Any = error.value.body
    assert body["type"] == "error"
    assert body["error"]["type"] == "invalid_request_error"
    assert said in body["error"]["message"]


def test_unknown_models(claude: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError) as error:
        claude.messages.create(**OPTIONS | {"model": "claude"})
    assert error.value.body["error"]["type"] == "not_found_error"  # type: ignore[index]


def test_a_full_queue_is_retried(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[Exception] = [QueueFullError(0.01), QueueFullError(0.01)]
    refuse_first(served, monkeypatch, answers)
    with anthropic.Anthropic(base_url=served.url, api_key="none", max_retries=0) as claude, \
            pytest.raises(anthropic.RateLimitError) as error:
        claude.messages.create(**OPTIONS)
    assert error.value.body["error"]["type"] == "rate_limit_error"  # type: ignore[index]
    with anthropic.Anthropic(base_url=served.url, api_key="none", max_retries=2) as claude:
        claude.messages.create(**OPTIONS)
    assert not answers


def test_keys(run_server: Callable[..., Any]) -> None:
    with run_server(ServerConfig(api_keys=("secret",))) as closed:
        with anthropic.Anthropic(base_url=closed.url, api_key="secret") as claude:
            claude.messages.create(**OPTIONS)
        with anthropic.Anthropic(base_url=closed.url, auth_token="secret") as claude:
            claude.messages.create(**OPTIONS)
        with anthropic.Anthropic(base_url=closed.url, api_key="wrong") as claude, \
                pytest.raises(anthropic.AuthenticationError) as error:
            claude.messages.create(**OPTIONS)
        assert error.value.body["error"]["type"] == "authentication_error"  # type: ignore[index]


def test_a_failure_in_a_stream(claude: anthropic.Anthropic, served: Served) -> None:
    with scripted(served, "Well", FinishReason.ERROR), pytest.raises(anthropic.APIStatusError) as error:
        final(claude, **OPTIONS)
    assert error.value.body["error"]["type"] == "api_error"  # type: ignore[index]


def test_an_agent_runs_to_its_end(claude: anthropic.Anthropic) -> None:
    """Forced to call first, then told the result, then forced to say it."""
    call = claude.messages.create(**OPTIONS | {"max_tokens": 300}, tools=TOOLS,
                                  tool_choice={"type": "tool", "name": "get_weather"})
    [block] = call.content
    assert block.type == "tool_use"
    schema = {"type": "object", "properties": {"degrees": {"const": 7}}, "required": ["degrees"],
              "additionalProperties": False}
    turns: list[Any] = [*MESSAGES, {"role": "assistant", "content": call.content}, {"role": "user", "content": [
        {"type": "tool_result", "tool_use_id": block.id, "content": '{"degrees": 7}'}]}]
    said = claude.messages.create(**OPTIONS | {"messages": turns, "max_tokens": 300}, tools=TOOLS,
                                  tool_choice={"type": "none"},
                                  output_config={"format": {"type": "json_schema", "schema": schema}})
    assert said.stop_reason == "end_turn"
    assert json.loads(said.content[0].text) == {"degrees": 7}  # type: ignore[union-attr]


def test_an_answer_goes_on_with_the_assistants_last_message(claude: anthropic.Anthropic, served: Served,
                                                           tokenizer: Tokenizer) -> None:
    begun = [*MESSAGES, {"role": "assistant", "content": "It is"}]
    with scripted(served, " warm.") as asked:
        message = claude.messages.create(**OPTIONS | {"messages": begun})
    assert tokenizer.decode(asked[0][0]).endswith("Is it warm in Paris?\n\nIt is")
    assert message.content[0].text == " warm."  # type: ignore[union-attr]


def test_a_call_that_is_cut_is_left_out(claude: anthropic.Anthropic, served: Served) -> None:
    with scripted(served, CALLS[: CALLS.index('"now"') + 20], FinishReason.LENGTH):
        message = claude.messages.create(**OPTIONS, tools=TOOLS)
    assert message.stop_reason == "max_tokens"
    assert [block.type for block in message.content] == ["text", "tool_use"]
