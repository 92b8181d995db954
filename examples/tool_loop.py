"""An agent with two tools and a bound on its turns: python tool_loop.py TASK [--model NAME]"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
from collections.abc import Callable
from typing import Any

from openai import APIConnectionError, OpenAI

MAX_TURNS = 5


def multiply(a: int, b: int) -> int:
    return a * b


def days_between(first: str, second: str) -> int:
    return abs((datetime.date.fromisoformat(second) - datetime.date.fromisoformat(first)).days)


NUMBER = {"type": "integer", "minimum": -1_000_000, "maximum": 1_000_000}
DATE = {"type": "string", "format": "date"}
TOOLS: dict[str, tuple[Callable[..., Any], str, dict[str, Any]]] = {
    "multiply": (multiply, "The product of two integers.", {"a": NUMBER, "b": NUMBER}),
    "days_between": (days_between, "The days between two dates.", {"first": DATE, "second": DATE}),
}


def described(name: str) -> dict[str, Any]:
    _, description, properties = TOOLS[name]
    parameters = {"type": "object", "properties": properties, "required": list(properties),
                  "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "description": description, "strict": True,
                                             "parameters": parameters}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("task")
    parser.add_argument("--model")
    args = parser.parse_args()

    client = OpenAI(base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"), api_key="none")
    model = args.model or client.models.list().data[0].id
    messages: list[Any] = [{"role": "user", "content": args.task}]
    tools: list[Any] = [described(name) for name in TOOLS]
    for turn in range(MAX_TURNS):
        choice: Any = "required" if turn == 0 else "auto" if turn < MAX_TURNS - 1 else "none"
        message = client.chat.completions.create(model=model, messages=messages, tools=tools, tool_choice=choice,
                                                 parallel_tool_calls=False, max_tokens=300,
                                                 temperature=0).choices[0].message
        messages.append(message)
        if not message.tool_calls:
            print(message.content)
            return
        for call in message.tool_calls:
            assert call.type == "function"
            act, arguments = TOOLS[call.function.name][0], json.loads(call.function.arguments)
            result = act(**arguments)
            print(f"{call.function.name}(**{arguments}) = {result}")
            messages.append({"role": "tool", "tool_call_id": call.id, "content": json.dumps(result)})


if __name__ == "__main__":
    try:
        main()
    except APIConnectionError as error:
        sys.exit(f"no server at {error.request.url}; `fptq serve ARTIFACT` starts one")
