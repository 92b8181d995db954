"""Recorded outputs of each family, and what they say, whole and cut into pieces."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fptq_server.parsers import REASONING_FORMATS, TOOL_PARSERS, find_reasoning, find_tool_parser
from fptq_server.parsers.frame import Arguments, CallStart, Content, Delta, Parser, Reasoning
from fptq_server.parsers.reasoning import Thinking

TOOLS = {
    "get_weather": {"type": "object", "properties": {
        "city": {"type": "string"}, "days": {"type": "integer"}, "where": {"type": "object"}}},
    "now": {"type": "object", "properties": {}},
}
PARSERS = {parser.name: parser for parser in TOOL_PARSERS}
WEATHER = ("get_weather", {"city": "Paris", "days": 3})
NOW: tuple[str, dict[str, Any]] = ("now", {})


@dataclass
class Said:
    """What deltas add up to. Arguments are compared as JSON where they are JSON."""

    content: str = ""
    reasoning: str = ""
    calls: list[tuple[str, Any]] = field(default_factory=list)


def said(deltas: Sequence[Delta]) -> Said:
    result = Said()
    names: list[str] = []
    arguments: list[str] = []
    for delta in deltas:
        match delta:
            case Content(text):
                assert text
                result.content += text
            case Reasoning(text):
                assert text
                result.reasoning += text
            case CallStart(index, call_id, name):
                assert index == len(names)
                assert call_id
                names.append(name)
                arguments.append("")
            case Arguments(index, text):
                assert index == len(names) - 1, "one call is whole before the next begins"
                arguments[index] += text
    result.calls = list(zip(names, arguments, strict=True))
    return result


def read(parser: Parser, pieces: Sequence[str]) -> Said:
    deltas: list[Delta] = []
    for piece in pieces:
        deltas += parser.feed(piece)
    return said(deltas + parser.finish())


def make(name: str) -> Parser:
    """NAME; REASONING+NAME, with reasoning before the format; REASONING+ alone; "opened " where the prompt began it."""
    reasoning, plus, tools = name.rpartition("+")
    answer = PARSERS[tools](TOOLS) if tools else None
    if not plus:
        assert answer is not None
        return answer
    [form] = [form for form in REASONING_FORMATS if form.name == reasoning.removeprefix("opened ")]
    return Thinking(form, reasoning.startswith("opened "), answer)


DEEPSEEK_V3 = ("<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n"
               '{"city": "Paris", "days": 3}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n'
               "```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>")
DEEPSEEK_V31 = ("One moment.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>"
                '{"city": "Paris", "days": 3}<｜tool▁call▁end｜><｜tool▁call▁begin｜>now<｜tool▁sep｜>{}'
                "<｜tool▁call▁end｜><｜tool▁calls▁end｜>")
DSML = ('<｜DSML｜function_calls>\n<｜DSML｜invoke name="get_weather">\n'
        '<｜DSML｜parameter name="city" string="true">Paris</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="days" string="false">3</｜DSML｜parameter>\n</｜DSML｜invoke>\n'
        '<｜DSML｜invoke name="now">\n</｜DSML｜invoke>\n</｜DSML｜function_calls>')
HARMONY = ("<|channel|>analysis<|message|>The user asks for the weather.<|end|><|start|>assistant"
           "<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>"
           '{"city": "Paris", "days": 3}<|call|>')

# Format, output, content, reasoning, calls.
CALLS: list[tuple[str, str, str, str, list[tuple[str, Any]]]] = [
    ("hermes", '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris", "days": 3}}\n</tool_call>', "", "",
     [WEATHER]),
    ("hermes", 'I will look.\n\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris", "days": 3}}\n'
               '</tool_call>\n<tool_call>{"name": "now", "arguments": {}}</tool_call><|im_end|>\n',
     "I will look.<|im_end|>\n", "", [WEATHER, NOW]),
    ("hermes", '<tool_call>{"arguments": {"days": 3, "city": "Paris"}, "name": "get_weather"}</tool_call>', "", "",
     [WEATHER]),
    ("hermes", '<tool_call>{"name": "now"}</tool_call>', "", "", [NOW]),
    ("hermes", '<tool_call>{"name": "now", "arguments": null}', "", "", [NOW]),
    ("hermes", '<tool_call>{"name": "now", "arguments": "{}"}</tool_call>', "", "", [NOW]),
    ("hermes", '<tool_call>[{"name": "now", "arguments": {}}, {"name": "now", "arguments": {}}]</tool_call>', "", "",
     [NOW, NOW]),
    ("hermes", '<tool_call>{"name": "get_weather", "arguments": {"city": "}\\"</tool_call>{é漢😀\\u00e9"}}</tool_call>',
     "", "", [("get_weather", {"city": '}"</tool_call>{é漢😀é'})]),
    ("qwen3_coder", "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n<parameter=days>\n3\n"
                    "</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=now>\n</function>\n</tool_call>",
     "", "", [WEATHER, NOW]),
    ("qwen3_coder", "Well.\n<function=get_weather>\n<parameter=city>Paris</parameter><parameter=days>3</parameter>"
                    "</function>", "Well.", "", [WEATHER]),
    ("qwen3_coder", '<tool_call><function=get_weather>\n<parameter=city>\n{"a": 1}\n\n"x" \\\n</parameter>\n'
                    '<parameter=where>\n{"a": [1, null]}\n</parameter>\n</function>\n</tool_call>', "", "",
     [("get_weather", {"city": '{"a": 1}\n\n"x" \\', "where": {"a": [1, None]}})]),
    ("qwen3_coder", '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>', "", "", [NOW]),
    ("glm", "Hm.\n<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n<arg_key>days"
            "</arg_key>\n<arg_value>3</arg_value>\n</tool_call>\n<tool_call>now\n</tool_call>", "Hm.", "",
     [WEATHER, NOW]),
    ("glm", '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>', "", "", [NOW]),
    ("llama3_json", '{"name": "get_weather", "parameters": {"city": "Paris", "days": 3}}', "", "", [WEATHER]),
    ("llama3_json", '<|python_tag|>{"name": "now", "parameters": {}}; {"name": "get_weather", "parameters": '
                    '{"city": "Paris", "days": 3}}', "", "", [NOW, WEATHER]),
    ("llama3_json", '\n{"type": "function", "name": "now", "parameters": {}}\n{"name": "now", "parameters": {}}', "",
     "", [NOW, NOW]),
    ("pythonic", '[get_weather(city="Paris", days=3), now()]', "", "", [WEATHER, NOW]),
    ("pythonic", "<|python_start|>[get_weather(city='Pa\\'ris]', where={'a': [1, true, None, -2.5]})]<|python_end|>",
     "", "", [("get_weather", {"city": "Pa'ris]", "where": {"a": [1, True, None, -2.5]}})]),
    ("pythonic", '{"name": "now", "parameters": {}}', "", "", [NOW]),
    ("mistral", '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris", "days": 3}, "id": "0UAqFzWsD"}, '
                '{"name": "now", "arguments": {}}]', "", "", [WEATHER, NOW]),
    ("mistral", 'Yes.[TOOL_CALLS]get_weather[ARGS]{"city": "Paris", "days": 3}[TOOL_CALLS]now[CALL_ID]0UAqFzWsD'
                "[ARGS]{}", "Yes.", "", [WEATHER, NOW]),
    ("mistral", "[TOOL_CALLS]now{}", "", "", [NOW]),
    ("granite", '<|tool_call|>[{"name": "get_weather", "arguments": {"city": "Paris", "days": 3}}]', "", "",
     [WEATHER]),
    ("phi4", '<|tool_call|>[{"name": "now", "arguments": {}}]<|/tool_call|>', "", "", [NOW]),
    ("phi4", '<|tool_call|>{"name": "now", "arguments": {}}<|/tool_call|>', "", "", [NOW]),
    ("phi4", 'functools[{"name": "get_weather", "arguments": {"city": "Paris", "days": 3}}, '
             '{"name": "now", "arguments": {}}]', "", "", [WEATHER, NOW]),
    ("deepseek", DEEPSEEK_V3, "", "", [WEATHER, NOW]),
    ("deepseek", DEEPSEEK_V31, "One moment.", "", [WEATHER, NOW]),
    ("deepseek", "Let me see.\n\n" + DSML, "Let me see.", "", [WEATHER, NOW]),
    ("cohere", '<|START_ACTION|>[\n    {"tool_call_id": "0", "tool_name": "get_weather", "parameters": '
               '{"city": "Paris", "days": 3}},\n    {"tool_call_id": "1", "tool_name": "now", "parameters": {}}\n]'
               "<|END_ACTION|>", "", "", [WEATHER, NOW]),
    ("cohere", 'Action: ```json\n[\n    {\n        "tool_name": "now",\n        "parameters": {}\n    }\n]```', "", "",
     [NOW]),
    ("cohere", "<|START_RESPONSE|>It is sunny.<|END_RESPONSE|>", "It is sunny.", "", []),
    ("gemma", "<start_function_call>call:get_weather{city:<escape>Paris<escape>,days:3}<end_function_call>"
              "<start_function_call>call:now{}<end_function_call>", "", "", [WEATHER, NOW]),
    ("gemma", '<|tool_call>call:get_weather{city:<|"|>P:{,}"<|"|>,where:{a:[1,<|"|>b<|"|>,[]],<|"|>c d<|"|>:null}}'
              "<tool_call|>", "", "",
     [("get_weather", {"city": 'P:{,}"', "where": {"a": [1, "b", []], "c d": None}})]),
    ("lfm2", '<|tool_call_start|>[get_weather(city="Paris", days=3)]<|tool_call_end|>Checking the weather.',
     "Checking the weather.", "", [WEATHER]),
    ("lfm2", '<|tool_call_start|>[{"name": "now", "arguments": {}}]<|tool_call_end|>', "", "", [NOW]),
    ("harmony", HARMONY, "", "The user asks for the weather.", [WEATHER]),
    ("harmony", " to=functions.now<|channel|>commentary json<|message|>{}<|call|>", "", "", [NOW]),
    ("harmony", "<|channel|>analysis<|message|>Easy.<|end|><|start|>assistant<|channel|>final<|message|>Two.\n\nYes.",
     "Two.\n\nYes.", "Easy.", []),
    ("harmony", "<|channel|>commentary<|message|>I look it up.<|end|><|start|>assistant to=functions.now<|channel|>"
                "commentary <|constrain|>json<|message|>{}", "I look it up.", "", [NOW]),
    ("think+hermes", '<think>\nA call: <tool_call>{"name": "now"}</tool_call>?\n\nYes.\n</think>\n\nSo.\n<tool_call>\n'
                     '{"name": "now", "arguments": {}}\n</tool_call>', "So.",
     'A call: <tool_call>{"name": "now"}</tool_call>?\n\nYes.', [NOW]),
    ("opened think+deepseek", "Hm.\n</think>" + DEEPSEEK_V31, "One moment.", "Hm.", [WEATHER, NOW]),
    ("opened think+", "<think>\nHm.\n</think>\n\nNo. \n", "No. \n", "Hm.", []),
    ("opened think+", "Hm, and on \n", "", "Hm, and on \n", []),
    ("mistral+mistral", "[THINK]Hm.[/THINK]Yes.[TOOL_CALLS]now[ARGS]{}", "Yes.", "Hm.", [NOW]),
    ("cohere+cohere", "<|START_THINKING|>Hm.<|END_THINKING|><|START_RESPONSE|>Yes.<|END_RESPONSE|>", "Yes.", "Hm.", []),
    ("gemma", "<|channel>thought\n<channel|>Yes.", "<|channel>thought\n<channel|>Yes.", "", []),
    ("gemma+gemma", "<|channel>thought\nHm.<channel|>Yes.", "Yes.", "Hm.", []),
    ("granite+granite", "Here is my thought process:\nHm.\n\nHere is my response:\nYes.", "Yes.", "Hm.", []),
]

# Outputs that resemble a call: they come out as they are.
TEXTS = [
    ("hermes", "Write <tool_call> before, and </tool_call> after it.\n"),
    ("hermes", '<tool_call>{"nome": "now", "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"name": 3}</tool_call>'),
    ("hermes", '<tool_call>{"name": "now'),
    ("hermes", '<tool_call>{"name": "now" "arguments"}'),
    ("hermes", "<tool_call"),
    ("hermes", " \n"),
    ("hermes", "{'name': 'now'}"),
    ("qwen3_coder", "<tool_call>\n<function=>\n</function>"),
    ("qwen3_coder", "The tag <function=name> begins a call; <function=get_weather is cut off"),
    ("qwen3_coder", "In C, a <tool_call> function = a > b"),
    ("glm", "<tool_call> is a tag, <arg_key> another"),
    ("llama3_json", '{"name": "Bob", "parameters": {"age": 3}}'),
    ("llama3_json", '{"name": "now", "age": 3}'),
    ("llama3_json", '{"name": "now", "parameters": 3}'),
    ("llama3_json", 'Say {"name": "now", "parameters": {}}'),
    ("llama3_json", "{"),
    ("pythonic", "[1, 2, 3]"),
    ("pythonic", "[unknown(a=1), now()]"),
    ("pythonic", "[now(), 1]"),
    ("pythonic", "[now(1)]"),
    ("pythonic", "[now(**{})]"),
    ("pythonic", "[now(a=b)]"),
    ("pythonic", "[now(a={1})]"),
    ("pythonic", "[now(a=" + "[" * 500 + "]" * 500 + ")]"),
    ("pythonic", "[link](http://x) and more"),
    ("pythonic", "[now("),
    ("mistral", "The token [TOOL_CALLS] begins a call."),
    ("mistral", "[TOOL_CALLS]now[ARGS]none"),
    ("granite", "<|tool_call|>none"),
    ("phi4", "functools[0] and functools[partial]"),
    ("deepseek", "<｜tool▁calls▁begin｜>none<｜tool▁calls▁end｜>"),
    ("deepseek", "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```python\n{}\n```"),
    ("deepseek", "<｜DSML｜function_calls>\nnone"),
    ("cohere", "Action: ```json\n[1, 2]\n```"),
    ("cohere", 'Action: ```json\n[{"tool_name": "directly-answer", "parameters": {}}]\n```'),
    ("gemma", "<start_function_call>call:now{a b}"),
    ("gemma", '<|tool_call>call:now{a:<|"|>x}'),
    ("gemma", "<start_function_call>call:now{a:" + "[" * 200),
    ("lfm2", "<|tool_call_start|>[now(1)]<|tool_call_end|>"),
    ("lfm2", "[now()]"),
    ("harmony", "Plain text, without <|channel|>s."),
    ("harmony", "<|channel|>weekly<|message|>No."),
    ("think+", "I <think> so. </think>"),
    ("think+", "\n\n <thin"),
]


def expected(content: str, reasoning: str, calls: list[tuple[str, Any]], got: Said) -> None:
    assert got.content == content
    assert got.reasoning == reasoning
    assert [(name, json.loads(arguments)) for name, arguments in got.calls] == calls


@pytest.mark.parametrize(("name", "output", "content", "reasoning", "calls"), CALLS)
def test_calls(name: str, output: str, content: str, reasoning: str, calls: list[tuple[str, Any]]) -> None:
    whole = read(make(name), [output])
    expected(content, reasoning, calls, whole)
    for i in range(len(output) + 1):
        assert read(make(name), [output[:i], output[i:]]) == whole
    assert read(make(name), list(output)) == whole


@pytest.mark.parametrize(("name", "output"), TEXTS)
def test_what_resembles_a_call_is_text(name: str, output: str) -> None:
    for i in range(len(output) + 1):
        assert read(make(name), [output[:i], output[i:]]) == Said(output)
    assert read(make(name), list(output)) == Said(output)


OUTPUTS = [(name, output) for name, output, *_ in CALLS] + TEXTS


@given(st.sampled_from(OUTPUTS), st.data())
def test_pieces_say_what_the_whole_says(case: tuple[str, str], data: st.DataObject) -> None:
    """Also where the output was cut short, by max_tokens say."""
    name, output = case
    output = output[: data.draw(st.integers(0, len(output)))]
    cuts = sorted(data.draw(st.lists(st.integers(0, len(output)), max_size=12)))
    pieces = [output[start:end] for start, end in zip([0, *cuts], [*cuts, len(output)], strict=True)]
    assert read(make(name), pieces) == read(make(name), [output])


WORDS = ["alpha", "beta", "gamma"]
FRAGMENTS = [*WORDS, *'{}[]()":,;=<>', " ", "\n", '"name"', '"arguments"', '"now"', "now", '{"name": "now", ',
             "to=functions.now", "<|message|>", "<|end|>", "<|channel|>final", "```json", "</tool_call>", "<parameter=",
             "</parameter>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "[ARGS]",
             "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", '<｜DSML｜invoke name="', '">', "call:now{", "<escape>",
             '<|"|>', *{opener for parser in TOOL_PARSERS for opener in parser.openers}]


@given(st.sampled_from([parser.name for parser in TOOL_PARSERS]),
       st.lists(st.sampled_from(FRAGMENTS), max_size=30))
def test_no_word_is_lost(name: str, pieces: list[str]) -> None:
    """Whatever a model writes, with the markers in any order, every word of it comes out somewhere, once."""
    got = read(make(name), pieces)
    assert got == read(make(name), ["".join(pieces)])
    text = got.content + got.reasoning + "".join(part for call in got.calls for part in call)
    for word in WORDS:
        assert text.count(word) == "".join(pieces).count(word)


JSON = st.recursive(st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=5),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
                    max_leaves=8)


@given(st.sampled_from(TOOL_PARSERS), st.lists(st.dictionaries(st.text(max_size=5), JSON), min_size=1, max_size=3))
def test_forced_calls_are_read_back(parser: type[Parser], arguments: list[dict[str, Any]]) -> None:
    """The form that a grammar gives to calls."""
    form = parser.json_calls
    if form.single:
        del arguments[1:]
    calls = [form.open.replace("{name}", "now") + json.dumps(value, ensure_ascii=False) + form.close
             for value in arguments]
    got = read(parser(TOOLS), [form.before + form.between.join(calls) + form.after])
    expected("", "", [("now", value) for value in arguments], got)


@given(st.dictionaries(st.text(max_size=5), JSON), st.sampled_from(["pythonic", "lfm2"]))
def test_python_literals(arguments: dict[str, Any], name: str) -> None:
    arguments = {key: value for key, value in arguments.items() if key.isidentifier() and key.isascii()}
    call = f"[now({', '.join(f'{key}={value!r}' for key, value in arguments.items())})]"
    output = f"<|tool_call_start|>{call}<|tool_call_end|>" if name == "lfm2" else call
    expected("", "", [("now", arguments)], read(make(name), [output]))


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<["), max_size=30))
def test_plain_text_is_left_alone(text: str) -> None:
    """Every marker has one of the two characters."""
    for parser in TOOL_PARSERS:
        assert read(parser(TOOLS), [text]).content in (text, text.rstrip())


def test_ids() -> None:
    """Of nine letters and digits for Mistral, whose templates refuse others; no two alike."""
    for parser in TOOL_PARSERS:
        form = parser.json_calls
        output = form.before + form.open.replace("{name}", "now") + "{}" + form.close + form.after
        ids = {delta.id for _ in range(20) for delta in parser(TOOLS).feed(output) if isinstance(delta, CallStart)}
        assert len(ids) == 20
        assert all(len(i) == 9 and i.isalnum() for i in ids) or parser.name != "mistral"


@pytest.mark.parametrize(("template", "parser", "reasoning"), [
    ("{% for t in tools %}{% endfor %}<tool_call></tool_call>", "hermes", None),
    ("<tool_call> … <think></think>", "hermes", "think"),
    ("<tool_call><function=", "qwen3_coder", None),
    ("<tool_call>{{ name }}<arg_key> </think>", "glm", "think"),
    ("<|python_tag|>", "llama3_json", None),
    ('"parameters": dictionary of argument name and its value}', "llama3_json", None),
    ("<|python_start|>", "pythonic", None),
    ("[AVAILABLE_TOOLS][TOOL_CALLS]", "mistral", None),
    ("[TOOL_CALLS][ARGS][THINK]", "mistral", "mistral"),
    ("<|tool_call|>", "granite", None),
    ("<|tool|><|/tool|><|tool_call|>", "phi4", None),
    ("<｜tool▁calls▁begin｜></think>", "deepseek", "think"),
    ("｜DSML｜<think>", "deepseek", None),
    ("<|START_ACTION|><|START_THINKING|>", "cohere", "cohere"),
    ("<start_function_call>", "gemma", None),
    ("<|tool_call><|channel>thought\n<channel|>", "gemma", "gemma"),
    ("<|tool_call_start|>", "lfm2", None),
    ("<|start|><|channel|>commentary<tool_call>", "harmony", None),
    ("{{ messages }}", None, None),
])
def test_found_from_the_template(template: str, parser: str | None, reasoning: str | None) -> None:
    found, form = find_tool_parser(template), find_reasoning(template)
    assert (found and found.name) == parser
    assert (form and form.name) == reasoning
