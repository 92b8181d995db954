"""The functions that a request offers to the model, and what it says of their use, in whatever API."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fptq_server.errors import APIError
from fptq_server.protocol import AssistantTurn, ChatMessage, TextPart

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
    return {"type": "function", "function": {key: value for key, value in given.items() if value is not None}}


def make_tools(functions: Sequence[Mapping[str, Any]], choice: str | None, only: str | None,
               parallel: bool | None, param: str = "tool_choice") -> Tools:
    """Raises APIError where the choice has nothing to choose from."""
    names = [tool["function"]["name"] for tool in functions]
    for i, name in enumerate(names):
        if not NAME.fullmatch(name):
            raise APIError(400, f"tools.{i}: the name {name!r} must have 1 to 128 letters, digits or any of _-.:/",
                           param=f"tools.{i}")
        if name in names[:i]:
            raise APIError(400, f"tools.{i}: there are two functions {name}", param=f"tools.{i}")
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


def template_messages(messages: Sequence[ChatMessage | AssistantTurn]) -> list[dict[str, Any]]:
    """Chat completions' messages as templates take them, but for what ChatFormat knows of the model."""
    return [_template_message(message) for message in messages]


def _template_message(message: ChatMessage | AssistantTurn) -> dict[str, Any]:
    content = message.content if isinstance(message.content, str) else "\n".join(
        part.text for part in message.content or () if isinstance(part, TextPart))
    given: dict[str, Any] = {"role": message.role, "content": content}
    if message.name is not None:
        given["name"] = message.name
    if isinstance(message, ChatMessage):
        return given if message.tool_call_id is None else {**given, "tool_call_id": message.tool_call_id}
    if reasoning := message.reasoning_content or message.reasoning:
        given["reasoning_content"] = reasoning
    if message.tool_calls:
        given["tool_calls"] = [template_call(call.id, call.function.name, call.function.arguments)
                               for call in message.tool_calls]
    return given


def template_call(call_id: str, name: str, arguments: str | Mapping[str, Any]) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": template_arguments(arguments)}}
