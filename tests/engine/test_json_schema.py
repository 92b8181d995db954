"""Oracle: jsonschema-rs, of every answer that a model which wants to break out can write; and Python's re."""

from __future__ import annotations

import json
import re
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

import jsonschema_rs
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fptq_runtime
from fptq_runtime.engine.grammar import Grammar, GrammarError, Grammars
from fptq_runtime.engine.json_schema import FORMATS, closed, culprit, pattern, prepared
from fptq_runtime.models.tokenizer import Tokenizer

DEMO = Path(fptq_runtime.__file__).parent / "demo"
VOCAB, EOS = 4096, 1


@pytest.fixture(scope="module")
def tokens() -> list[bytes]:
    tokenizer = Tokenizer(DEMO)
    return [tokenizer.token_bytes(token_id) for token_id in range(VOCAB)]


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(Tokenizer(DEMO).to_json, VOCAB, (EOS,))


def answers(grammars: Grammars, tokens: list[bytes], schema: Any, count: int = 30, length: int = 80) -> list[bytes]:
    """What ends of `count` answers by a model that prefers short tokens and backslashes, and after a while closes."""
    grammar, generator = Grammar.json_schema(schema), np.random.default_rng(len(json.dumps(schema)))
    liked = np.array([len(token) <= 1 or b"\\" in token for token in tokens])
    closing = np.array([any(c in token for c in b'"}]') for token in tokens])
    closing[EOS] = True
    ended = []
    for matcher in grammars.matchers(grammar, count):
        written: list[int] = []
        for position in range(length):
            mask = np.zeros(grammars.words, np.int32)
            matcher.fill(written, 0, mask[None])
            allowed = np.unpackbits(mask.view(np.uint8), bitorder="little").astype(bool)
            for preferred in ([closing] if position > generator.integers(length) else []) + [liked]:
                if generator.random() < 0.8 and (allowed & preferred).any():
                    allowed &= preferred
            written.append(int(generator.choice(np.flatnonzero(allowed))))
            if written[-1] == EOS:
                ended.append(b"".join(tokens[token_id] for token_id in written[:-1]))
                break
    return ended


@pytest.mark.parametrize("schema", [
    *({"type": "string", "format": name} for name in (*FORMATS, "duration", "ipv4", "ipv6", "uuid", "uri")),
    *({"type": "string", "pattern": p} for p in (
        r"^\s+$", r"^\S{2,}$", r"^[^\s]+$", r"^[\s\S]{1,9}$", r"^\w+-\d\d$", r"^[[a]+$", r"^[a&&b]+$", r"^[a~~b]$",
        r"^[+--]{1,4}$", r"^[\w.-]+$", "^.{3}$", r"^a\/b\_c$", "b+", r"^\W$", "^(a|b)*$")),
    {"type": "string", "format": "date", "pattern": "^20"},
    {"type": "string", "format": "date", "pattern": "^20", "allOf": [{"maxLength": 10}]},
    {"type": "string", "minLength": 3, "maxLength": 5},
    {"type": "string", "format": "no draft's", "maxLength": 4},
    {"type": "integer", "minimum": -3, "exclusiveMaximum": 12}, {"type": "number", "minimum": 0.5, "maximum": 99.25},
    {"type": "integer", "multipleOf": 7}, {"type": "number", "multipleOf": 0.25}, {"type": "number"},
    {"$schema": "http://json-schema.org/draft-04/schema#", "type": "integer", "minimum": 3, "exclusiveMinimum": True,
     "maximum": 40},
    {"enum": ["a", 1, 1.5, None, True, {"x": [1]}, ["é\n"]]}, {"const": {"a": "\u2028\x7f"}},
    {"type": ["string", "null", "integer"], "maxLength": 3},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4},
    {"type": "array", "prefixItems": [{"type": "null"}, {"const": 5}], "items": False},
    {"$schema": "http://json-schema.org/draft-07/schema#", "type": "array", "items": [{"type": "null"}, {"const": 5}],
     "additionalItems": {"type": "integer"}},
    {"type": "object", "properties": {"a": {"type": "integer"}, "b\"\\": {"type": "null"}, "é": {}},
     "required": ["b\"\\"], "additionalProperties": {"type": "string", "maxLength": 3}},
    {"type": "object", "properties": {"a": {"type": "integer"}}, "patternProperties": {"^[a-c]": {"type": "integer"}},
     "additionalProperties": False},
    {"type": "object", "patternProperties": {r"^\s$": {"type": "integer"}}, "additionalProperties": {"type": "null"}},
    {"type": "object", "additionalProperties": {"type": "integer"}, "minProperties": 1, "maxProperties": 3,
     "propertyNames": {"type": "string"}},
    {"type": "object", "properties": {"a": {"const": 1}, "b": {"const": 2}}, "required": ["a"], "minProperties": 1},
    {"anyOf": [{"type": "integer"}, {"type": "string", "maxLength": 2}]},
    {"oneOf": [{"type": "integer"}, {"type": "string", "maxLength": 2}]},
    {"allOf": [{"type": "string", "minLength": 2}, {"maxLength": 6, "pattern": "^a"}]},
    {"$ref": "#/$defs/list", "$defs": {"list": {"type": "array", "items": {"$ref": "#/$defs/list"}, "maxItems": 2}}},
    {"type": "array", "uniqueItems": False, "maxItems": 2}, {"if": {"type": "string"}, "type": "boolean"},
    True, {"type": "object"},
], ids=lambda schema: json.dumps(schema)[:70])
def test_no_answer_breaks_its_schema(grammars: Grammars, tokens: list[bytes], schema: Any) -> None:
    judge = jsonschema_rs.validator_for(schema, validate_formats=True)
    ended = answers(grammars, tokens, schema)
    assert ended
    for answer in ended:
        judge.validate(json.loads(answer.decode(), parse_float=number))


def number(text: str) -> Decimal:
    try:
        return Decimal(text)
    except InvalidOperation:  # an exponent of too many digits
        return Decimal("1e9999")


CLASS = st.text(st.sampled_from("ab-[&~^.\\s"), min_size=1, max_size=6)


@settings(max_examples=300)
@given(parts=st.lists(st.one_of(st.sampled_from(["a", ".", r"\s", r"\S", r"\.", "[^a]", "(a|.)", r"\\s"]),
                                CLASS.map(lambda text: f"[{text}]")), min_size=1, max_size=4),
       text=st.text(st.sampled_from("ab-[]&~^.\\s \n\r\u2028\u0085\ufeff"), max_size=4))
def test_a_pattern_means_in_rust_what_it_means_in_ecmascript(parts: list[str], text: str) -> None:
    """Python's classes neither nest nor combine; its \\s is other, and so is its dot."""
    source = "^(?:" + "".join(parts) + ")$"
    try:
        expected = re.search(_python(source), text) is not None
        got = jsonschema_rs.is_valid({"pattern": pattern(source)}, text)
    except (re.error, ValueError):
        return  # not valid in both
    assert got == expected


def _python(source: str) -> str:
    made, within = "", False
    for token in re.findall(r"\\.|.", source, re.DOTALL):
        spaces = r" \n\r\u2028\ufeff"
        if token == r"\s":
            made += spaces if within else f"[{spaces}]"
        elif token == r"\S":
            if within:
                raise ValueError("Python has no such class")
            made += f"[^{spaces}]"
        elif token == "." and not within:
            made += r"[^\n\r\u2028]"
        else:
            special = within and (token in "[&~" or (token == "-" and made[-1] == "-"))
            made += "\\" + token if special else token  # else Python warns of what may come
            within = token == "[" or (within and token != "]")
    return made.replace("$", r"\Z")


@pytest.mark.parametrize(("schema", "pointer"), [
    ({"not": {}}, "/not"),
    ({"type": "object", "properties": {"v": {"not": {"type": "null"}}}}, "/properties/v/not"),
    ({"properties": {"a/b~c": {"items": {"uniqueItems": True}}}}, "/properties/a~1b~0c/items/uniqueItems"),
    ({"anyOf": [{"type": "null"}, {"if": {}, "then": {"type": "null"}}]}, "/anyOf/1/if"),
    ({"$ref": "#/$defs/x", "$defs": {"x": {"contains": {"type": "null"}}}}, "/$defs/x/contains"),
    ({"items": {"type": "string", "pattern": "(?=a)"}}, "/items/pattern"),
    ({"properties": {"not": {"type": "string", "format": "regex"}}}, "/properties/not/format"),
    ({"items": {"oneOf": [{"type": "string"}, {"minLength": 2}]}}, "/items/oneOf"),
    ({"properties": {"x": {"$ref": "http://example.com/x"}}}, "/properties/x/$ref"),
    ({"properties": {"x": {"type": "strange"}}}, "/properties/x/type"),
    ({"type": "array", "items": {"type": "integer", "minimum": 5, "maximum": 3}, "minItems": 1}, "/items/minimum"),
    ({"enum": []}, "/enum"),
    ({"x-guidance": {"lenient": True}, "unevaluatedProperties": False}, "/unevaluatedProperties"),
    ({"properties": {"k": {"dependentRequired": {"a": ["b"]}}}}, "/properties/k/dependentRequired"),
    ({"properties": {"k": {"propertyNames": {"maxLength": 3}}}}, "/properties/k/propertyNames"),
])
def test_what_cannot_be_enforced_is_pointed_at(grammars: Grammars, schema: Any, pointer: str) -> None:
    with pytest.raises(GrammarError, match=re.escape(pointer) + " cannot be enforced"):
        grammars.parser(Grammar.json_schema(schema))


def test_nothing_but_schemas_is_touched() -> None:
    values: dict[str, Any] = {name: {"format": "date", "pattern": r"\s", "uniqueItems": False}
                              for name in ("const", "default")}
    schema = {**values, "enum": [values], "properties": {"format": {"const": 1}, "pattern": True, "then": {}}}
    assert prepared(schema) == schema


INNER: dict[str, Any] = {"type": "object", "properties": {"x": {}}}


@pytest.mark.parametrize(("schema", "closes"), [
    (INNER, True), ({"type": "array", "items": INNER}, True), ({"anyOf": [INNER, {"type": "null"}]}, True),
    ({"properties": {"a": {"$ref": "#/$defs/b"}}, "$defs": {"b": INNER}}, True),
    ({**INNER, "anyOf": [{"required": ["x"]}, {"maxProperties": 0}]}, True),
    ({"oneOf": [{"type": "string"}, {"type": "null"}], "properties": {"x": {}}}, True),
    ({"type": "object"}, False), ({**INNER, "additionalProperties": True}, False),
    ({**INNER, "required": ["y"]}, False),
    ({**INNER, "patternProperties": {"^y": {}}}, False), ({**INNER, "minProperties": 2}, False),
    ({"allOf": [INNER, {"properties": {"y": {}}}]}, False), ({"oneOf": [INNER, {"type": "null"}]}, False),
    ({**INNER, "$ref": "#/$defs/b", "$defs": {"b": INNER}}, False), ({**INNER, "anyOf": [INNER]}, False),
    ({"properties": {"a": INNER, "b": {"allOf": [INNER]}}}, False),
], ids=str)
def test_objects_are_closed_where_that_contradicts_nothing(schema: Any, closes: bool) -> None:
    assert (closed(schema) != schema) == closes


def test_no_keyword_is_to_blame() -> None:
    assert culprit({"type": "object"}, lambda schema: "no") is None
    assert culprit({"type": "object"}, lambda schema: None) is None
