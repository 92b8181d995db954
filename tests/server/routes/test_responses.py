"""/v1/responses through the openai SDK; what its accumulator makes of a stream is the oracle."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema_rs
import openai
import pytest

from fptq_runtime.engine.request import FinishReason
from fptq_runtime.models.tokenizer import Tokenizer
from fptq_server.config import ServerConfig
from tests.server.conftest import Served, scripted
from tests.server.routes.test_tools import CALLS, EXPECTED, native  # noqa: F401

TOOLS: list[Any] = [
    {"type": "function", "name": "get_weather", "strict": True, "description": "The weather of a city.", "parameters": {
        "type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"],
        "additionalProperties": False}},
    {"type": "function", "name": "now", "strict": None, "parameters": {
        "type": "object", "properties": {}, "additionalProperties": False}},
]
OPTIONS: dict[str, Any] = {"model": "demo", "input": "Of a king.", "temperature": 0, "max_output_tokens": 20}


def streamed(client: openai.OpenAI, **options: Any) -> Any:
    with client.responses.stream(**options) as stream:
        for _ in stream:
            pass
        return stream.get_final_response()


def calls_of(response: Any) -> list[tuple[str, Any]]:
    return [(item.name, json.loads(item.arguments)) for item in response.output if item.type == "function_call"]


def test_text(client: openai.OpenAI, served: Served, tokenizer: Tokenizer) -> None:
    whole = client.responses.create(**OPTIONS, instructions="You tell tales.")
    body = {"messages": [{"role": "system", "content": "You tell tales."}, {"role": "user", "content": "Of a king."}],
            "temperature": 0, "max_tokens": 20}
    chat = served.http.post("/v1/chat/completions", json=body).json()
    assert whole.output_text == chat["choices"][0]["message"]["content"]
    assert (whole.status, whole.incomplete_details and whole.incomplete_details.reason) == (
        "incomplete", "max_output_tokens")
    with scripted(served, "Once."):
        for answer in (client.responses.create(**OPTIONS), streamed(client, **OPTIONS)):
            assert (answer.status, answer.output_text, answer.model) == ("completed", "Once.", "demo")
            assert answer.usage is not None
            assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens


def test_events_come_in_order(client: openai.OpenAI, served: Served) -> None:
    with scripted(served, CALLS):
        events = list(client.responses.create(**OPTIONS, tools=TOOLS, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type.removeprefix("response.") for event in events]
    assert kinds[:2] == ["created", "in_progress"]
    assert kinds[-1] == "completed"
    squeezed = [kind for i, kind in enumerate(kinds) if kind != kinds[i - 1]]
    call = ["output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done"]
    assert squeezed[2:-1] == ["output_item.added", "content_part.added", "output_text.delta", "output_text.done",
                              "content_part.done", "output_item.done", *call, *call]
    final = events[-1].response  # type: ignore[union-attr]
    for event in events:
        if event.type == "response.output_item.done":
            assert event.item == final.output[event.output_index]


def test_calls(client: openai.OpenAI, served: Served) -> None:
    with scripted(served, CALLS):
        for answer in (client.responses.create(**OPTIONS, tools=TOOLS), streamed(client, **OPTIONS, tools=TOOLS)):
            assert answer.output_text == "I look it up."
            assert calls_of(answer) == EXPECTED
            assert answer.status == "completed"
        one = client.responses.create(**OPTIONS, tools=TOOLS, parallel_tool_calls=False)
        none = client.responses.create(**OPTIONS, tools=TOOLS, tool_choice="none")
    assert calls_of(one) == EXPECTED[:1]
    assert none.output_text == CALLS


def test_forced_calls_and_forms(client: openai.OpenAI) -> None:
    options = OPTIONS | {"max_output_tokens": 400, "temperature": 1.5}
    for _ in range(2):
        call = client.responses.create(**options, tools=TOOLS, tool_choice={"type": "function", "name": "get_weather"})
        [(name, arguments)] = calls_of(call)
        assert name == "get_weather"
        jsonschema_rs.validate(TOOLS[0]["parameters"], arguments)
        schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"],
                  "additionalProperties": False}
        form: Any = {"format": {"type": "json_schema", "name": "n", "schema": schema, "strict": True}}
        jsonschema_rs.validate(schema, json.loads(client.responses.create(**options, text=form).output_text))


@pytest.mark.parametrize("mode", ["named", "sent"])
def test_a_conversation_goes_on(client: openai.OpenAI, served: Served, tokenizer: Tokenizer, mode: str) -> None:
    """From the response's id, or from its output sent back, and it is the same to the model."""
    with scripted(served, CALLS) as asked:
        first = client.responses.create(**OPTIONS, tools=TOOLS)
        results: Any = [{"type": "function_call_output", "call_id": item.call_id, "output": output} for item, output in
                        zip(first.output[1:], ["7", [{"type": "input_text", "text": "noon"}]], strict=True)
                        if item.type == "function_call"]
        sent = [{"role": "user", "content": "Of a king."}, *[item.model_dump() for item in first.output], *results]
        more: dict[str, Any] = {"input": sent} if mode == "sent" else {
            "previous_response_id": first.id, "input": results}
        second = client.responses.create(**OPTIONS | more, tools=TOOLS)
        client.responses.create(**OPTIONS | {"input": "So?"}, previous_response_id=second.id)
    told = tokenizer.decode(asked[1][0])
    assert told.endswith("<tool_response>\n7\n</tool_response>\n<tool_response>\nnoon\n</tool_response>\n\n")
    assert '{"name": "now", "arguments": {}}' in told
    last = tokenizer.decode(asked[2][0])
    assert last.count("I look it up.") == 2
    assert last.endswith("So?\n\n")


def test_references(client: openai.OpenAI, served: Served, tokenizer: Tokenizer) -> None:
    with scripted(served, "Once.") as asked:
        [item] = client.responses.create(**OPTIONS).output
        client.responses.create(**OPTIONS | {"input": [{"type": "item_reference", "id": item.id},
                                                       {"role": "user", "content": "So?"}]})
        with pytest.raises(openai.BadRequestError, match="no item"):
            client.responses.create(**OPTIONS | {"input": [{"type": "item_reference", "id": "msg_none"}]})
    assert tokenizer.decode(asked[1][0]) == "Once.\n\nSo?\n\n"


def test_stored_responses(client: openai.OpenAI, served: Served) -> None:
    with scripted(served, "Once."):
        first = client.responses.create(**OPTIONS, metadata={"a": "b"})
        second = streamed(client, **OPTIONS | {"input": "And?"}, previous_response_id=first.id)
        unstored = client.responses.create(**OPTIONS, store=False)
    again = client.responses.retrieve(first.id)
    assert again == first
    assert again.metadata == {"a": "b"}
    items = client.responses.input_items.list(second.id, order="asc").data
    assert [item.content[0].text for item in items] == ["Of a king.", "Once.", "And?"]  # type: ignore[union-attr]
    page = client.responses.input_items.list(second.id, limit=2)
    assert page.has_more and [item.id for item in page.data] == [items[2].id, items[1].id]
    assert [item.id for item in page] == [item.id for item in reversed(items)], "the SDK asks for the next page"
    client.responses.delete(first.id)
    for gone in (first.id, unstored.id, "resp_none"):
        for ask in (client.responses.retrieve, client.responses.delete, client.responses.cancel,
                    client.responses.input_items.list):
            with pytest.raises(openai.NotFoundError, match=gone):
                ask(gone)
        with pytest.raises(openai.BadRequestError, match=gone) as error:
            client.responses.create(**OPTIONS, previous_response_id=gone)
        assert (error.value.param, error.value.code) == ("previous_response_id", "previous_response_not_found")
    assert client.responses.retrieve(second.id).output_text == "Once.", "what went on from it is whole"


def test_in_the_background(client: openai.OpenAI, served: Served) -> None:
    options = OPTIONS | {"max_output_tokens": 10, "background": True}
    begun = client.responses.create(**options)
    assert (begun.status, begun.output) == ("in_progress", [])
    deadline = time.monotonic() + 30
    while (answer := client.responses.retrieve(begun.id)).status == "in_progress":
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert answer.status in ("completed", "incomplete")
    assert answer.output_text == client.responses.create(**options | {"background": False}).output_text
    long = client.responses.create(**options | {"max_output_tokens": 900, "input": "x", "temperature": 1})
    assert client.responses.cancel(long.id).status in ("cancelled", "completed", "incomplete")
    with pytest.raises(openai.BadRequestError, match="background"):
        client.responses.cancel(client.responses.create(**OPTIONS).id)
    assert served.engine.engine.num_running == 0


def test_a_file_outlives_the_server(run_server: Callable[..., Any], tmp_path: Path) -> None:
    config = ServerConfig(responses_db=tmp_path / "responses.db")
    with run_server(config) as served, openai.OpenAI(base_url=served.url + "/v1", api_key="none") as client:
        first = client.responses.create(**OPTIONS)
    with run_server(config) as served, openai.OpenAI(base_url=served.url + "/v1", api_key="none") as client:
        assert client.responses.retrieve(first.id) == first
        client.responses.create(**OPTIONS, previous_response_id=first.id)


def test_reasoning(native: Served) -> None:  # noqa: F811
    with openai.OpenAI(base_url=native.url + "/v1", api_key="none") as client:
        with scripted(native, f"Hm.\n</think>\n\n{CALLS}") as asked:
            options = OPTIONS | {"tools": TOOLS, "reasoning": {"effort": "low"}}
            whole, stream = client.responses.create(**options), streamed(client, **options)
            client.responses.create(**options | {"input": "So?"}, previous_response_id=whole.id)
        for answer in (whole, stream):
            thought, message, *calls = answer.output
            assert thought.type == "reasoning"
            assert [part.text for part in thought.content or []] == ["Hm."]
            assert message.type == "message"
            assert len(calls) == 2
            assert answer.usage is not None
            assert answer.usage.output_tokens_details.reasoning_tokens > 0
        assert "<think>Hm.</think>" in native.engine.engine.tokenizer.decode(asked[2][0])


def test_a_failure_in_a_stream(client: openai.OpenAI, served: Served) -> None:
    with scripted(served, "Once", FinishReason.ERROR):
        events = list(client.responses.create(**OPTIONS, stream=True))
    assert events[-1].type == "response.failed"
    assert events[-1].sequence_number == len(events) - 1
    assert events[-1].response.error is not None


@pytest.mark.parametrize("extra", [
    {"top_k": -1, "seed": 3, "stop": "x", "presence_penalty": 0.5, "logit_bias": {"3": 1}, "repetition_penalty": 1.1},
    {"include": ["web_search_call.action.sources", "reasoning.encrypted_content"], "prompt_cache_options": {}},
    {"reasoning": {"effort": "medium", "context": "auto", "mode": "standard"}, "request_id": "x", "priority": 0},
    {"input": [{"role": "user", "content": [""]}, {"type": "function_call", "call_id": "c", "name": "f", "async": False,
                                                   "arguments": {"a": 1}},
               {"type": "function_call_output", "call_id": "c", "output": []}]},
    {"tools": [{"type": "function", "name": "f", "parameters": None, "strict": None, "async": False}]},
], ids=str)
def test_what_other_servers_and_clients_send(served: Served, extra: dict[str, Any]) -> None:
    response = served.http.post("/v1/responses", json=OPTIONS | extra)
    assert response.status_code == 200, response.text
    items = served.http.get(f"/v1/responses/{response.json()['id']}/input_items").json()["data"]
    assert all(isinstance(item["arguments"], str) for item in items if item["type"] == "function_call")


@pytest.mark.parametrize(("extra", "param"), [
    ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
    ({"tools": [{"type": "mcp", "server_url": "x"}]}, "tools.0.type"),
    ({"input": [{"type": "computer_call", "id": "x"}]}, "input.0.type"),
    ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input.0.content.0.type"),
    ({"input": None}, "input"), ({"conversation": "c"}, "conversation"), ({"prompt": {"id": "p"}}, "prompt"),
    ({"truncation": "auto"}, "truncation"), ({"top_logprobs": 3}, "top_logprobs"), ({"nonsense": 1}, "nonsense"),
    ({"include": ["message.output_text.logprobs"]}, "include.0"),
    ({"reasoning": {"effort": "high"}}, "reasoning_effort"),
    ({"background": True, "stream": True}, "background"), ({"background": True, "store": False}, "background"),
    ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
    ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"not": {}}}}}, "text.format.schema"),
    ({"tool_choice": {"type": "function", "name": "f"}, "tools": TOOLS}, "tool_choice"),
    ({"tool_choice": "required"}, "tool_choice"), ({"tools": TOOLS[:1] * 2}, "tools.1"),
], ids=str)
def test_refusals(served: Served, extra: dict[str, Any], param: str) -> None:
    response = served.http.post("/v1/responses", json=OPTIONS | extra)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
