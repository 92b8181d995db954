"""LFM2: <|tool_call_start|>[f(a=1)]<|tool_call_end|>, or JSON between the two."""

from __future__ import annotations

from fptq_server.parsers.frame import JsonCalls, Steps
from fptq_server.parsers.pythonic import Pythonic


class Lfm2(Pythonic):
    name = "lfm2"
    marks = ("<|tool_call_start|>",)
    openers = ("<|tool_call_start|>",)
    inner = ("<|tool_call_end|>",)
    bare = ""
    json_calls = JsonCalls('{"name": "{name}", "arguments": ', "}", ", ", "<|tool_call_start|>[", "]<|tool_call_end|>")

    def call(self, opener: str) -> Steps[None]:
        if (yield from self.json_follows()):
            yield from self.json_call_list()
        else:
            yield from self.call_list(known=False)
        yield from self.close("<|tool_call_end|>")
