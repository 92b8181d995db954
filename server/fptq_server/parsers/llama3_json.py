"""Llama 3.1 to 3.3: {"name": …, "parameters": {…}}, alone or after <|python_tag|>; several with ; between them."""

from __future__ import annotations

from typing import ClassVar

from fptq_server.parsers.frame import JsonCalls, Parser, Steps


class Llama3Json(Parser):
    """Nothing marks a call but its being the whole answer, so it must name one of the functions."""

    name = "llama3_json"
    marks: ClassVar[tuple[str, ...]] = ("<|python_tag|>", '"parameters": dictionary of argument name')
    openers: ClassVar[tuple[str, ...]] = ("<|python_tag|>",)
    inner: ClassVar[tuple[str, ...]] = ()
    bare = "{"
    json_calls = JsonCalls('{"name": "{name}", "parameters": ', "}", "; ")

    def call(self, opener: str) -> Steps[None]:
        while True:
            yield from self.json_call_list(known=True)
            self.mark()
            yield from self.skip_space()
            if not (yield from self.accept(";")) and (yield from self.peek()) != "{":
                return
