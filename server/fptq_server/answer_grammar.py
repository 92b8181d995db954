"""The grammar of an answer in which calls are forced, or strict: the markers of the model's own format around JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from fptq_runtime.engine.grammar import Grammar, embedded
from fptq_server.parsers.frame import Parser
from fptq_server.parsers.reasoning import ReasoningFormat
from fptq_server.tools import Tools

MOST_CALLS = 16  # in one answer: a weak model would write calls without end
NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


def enforced_schema(tool: Mapping[str, Any], forced: bool) -> dict[str, Any]:
    """What a call's arguments must be: any object, unless calls are forced or the function is strict."""
    function = tool["function"]
    if not forced and not function.get("strict"):
        return {"type": "object"}
    return {"type": "object", **(function.get("parameters") or NO_PARAMETERS)}


def literal(text: str, tokens: Mapping[str, int]) -> str:
    """A text in llguidance's Lark. tokens: the tokenizer's added tokens by their text, which no string of a grammar can
    stand for."""
    split = re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")
    parts, end = [], 0
    for match in split.finditer(text):
        parts += [text[end : match.start()], match[0]]
        end = match.end()
    return " ".join(f"<[{tokens[part]}]>" if part in tokens else json.dumps(part, ensure_ascii=False)
                    for part in [*parts, text[end:]] if part)


class AnswerGrammar:
    """Rules in llguidance's Lark. tokens: as `literal` takes them."""

    def __init__(self, parser: type[Parser], tools: Tools, tokens: Mapping[str, int],
                 reasoning: ReasoningFormat | None, opened: bool) -> None:
        self._parser = parser
        self._tools = tools
        self._tokens = tokens
        self._rules = [r"TEXT: /(.|\n)*/"]
        self._start = self._thinking(reasoning, opened)

    def calls(self) -> Grammar:
        """Nothing but calls."""
        return self._grammar(self._calls(forced=True, start=0))

    def calls_or(self, structured: Grammar) -> Grammar:
        """Calls, or an answer of a JSON schema."""
        self._rules.append(f"answer: {embedded(json.loads(structured.text))}")
        return self._grammar(f"({self._calls(forced=False, start=0)} | answer)" if self._tools.offered else "answer")

    def calls_in_text(self) -> Grammar:
        """Any text, in which what begins as a call is one."""
        form = self._parser.json_calls
        opener = next((opener for opener in self._parser.openers if (form.before + form.open).startswith(opener)), None)
        if opener is None:  # calls are the whole answer
            self._rules.append(r"PLAIN: /([^{\[\s](.|\n)*)?/")
            return self._grammar(f"({self._calls(forced=False, start=0)} | PLAIN)")
        if opener in self._tokens:
            begin = f"TEXT {self._literal(opener)}"
        else:
            self._rules.append(f"begin[lazy]: TEXT {self._literal(opener)}")
            begin = "begin"
        self._rules.append(f"turn: {begin} {self._calls(forced=False, start=len(opener))}")
        return self._grammar("turn* TEXT")

    def _calls(self, forced: bool, start: int) -> str:
        """One call after the other. start: so much of the first one's beginning stands already."""
        form = self._parser.json_calls
        first: list[str] = []
        call: list[str] = []
        for i, tool in enumerate(self._tools.offered):
            name = tool["function"]["name"]
            if self._tools.only not in (None, name):
                continue
            self._rules.append(f"arguments{i}: {embedded(enforced_schema(tool, forced))}")
            opening = form.open.replace("{name}", name)
            for rules, text in ((first, (form.before + opening)[start:]), (call, opening)):
                rules.append(f"{self._literal(text)} arguments{i} {self._literal(form.close)}")
        self._rules += [f"first: {' | '.join(first)}", f"call: {' | '.join(call)}"]
        more = f"({self._literal(form.between)} call){{0,{MOST_CALLS - 1}}}"
        several = self._tools.parallel and self._tools.only is None and not form.single
        return f"first {more if several else ''} {self._literal(form.after)}"

    def _thinking(self, form: ReasoningFormat | None, opened: bool) -> str:
        """What an answer may begin with, or, where the prompt opened the reasoning, begins with."""
        if form is None:
            return ""
        if self._literal(form.end).startswith("<["):
            thought = f"TEXT {self._literal(form.end)}"
        else:
            self._rules.append(f"thought[lazy]: TEXT {self._literal(form.end)}")
            thought = "thought"
        self._rules.append(r"BREAK: /\n{0,2}/")
        return f"{thought} BREAK" if opened else f"({self._literal(form.begin)} {thought} BREAK)?"

    def _grammar(self, answer: str) -> Grammar:
        return Grammar.lark("\n".join([f"start: {self._start} {answer}", *self._rules]))

    def _literal(self, text: str) -> str:
        return literal(text, self._tokens)
