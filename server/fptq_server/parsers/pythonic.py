"""Llama 4, and models prompted so: [f(a=1), g(b="x")]; Llama 4 may put tokens of its own around it."""

from __future__ import annotations

import ast
import json
import warnings
from typing import Any

from fptq_server.parsers.frame import NotACall, Steps
from fptq_server.parsers.llama3_json import Llama3Json

JSON_NAMES = {"true": True, "false": False, "null": None}


class Pythonic(Llama3Json):
    """Nothing marks a call but its being the whole answer, so every one must name one of the functions. They are told
    once the list is whole, since only that tells whether it is one. JSON is what a forced call is written in."""

    name = "pythonic"
    marks = ("<|python_start|>",)
    openers = ("<|python_start|>",)
    inner = ("<|python_end|>",)
    bare = "[{"

    def call(self, opener: str) -> Steps[None]:
        if (yield from self.json_follows()):
            yield from super().call(opener)
            return
        yield from self.call_list(known=True)
        yield from self.close("<|python_end|>")

    def call_list(self, *, known: bool) -> Steps[None]:
        calls: list[tuple[str, str]] = []
        yield from self.skip_space()
        yield from self.expect("[")
        while True:
            name, _ = yield from self.name_until("(")
            if known and name not in self.tools:
                raise NotACall
            calls.append((name, (yield from self._arguments())))
            yield from self.skip_space()
            if (yield from self.accept("]")):
                break
            yield from self.expect(",")
        for name, arguments in calls:
            self.start(name)
            self.arguments(arguments)

    def _arguments(self) -> Steps[str]:
        """Up to the closing parenthesis, as JSON."""
        arguments: dict[str, Any] = {}
        while (yield from self.skip_space()) != ")":
            key, _ = yield from self.name_until("=")
            yield from self.skip_space()
            value: list[str] = []
            yield from self.json_value(value.append, quotes="\"'", ends=",)]}")
            arguments[key] = _literal("".join(value))
            if (yield from self.skip_space()) != ")":
                yield from self.expect(",")
        yield from self.expect(")")
        try:
            return json.dumps(arguments, ensure_ascii=False)
        except (TypeError, RecursionError):
            raise NotACall from None


def _literal(text: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes that Python does not know
            return ast.literal_eval(_JsonNames().visit(ast.parse(text, mode="eval")))
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        raise NotACall from None


class _JsonNames(ast.NodeTransformer):
    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Constant(JSON_NAMES[node.id]) if node.id in JSON_NAMES else node
