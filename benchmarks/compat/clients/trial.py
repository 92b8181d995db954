"""What the scripts of all clients share: where the server is, and how a thing that is tried tells its end."""

from __future__ import annotations

import json
import os
from collections.abc import Callable

URL = os.environ.get("FPTQ_URL", "http://127.0.0.1:8000")  # without /v1
MODEL = os.environ.get("FPTQ_MODEL", "demo")
KEY = "none"

PROMPT = "Once upon a time there was a king who"
MESSAGES = [{"role": "user", "content": "Tell me of a king."}]
SCHEMA = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer",
          "minimum": 0, "maximum": 99}}, "required": ["name", "age"], "additionalProperties": False}
TOOL = {"type": "function", "function": {"name": "weather", "description": "The weather of a city.", "parameters": {
        "type": "object", "properties": {"city": {"type": "string", "enum": ["Paris", "Oslo"]}}, "required": ["city"],
        "additionalProperties": False}}}


def trial(name: str) -> Callable[[Callable[[], object]], None]:
    """Runs the decorated function at once and prints a JSON line: it passes unless it raises. What our server refuses
    by name is told apart from what fails."""

    def run(attempt: Callable[[], object]) -> None:
        try:
            attempt()
            result, why = "pass", ""
        except BaseException as error:  # some clients end the program
            text = " ".join(str(error).split())
            refused = any(word in text for word in ("not_supported", "not supported by this server", "there is no "
                                                    "endpoint", "unknown_field"))
            result, why = "refused" if refused else "fail", f"{type(error).__name__}: {text}"[:300]
        print(json.dumps({"tried": name, "result": result, "why": why}), flush=True)

    return run


def check(condition: object, what: object = "") -> None:
    if not condition:
        raise AssertionError(f"unexpected: {what}")
