"""Hermes 2 and 3, Qwen 2.5 and 3, Granite 4, SmolLM3: <tool_call>{"name": …, "arguments": {…}}</tool_call>"""

from __future__ import annotations

from typing import ClassVar

from fptq_server.parsers.frame import JsonCalls, Parser, Steps


class Hermes(Parser):
    name = "hermes"
    marks: ClassVar[tuple[str, ...]] = ("<tool_call>",)
    openers: ClassVar[tuple[str, ...]] = ("<tool_call>",)
    inner: ClassVar[tuple[str, ...]] = ("</tool_call>",)
    json_calls = JsonCalls('<tool_call>\n{"name": "{name}", "arguments": ', "}\n</tool_call>", "\n")

    def call(self, opener: str) -> Steps[None]:
        yield from self.skip_space()
        yield from self.json_call_list()
        yield from self.close("</tool_call>")
