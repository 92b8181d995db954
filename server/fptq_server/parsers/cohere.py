"""Command R7B and A: <|START_ACTION|>[{"tool_name": …, "parameters": {…}}]<|END_ACTION|>; Command R: Action: ```json"""

from __future__ import annotations

from fptq_server.parsers.frame import JsonCalls, Parser, Steps

RESPONSE = ("<|START_RESPONSE|>", "<|END_RESPONSE|>", "<|START_TEXT|>", "<|END_TEXT|>")
FENCE = "Action: ```json"


class Cohere(Parser):
    name = "cohere"
    marks = ("<|START_ACTION|>", "Write 'Action:'")
    openers = ("<|START_ACTION|>", FENCE, *RESPONSE)
    inner = ("<|END_ACTION|>",)
    json_calls = JsonCalls('{"tool_call_id": "0", "tool_name": "{name}", "parameters": ', "}", ", ",
                           "<|START_ACTION|>[", "]<|END_ACTION|>")

    def call(self, opener: str) -> Steps[None]:
        if opener in RESPONSE:  # they stand around the content
            return
        yield from self.json_call_list(("tool_name", "name"), known=opener == FENCE)
        yield from self.close("```" if opener == FENCE else "<|END_ACTION|>")
