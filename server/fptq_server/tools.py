"""The functions that a request offers to the model, and what it says of their use, in whatever API."""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fptq_server.errors import APIError
from fptq_server.protocol import AssistantTurn, ChatMessage, TextPart, ToolChoiceObject, ToolTurn, without_nulls

NAME = re.compile(r"[\w.:/-]{1,128}", re.ASCII)  # what every format of calls can carry


@dataclass(frozen=True)
class Tools:
    """functions: as OpenAI's chat completions have them, {"type": "function", "function": {"name": …}}. choice: auto,
    none or required. only: the one that must be called. parallel: several calls in one answer."""

    functions: tuple[Mapping[str, Any], ...] = ()
    choice: str = "auto"
    only: str | None = None
    parallel: bool = True

    @property
    def offered(self) -> tuple[Mapping[str, Any], ...]:
        """What the model is told of."""
        return () if self.choice == "none" else self.functions

    @property
    def schemas(self) -> dict[str, Any]:
        """The parameters of every function that may be called, by name."""
        return {tool["function"]["name"]: tool["function"].get("parameters") or {"type": "object"}
                for tool in self.offered if self.only in (None, tool["function"]["name"])}


NO_TOOLS = Tools()


def function_tool(name: str, description: str | None, parameters: Mapping[str, Any] | None, strict: bool | None
                  ) -> dict[str, Any]:
    """A function as chat completions have it, without what is not given."""
    given = {"name": name, "description": description, "parameters": parameters, "strict": strict}
    return {"type": "function", "function": without_nulls(given)}


def chosen_tools(functions: Sequence[Mapping[str, Any]], given: str | ToolChoiceObject | None, parallel: bool | None
                 ) -> Tools:
    """By OpenAI's tool_choice: a word, one function, or those that are allowed. Raises APIError."""
    if given is None or isinstance(given, str):
        return make_tools(functions, given, None, parallel)
    if given.type == "function":
        name = given.name if given.function is None else given.function.name
        if name is None:
            raise APIError(400, "tool_choice.function is required", param="tool_choice.function", code="missing_field")
        return make_tools(functions, "required", name, parallel)
    if given.type != "allowed_tools":
        return make_tools(functions, given.type, None, parallel)
    mode, allowed = (given.mode, given.tools) if given.allowed_tools is None else \
        (given.allowed_tools.mode, given.allowed_tools.tools)
    if mode is None or allowed is None:
        raise APIError(400, "tool_choice of type allowed_tools needs mode and tools", param="tool_choice")
    names = [(each["function"] if isinstance(each.get("function"), dict) else each).get("name") for each in allowed]
    known = {tool["function"]["name"] for tool in functions}
    for name in names:
        if not isinstance(name, str) or name not in known:
            raise APIError(400, f"tool_choice allows the function {name}, which is not among the tools",
                           param="tool_choice")
    chosen = set(names)
    return make_tools([tool for tool in functions if tool["function"]["name"] in chosen], mode, None, parallel)


def make_tools(functions: Sequence[Mapping[str, Any]], choice: str | None, only: str | None,
               parallel: bool | None, param: str = "tool_choice") -> Tools:
    """choice: any is Anthropic's and Mistral's word for required. Raises APIError where it has nothing to choose
    from."""
    choice = "required" if choice == "any" else choice
    names: set[str] = set()
    for i, name in enumerate(tool["function"]["name"] for tool in functions):
        if not NAME.fullmatch(name):
            raise APIError(400, f"tools.{i}: the name {name!r} must have 1 to 128 letters, digits or any of _-.:/",
                           param=f"tools.{i}")
        if name in names:
            raise APIError(400, f"tools.{i}: there are two functions {name}", param=f"tools.{i}")
        names.add(name)
    if only is not None and only not in names:
        raise APIError(400, f"{param} names the function {only}, which is not among the tools", param=param)
    if choice == "required" and not names:
        raise APIError(400, f"{param} asks for a call, and there are no tools", param=param)
    return Tools(tuple(functions), choice or "auto", only, parallel is not False)


def template_arguments(arguments: str | Mapping[str, Any]) -> Any:
    """A call's arguments as chat templates take them: an object, unless the model once wrote something else."""
    if not isinstance(arguments, str):
        return dict(arguments)
    try:
        value = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        return arguments
    return value if isinstance(value, dict) else arguments


def template_messages(messages: Sequence[ChatMessage | AssistantTurn | ToolTurn]) -> list[dict[str, Any]]:
    """Chat completions' messages as templates take them, but for what ChatFormat knows of the model. Calls without an
    id get one, and results that name no call are those of the calls before them, in their order."""
    given = [_template_message(message) for message in messages]
    open_calls: OrderedDict[str, None] = OrderedDict()
    for place, message in enumerate(given):
        if "tool_calls" in message:
            for i, call in enumerate(message["tool_calls"]):
                call["id"] = call["id"] or f"call{place % 1000:03}{i % 100:02}"
            open_calls = OrderedDict.fromkeys(call["id"] for call in message["tool_calls"])
        elif message["role"] == "tool":
            answered = message.get("tool_call_id") or next(iter(open_calls), None)
            if answered is not None:
                message["tool_call_id"] = answered
                open_calls.pop(answered, None)
    return given


def _template_message(message: ChatMessage | AssistantTurn | ToolTurn) -> dict[str, Any]:
    content = message.content if isinstance(message.content, str) else "\n".join(
        part.text for part in message.content or () if isinstance(part, TextPart))
    given: dict[str, Any] = {"role": message.role, "content": content}
    if message.name is not None:
        given["name"] = message.name
    if isinstance(message, ToolTurn):
        return {**given, "tool_call_id": message.tool_call_id} if message.tool_call_id else given
    if isinstance(message, ChatMessage):
        return given
    if reasoning := message.reasoning_content or message.reasoning:
        given["reasoning_content"] = reasoning
    if message.tool_calls:
        given["tool_calls"] = [template_call(call.id, call.function.name, call.function.arguments)
                               for call in message.tool_calls]
    return given


def template_call(call_id: str, name: str, arguments: str | Mapping[str, Any]) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": template_arguments(arguments)}}
