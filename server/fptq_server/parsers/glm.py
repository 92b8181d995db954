"""GLM 4.5 to 5: <tool_call>f<arg_key>k</arg_key><arg_value>v</arg_value></tool_call>"""

from __future__ import annotations

from fptq_server.parsers.frame import Steps
from fptq_server.parsers.hermes import Hermes


class Glm(Hermes):
    """Values that are no strings are JSON; strings stand as they are."""

    name = "glm"
    marks = ("<arg_key>",)
    inner = ("</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")

    def call(self, opener: str) -> Steps[None]:
        if (yield from self.skip_space()) == "{":
            yield from super().call(opener)
            return
        name, marker = yield from self.name_until("<arg_key>", "</tool_call>")
        self.back(marker)
        self.start(name)
        while True:
            self.mark()
            yield from self.skip_space()
            if not (yield from self.accept("<arg_key>")):
                break
            key = (yield from self.until("</arg_key>")).strip()
            yield from self.skip_space()
            yield from self.expect("<arg_value>")
            if (yield from self.member(key, "</arg_value>")) is None:
                return
        self.end_members()
        yield from self.close("</tool_call>")
