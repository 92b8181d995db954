"""Mistral: [TOOL_CALLS][{"name": …, "arguments": {…}}], and since Small 3.2 [TOOL_CALLS]f[ARGS]{…}"""

from __future__ import annotations

from fptq_server.parsers.frame import JsonCalls, NotACall, Parser, Steps


class Mistral(Parser):
    name = "mistral"
    marks = ("[TOOL_CALLS]",)
    openers = ("[TOOL_CALLS]",)
    inner = ("[ARGS]", "[CALL_ID]")
    id_length = 9
    json_calls = JsonCalls('{"name": "{name}", "arguments": ', "}", ", ", "[TOOL_CALLS][", "]")

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
