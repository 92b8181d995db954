"""gpt-oss: messages on channels, <|channel|>commentary to=functions.f <|constrain|>json<|message|>{…}<|call|>"""

from __future__ import annotations

import re

from fptq_server.parsers.frame import JsonCalls, NotACall, Parser, Steps

HEADER = re.compile(r"(?:<\|start\|>assistant)?\s*(?:to=(?P<before>[\w.:/-]+))?\s*"
                    r"<\|channel\|>(?P<channel>analysis|commentary|final)\s*(?:to=(?P<after>[\w.:/-]+))?\s*"
                    r"(?:<\|constrain\|>)?\s*(?:json|code)?\s*")
MAX_HEADER = 256  # characters
ENDS = ("<|end|>", "<|call|>", "<|return|>")


class Harmony(Parser):
    """Every message is a call to its reader: to a function, or to the user, or to nobody, which is reasoning."""

    name = "harmony"
    marks = ("<|channel|>",)
    openers = ("<|start|>assistant", "<|channel|>", "to=functions.")
    inner = ("<|message|>", "<|constrain|>", *ENDS)
    always = True
    json_calls = JsonCalls("<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>", "", single=True)

    def call(self, opener: str) -> Steps[None]:
        header = ""

        def emit(text: str) -> None:
            nonlocal header
            header += text
            if len(header) > MAX_HEADER:
                raise NotACall

        if (yield from self.find(("<|message|>",), emit)) is None:
            raise NotACall
        message = HEADER.fullmatch(opener + header)
        if message is None:
            raise NotACall
        self.commit()
        if self.tools and (recipient := message["after"] or message["before"]):
            self.start(recipient.removeprefix("functions."))
            yield from self.find(ENDS, self.arguments)
        else:
            yield from self.find(ENDS, self.reasoning if message["channel"] == "analysis" else self.content)
