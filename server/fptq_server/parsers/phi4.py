"""Phi-4-mini: <|tool_call|>[{"name": …, "arguments": {…}}]<|/tool_call|>, or functools[{…}]"""

from __future__ import annotations

from fptq_server.parsers.frame import JsonCalls, Parser, Steps


class Phi4(Parser):
    name = "phi4"
    marks = ("<|tool|>",)
    openers = ("<|tool_call|>", "functools[")
    inner = ("<|/tool_call|>",)
    json_calls = JsonCalls('{"name": "{name}", "arguments": ', "}", ", ", "<|tool_call|>[", "]<|/tool_call|>")

    def call(self, opener: str) -> Steps[None]:
        if opener == "functools[":
            self.back("[")
        yield from self.json_call_list()
        yield from self.close("<|/tool_call|>")
