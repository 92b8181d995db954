"""Every format's grammar of calls: what it accepts is what the format's parser reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fptq_runtime.engine.grammar import Grammar, Grammars
from fptq_server.answer_grammar import AnswerGrammar
from fptq_server.chat_format import ChatFormat
from fptq_server.parsers import REASONING_FORMATS, TOOL_PARSERS
from fptq_server.parsers.frame import Parser
from fptq_server.tools import Tools
from tests.server.test_chat_format import chat_format

FUNCTIONS = tuple({"type": "function", "function": {"name": name, "strict": True, "parameters": {
    "type": "object", "required": ["n"], "additionalProperties": False, "properties": {"n": {"type": kind}}}}}
    for name, kind in (("one", "integer"), ("two", "boolean")))
REQUIRED = Tools(FUNCTIONS, "required")
THINK = REASONING_FORMATS[-1]


class Judge:
    """Whether a grammar accepts a text, over the demo's vocabulary and the format's special tokens."""

    def __init__(self, chat: ChatFormat) -> None:
        self._tokenizer = chat._tokenizer
        self._grammars = Grammars(self._tokenizer.to_json, self._tokenizer.vocab_size, [1])

    def __call__(self, grammar: Grammar, text: str) -> bool:
        matcher = self._grammars.parser(grammar, timeout=60).deep_copy()
        ids = self._tokenizer.encode(text, add_special_tokens=False)
        return bool(matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting())


@pytest.fixture(scope="module", params=TOOL_PARSERS, ids=lambda parser: parser.name)
def parser(request: pytest.FixtureRequest) -> type[Parser]:
    result: type[Parser] = request.param
    return result


@pytest.fixture(scope="module", params=["special", "plain"])
def chat(request: pytest.FixtureRequest, parser: type[Parser], tmp_path_factory: pytest.TempPathFactory) -> ChatFormat:
    """Of a tokenizer that has the format's markers as tokens, and of one that has not."""
    special = [marker for marker in (*parser.openers, *parser.inner, "<think>", "</think>") if " " not in marker]
    special = [marker.removesuffix("assistant") for marker in special]
    path = tmp_path_factory.mktemp(parser.name)
    return chat_format(path / "m", "{{ messages }}", tuple(special) if request.param == "special" else (),
                       tool_parser=parser.name)


@pytest.fixture(scope="module")
def judge(chat: ChatFormat) -> Judge:
    return Judge(chat)


def grammar(chat: ChatFormat, tools: Tools, **options: Any) -> AnswerGrammar:
    tokens = {token: i for i, token in chat._tokenizer.added_tokens.items()}
    return AnswerGrammar(chat.parser, tools, tokens, **{"reasoning": None, "opened": False, **options})


def written(parser: type[Parser], *calls: tuple[str, str]) -> str:
    form = parser.json_calls
    texts = [form.open.replace("{name}", name) + arguments + form.close for name, arguments in calls]
    return form.before + form.between.join(texts) + form.after


ONE, TWO, WRONG = ("one", '{"n": 7}'), ("two", '{"n": true}'), ("one", '{"n": true}')


def test_calls(chat: ChatFormat, parser: type[Parser], judge: Judge) -> None:
    several = not parser.json_calls.single
    rules = grammar(chat, REQUIRED).calls()
    assert judge(rules, written(parser, ONE))
    assert judge(rules, written(parser, TWO, ONE)) is several
    for text in ("", "No.", written(parser, WRONG), written(parser, ("no", "{}"))):
        assert not judge(rules, text), text
    for tools in (Tools(FUNCTIONS, "required", parallel=False), Tools(FUNCTIONS, "required", only="one")):
        rules = grammar(chat, tools).calls()
        assert judge(rules, written(parser, ONE))
        assert not judge(rules, written(parser, ONE, ONE)) or not several
    assert not judge(rules, written(parser, TWO))


def test_what_is_accepted_is_read(chat: ChatFormat, parser: type[Parser], judge: Judge) -> None:
    answer = chat.reading([5], REQUIRED).answer(0, [written(parser, ONE)])
    assert [(call.name, json.loads(call.arguments)) for call in answer.calls] == [("one", {"n": 7})]
    assert answer.content == ""


def test_calls_in_text(chat: ChatFormat, parser: type[Parser], judge: Judge) -> None:
    if parser.json_calls.single:
        pytest.skip("its messages all begin alike")
    rules = grammar(chat, Tools(FUNCTIONS)).calls_in_text()
    for text in ("", "No.\n", "a < b", written(parser, ONE), written(parser, TWO, ONE)):
        assert judge(rules, text), text
    if not parser.bare:
        assert judge(rules, f"Well.\n{written(parser, ONE)}\nSo.")
        assert not judge(rules, f"Well.\n{written(parser, WRONG)}")
    assert not judge(rules, written(parser, WRONG))


def test_after_thinking(chat: ChatFormat, parser: type[Parser], judge: Judge) -> None:
    call = written(parser, ONE)
    opened = grammar(chat, REQUIRED, reasoning=THINK, opened=True).calls()
    assert judge(opened, f"Hm.\n</think>\n\n{call}")
    assert not judge(opened, call)
    may = grammar(chat, REQUIRED, reasoning=THINK).calls()
    assert judge(may, call)
    assert judge(may, f"<think>Hm.</think>{call}")
    form = grammar(chat, Tools(FUNCTIONS), reasoning=THINK, opened=True).calls_or(Grammar.json_schema({"enum": [5]}))
    assert judge(form, "Hm.</think>5")
    assert judge(form, f"Hm.</think>{call}")
    assert not judge(form, "Hm.</think>6")


def test_names_of_schemas_do_not_meet(chat: ChatFormat, parser: type[Parser], judge: Judge, tmp_path: Path) -> None:
    """A schema's own definitions stay its own."""
    functions = tuple({"type": "function", "function": {"name": name, "parameters": {
        "type": "object", "required": ["n"], "additionalProperties": False, "properties": {"n": {"$ref": "#/$defs/n"}},
        "$defs": {"n": {"type": kind}}}}} for name, kind in (("one", "integer"), ("two", "boolean")))
    rules = grammar(chat, Tools(functions, "required")).calls()
    assert judge(rules, written(parser, ONE)) and judge(rules, written(parser, TWO))
    assert not judge(rules, written(parser, WRONG))
