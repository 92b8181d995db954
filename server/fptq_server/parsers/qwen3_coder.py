"""Qwen3-Coder, Qwen 3.5, Nemotron 3: <tool_call><function=f><parameter=p>value</parameter></function></tool_call>"""

from __future__ import annotations

from fptq_server.parsers.frame import NotACall, Steps
from fptq_server.parsers.hermes import Hermes


class Qwen3Coder(Hermes):
    """Values stand as they are, so that only the function's schema tells a number from a string. The model leaves out
    the outer tag now and then."""

    name = "qwen3_coder"
    marks = ("<function=",)
    openers = ("<tool_call>", "<function=")
    inner = ("</tool_call>", "</function>", "<parameter=", "</parameter>")

    def call(self, opener: str) -> Steps[None]:
        if opener == "<tool_call>":
            if (yield from self.skip_space()) == "{":
                yield from super().call(opener)
                return
            yield from self.expect("<function=")
        name, _ = yield from self.name_until(">")
        if opener == "<function=" and name not in self.tools:
            raise NotACall
        self.start(name)
        while True:
            self.mark()
            yield from self.skip_space()
            if not (yield from self.accept("<parameter=")):
                break
            key = (yield from self.until(">")).strip()
            yield from self.accept("\n")
            if (yield from self.member(key, "\n</parameter>", "</parameter>")) is None:
                return
        self.end_members()
        yield from self.close("</function>")
        yield from self.close("</tool_call>")
