"""Agents' loops through each protocol, streamed and not: a tool is called, told its result, and the answer says it. The
model is weak, so that grammars decide what it says; what tools do is real."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest

from tests.server.conftest import Served

Tool = tuple[str, dict[str, Any], Callable[[dict[str, Any]], dict[str, Any]]]  # name, schema, what it does


def schema(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def chat(url: str, stream: bool, tool: Tool, say: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    name, parameters, act = tool
    messages: list[Any] = [{"role": "user", "content": "Do it."}]
    options: dict[str, Any] = {"model": "demo", "max_completion_tokens": 300, "tools": [
        {"type": "function", "function": {"name": name, "strict": True, "parameters": parameters}}]}
    with openai.OpenAI(base_url=url + "/v1", api_key="none") as client:
        def ask(**more: Any) -> Any:
            if not stream:
                return client.chat.completions.create(messages=messages, **options, **more).choices[0].message
            with client.chat.completions.stream(messages=messages, **options, **more) as events:
                return events.get_final_completion().choices[0].message

        message = ask(tool_choice={"type": "function", "function": {"name": name}})
        [call] = message.tool_calls
        result = act(json.loads(call.function.arguments))
        messages += [message.model_dump(), {"role": "tool", "tool_call_id": call.id, "content": json.dumps(result)}]
        form = {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": say(result)}}
        return json.loads(ask(tool_choice="none", response_format=form).content)


def responses(url: str, stream: bool, tool: Tool, say: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    name, parameters, act = tool
    options: dict[str, Any] = {"model": "demo", "max_output_tokens": 300, "tools": [
        {"type": "function", "name": name, "strict": True, "parameters": parameters}]}
    with openai.OpenAI(base_url=url + "/v1", api_key="none") as client:
        def ask(**more: Any) -> Any:
            if not stream:
                return client.responses.create(**options, **more)
            with client.responses.stream(**options, **more) as events:
                return events.get_final_response()

        first = ask(input="Do it.", tool_choice={"type": "function", "name": name})
        [call] = first.output
        result = act(json.loads(call.arguments))
        given = {"type": "function_call_output", "call_id": call.call_id, "output": json.dumps(result)}
        form = {"format": {"type": "json_schema", "name": "answer", "strict": True, "schema": say(result)}}
        last = ask(input=[given], previous_response_id=first.id, tool_choice="none", text=form)
        return json.loads(last.output_text)


def messages(url: str, stream: bool, tool: Tool, say: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    name, parameters, act = tool
    turns: list[Any] = [{"role": "user", "content": "Do it."}]
    options: dict[str, Any] = {"model": "demo", "max_tokens": 300, "tools": [
        {"name": name, "input_schema": parameters}]}
    with anthropic.Anthropic(base_url=url, api_key="none") as client:
        def ask(**more: Any) -> Any:
            if not stream:
                return client.messages.create(messages=turns, **options, **more)
            with client.messages.stream(messages=turns, **options, **more) as events:
                return events.get_final_message()

        message = ask(tool_choice={"type": "tool", "name": name})
        [call] = message.content
        result = act(call.input)
        turns += [{"role": "assistant", "content": message.content}, {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": call.id, "content": json.dumps(result)}]}]
        last = ask(tool_choice={"type": "none"},
                   output_config={"format": {"type": "json_schema", "schema": say(result)}})
        return json.loads(last.content[0].text)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("protocol", [chat, responses, messages], ids=lambda protocol: protocol.__name__)
def test_the_weather(served: Served, protocol: Callable[..., Any], stream: bool) -> None:
    degrees = {"Paris": 7, "Rome": 15}
    tool: Tool = ("get_weather", schema(city={"enum": ["Paris", "Rome"]}),
                  lambda arguments: {"degrees": degrees[arguments["city"]]})
    said = protocol(served.url, stream, tool, lambda result: schema(degrees={"const": result["degrees"]}))
    assert said["degrees"] in degrees.values()


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("protocol", [chat, responses, messages], ids=lambda protocol: protocol.__name__)
def test_editing_a_file(served: Served, tmp_path: Path, protocol: Callable[..., Any], stream: bool) -> None:
    (tmp_path / "a.txt").write_text("old\n")

    def edit(arguments: dict[str, Any]) -> dict[str, Any]:
        file = tmp_path / arguments["path"]
        file.write_text(file.read_text().replace(arguments["old"], arguments["new"]))
        return {"text": file.read_text()}

    parameters = schema(path={"const": "a.txt"}, old={"const": "old"}, new={"enum": ["new\n\"é\"", "a\\b"]})
    tool: Tool = ("edit_file", parameters, edit)
    said = protocol(served.url, stream, tool, lambda result: schema(text={"const": result["text"]}))
    assert said["text"] == (tmp_path / "a.txt").read_text() in ("new\n\"é\"\n", "a\\b\n")
