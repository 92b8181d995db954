"""Mistral: [TOOL_CALLS][{"name": …, "arguments": {…}}], and since Small 3.2 [TOOL_CALLS]f[ARGS]{…}"""

from __future__ import annotations

import secrets
import string
from collections.abc import Mapping
from typing import Any

from fptq_server.parsers.frame import JsonCalls, NotACall, Parser, Steps


def nine_characters() -> str:
    """An id as Mistral's templates insist on."""
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))


class Mistral(Parser):
    name = "mistral"
    marks = ("[TOOL_CALLS]",)
    openers = ("[TOOL_CALLS]",)
    json_calls = JsonCalls('{"name": "{name}", "arguments": ', "}", ", ", "[TOOL_CALLS][", "]")

    def __init__(self, tools: Mapping[str, Any]) -> None:
        super().__init__(tools, nine_characters)

    def call(self, opener: str) -> Steps[None]:
        if (yield from self.skip_space()) in ("[", "{"):
            yield from self.json_call_list()
            return
        name, marker = yield from self.name_until("[ARGS]", "[CALL_ID]", "{")
        if marker == "[CALL_ID]":
            yield from self.until("[ARGS]")
        if marker == "{":
            self.back(marker)
        if (yield from self.skip_space()) != "{":
            raise NotACall
        self.start(name)
        yield from self.json_value(self.arguments)
