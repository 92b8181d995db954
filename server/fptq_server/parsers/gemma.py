"""FunctionGemma: <start_function_call>call:f{k:<escape>v<escape>}<end_function_call>; Gemma 4 with its own tokens."""

from __future__ import annotations

import json
from typing import Any

from fptq_server.parsers.frame import NotACall, Steps
from fptq_server.parsers.hermes import Hermes

MAX_DEPTH = 64
FUNCTION_GEMMA, GEMMA_4 = "<start_function_call>", "<|tool_call>"


class Gemma(Hermes):
    """A call is told once it is whole: its values are neither JSON nor plain text. `<tool_call>` is what a forced call
    begins with."""

    name = "gemma"
    marks = (FUNCTION_GEMMA, GEMMA_4)
    openers = (FUNCTION_GEMMA, GEMMA_4, "<tool_call>")
    inner = ("<end_function_call>", "<escape>", "<tool_call|>", '<|"|>', "</tool_call>")

    def call(self, opener: str) -> Steps[None]:
        if opener == "<tool_call>":
            yield from super().call(opener)
            return
        quote, end = ('<|"|>', "<tool_call|>") if opener == GEMMA_4 else ("<escape>", "<end_function_call>")
        yield from self.skip_space()
        yield from self.expect("call:")
        name, _ = yield from self.name_until("{")
        arguments = json.dumps((yield from self._members(quote, 0)), ensure_ascii=False)
        self.start(name)
        self.arguments(arguments)
        yield from self.close(end)

    def _value(self, quote: str, depth: int) -> Steps[Any]:
        if depth > MAX_DEPTH:
            raise NotACall
        yield from self.skip_space()
        if (yield from self.accept(quote)):
            return (yield from self.until(quote))
        if (yield from self.accept("{")):
            return (yield from self._members(quote, depth + 1))
        if (yield from self.accept("[")):
            items: list[Any] = []
            if not (yield from self.accept("]")):
                while True:
                    items.append((yield from self._value(quote, depth + 1)))
                    yield from self.skip_space()
                    if (yield from self.accept("]")):
                        break
                    yield from self.expect(",")
            return items
        text = yield from self.value()
        try:
            return json.loads(text)
        except ValueError:
            return text

    def _members(self, quote: str, depth: int) -> Steps[dict[str, Any]]:
        """What is behind the opening brace, and the closing one."""
        members: dict[str, Any] = {}
        yield from self.skip_space()
        if (yield from self.accept("}")):
            return members
        while True:
            yield from self.skip_space()
            quoted = yield from self.accept(quote)
            key = yield from self.until(quote + ":" if quoted else ":")
            members[key.strip()] = yield from self._value(quote, depth)
            yield from self.skip_space()
            if (yield from self.accept("}")):
                return members
            yield from self.expect(",")
