"""Granite 3: <|tool_call|>[{"name": …, "arguments": {…}}]; Granite 4 writes as Hermes does."""

from __future__ import annotations

from fptq_server.parsers.frame import JsonCalls, Parser, Steps


class Granite(Parser):
    name = "granite"
    marks = ("<|tool_call|>",)
    openers = ("<|tool_call|>", "<tool_call>")
    inner = ("</tool_call>",)
    json_calls = JsonCalls('{"name": "{name}", "arguments": ', "}", ", ", "<|tool_call|>[", "]")

    def call(self, opener: str) -> Steps[None]:
        yield from self.skip_space()
        yield from self.json_call_list()
        yield from self.close("</tool_call>")
