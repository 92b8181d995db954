"""What a request says of its answer's form, in OpenAI's, vLLM's and text-generation-inference's words, as a grammar."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from pydantic import ValidationError

from fptq_runtime.engine.async_engine import AsyncEngine
from fptq_runtime.engine.grammar import Grammar, GrammarError, embedded
from fptq_server.answer_grammar import literal
from fptq_server.errors import APIError
from fptq_server.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    GenerateGrammar,
    ResponseFormat,
    StructuredOutputs,
)

GBNF = re.compile(r"^\s*root\s*::=", re.MULTILINE)

Form = tuple[str, Callable[[Any], Grammar], Any]  # the field, and what makes a grammar of its value


def structural_tag(given: Any, added_tokens: Mapping[int, str]) -> Grammar:
    """Of a response_format of that type, parsed or not. added_tokens: the tokenizer's."""
    tokens = {text: token_id for token_id, text in added_tokens.items()}
    try:
        given = given if isinstance(given, ResponseFormat) else \
            ResponseFormat.model_validate_json(given if isinstance(given, str) else json.dumps(given))
    except ValidationError as error:
        [first, *_] = error.errors()
        raise GrammarError(f"{'.'.join(map(str, first['loc'])) or 'it'}: {first['msg']}") from None
    if given.type != "structural_tag" or not given.structures or not given.triggers:
        raise GrammarError("a structural_tag has structures and triggers")
    rules, tags = [r"TEXT: /(.|\n)*/"], []
    for i, tag in enumerate(given.structures):
        trigger = next((t for t in given.triggers if t and tag.begin.startswith(t)), None)
        if trigger is None:
            raise GrammarError(f"structures.{i}.begin begins with no trigger")
        before = f"TEXT {literal(trigger, tokens)}"
        if trigger not in tokens:
            rules.append(f"begin{i}[lazy]: {before}")
            before = f"begin{i}"
        rest, end = literal(tag.begin[len(trigger):], tokens), literal(tag.end, tokens)
        rules.append(f"tag{i}: {before} {rest} {embedded(tag.schema_)} {end}")
        tags.append(f"tag{i}")
    return Grammar.lark("\n".join([f"start: ({' | '.join(tags)})* TEXT", *rules]))


async def openai_grammar(body: ChatCompletionRequest | CompletionRequest, engine: AsyncEngine) -> Grammar | None:
    """The one form that a request gives, if any, compiled. Raises APIError that names the field."""
    forms = list(_openai_forms(body, partial(structural_tag, added_tokens=engine.engine.tokenizer.added_tokens)))
    if len(forms) > 1:
        raise APIError(400, f"{forms[0][0]} and {forms[1][0]} both say what the answer must be; give one of them",
                       param=forms[1][0])
    return await _compiled(forms[0], engine) if forms else None


async def generate_grammar(grammar: GenerateGrammar | None, engine: AsyncEngine) -> Grammar | None:
    """The same of TGI's parameters.grammar."""
    if grammar is None:
        return None
    make = Grammar.regex if grammar.type == "regex" else _json
    value = _text(grammar.value, "parameters.grammar.value") if grammar.type == "regex" else grammar.value
    return await _compiled(("parameters.grammar.value", make, value), engine)


def _openai_forms(body: ChatCompletionRequest | CompletionRequest, tags: Callable[[Any], Grammar]) -> Iterator[Form]:
    if body.response_format is not None:
        yield from _response_format(body.response_format, tags)
    if body.structured_outputs is not None:
        yield from _structured_outputs(body.structured_outputs, tags)
    for name, make in (("guided_json", _json), ("guided_regex", Grammar.regex), ("guided_choice", Grammar.choice),
                       ("guided_grammar", _grammar), ("json_schema", _json), ("grammar", _grammar)):
        value = getattr(body, name)
        if value is not None and (name, value) != ("grammar", ""):  # llama.cpp's word for none
            yield name, make, value


def _response_format(given: ResponseFormat, tags: Callable[[Any], Grammar]) -> Iterator[Form]:
    if given.type == "structural_tag":
        yield "response_format", tags, given
    schemas: list[Form] = [(f"response_format.{name}", _json, schema) for name, schema in (
        ("schema", given.schema_), ("value", given.value)) if schema is not None]
    if schemas and given.type in ("text", "structural_tag"):
        raise APIError(400, f"{schemas[0][0]} needs the type json_object", param=schemas[0][0])
    if given.type in ("json_object", "json"):
        yield from schemas or [("response_format", lambda _: Grammar.json_object(), None)]
    if given.type == "regex":
        yield "response_format.value", Grammar.regex, _text(given.value, "response_format.value")
    if given.type == "json_schema":
        if given.json_schema is not None and given.json_schema.schema_ is not None:
            schemas.append(("response_format.json_schema.schema", _json, given.json_schema.schema_))
        if not schemas:
            raise APIError(400, "response_format.json_schema.schema is required", code="missing_field",
                           param="response_format.json_schema.schema")
        yield from schemas


def _structured_outputs(given: StructuredOutputs, tags: Callable[[Any], Grammar]) -> Iterator[Form]:
    forms: list[Form] = [("json", _json, given.json_), ("regex", Grammar.regex, given.regex),
                         ("choice", Grammar.choice, given.choice), ("grammar", _grammar, given.grammar),
                         ("json_object", lambda _: Grammar.json_object(), given.json_object or None),
                         ("structural_tag", tags, given.structural_tag)]
    forms = [(f"structured_outputs.{name}", make, value) for name, make, value in forms if value is not None]
    if not forms:
        raise APIError(400, "structured_outputs needs one of json, regex, choice, grammar, json_object, "
                            "structural_tag",
                       param="structured_outputs")
    yield from forms


def _text(value: Any, param: str) -> str:
    if not isinstance(value, str):
        raise APIError(400, f"{param} must be a string", param=param)
    return value


def _json(schema: Any) -> Grammar:
    """A schema, as an object or as the text of one."""
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except ValueError as error:
            raise GrammarError(f"it is not JSON: {error}") from None
    return Grammar.json_schema(schema)


def _grammar(text: str) -> Grammar:
    return Grammar.gbnf(text) if GBNF.search(text) else Grammar.lark(text)


async def _compiled(form: Form, engine: AsyncEngine) -> Grammar:
    param, make, value = form
    try:
        grammar = make(value)
    except GrammarError as error:
        raise APIError(400, f"{param}: {error}", param=param, code="invalid_grammar") from None
    return await compiled(grammar, engine, param)


async def compiled(grammar: Grammar, engine: AsyncEngine, param: str) -> Grammar:
    """The grammar, which the engine has ready then. Raises APIError that names the parameter."""
    try:
        await engine.compile(grammar)
    except GrammarError as error:
        raise APIError(400, f"{param}: {error}", param=param, code="invalid_grammar") from None
    return grammar
