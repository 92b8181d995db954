"""Structured output through HTTP. The SDK's own parsing and jsonschema-rs judge the answers."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal

import jsonschema_rs
import openai
import pytest
from pydantic import BaseModel, Field

from tests.server.conftest import Served, events

MESSAGES: list[Any] = [{"role": "user", "content": "Of a king."}]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "titles": {"type": "array", "items": {"enum": ["king", "queen", "fool"]}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "age", "titles"],
    "additionalProperties": False,
}


class Person(BaseModel):
    name: Literal["Ann", "Bob"]
    age: Annotated[int, Field(ge=0, le=120)] | None
    titles: Annotated[list[Literal["king", "queen"]], Field(max_length=3)]


def answer(served: Served, path: str, **fields: Any) -> Any:
    body = {"messages": MESSAGES} if path == "/v1/chat/completions" else {"prompt": "A king"}
    response = served.http.post(path, json=body | {"max_tokens": 200, "seed": 1} | fields)
    assert response.status_code == 200, response.text
    choice = response.json()["choices"][0]
    assert choice["finish_reason"] == "stop", choice
    return choice["message"]["content"] if "message" in choice else choice["text"]


def refusal(served: Served, path: str = "/v1/chat/completions", **fields: Any) -> dict[str, Any]:
    body = {"messages": MESSAGES} if path == "/v1/chat/completions" else {"prompt": "A king"}
    response = served.http.post(path, json=body | fields)
    assert response.status_code == 400, response.text
    error: dict[str, Any] = response.json()["error"]
    return error


def test_the_sdk_parses_what_it_asked_for(client: openai.OpenAI) -> None:
    for seed in range(3):
        completion = client.chat.completions.parse(model="demo", messages=MESSAGES, response_format=Person, seed=seed,
                                                   max_tokens=200)
        parsed = completion.choices[0].message.parsed
        assert isinstance(parsed, Person)


@pytest.mark.parametrize("strict", [True, False, None])
@pytest.mark.parametrize("stream", [True, False])
def test_json_schema(client: openai.OpenAI, served: Served, strict: bool | None, stream: bool) -> None:
    body = {"messages": MESSAGES, "max_tokens": 200, "seed": 5, "stream": stream,
            "response_format": {"type": "json_schema",
                                "json_schema": {"name": "person", "strict": strict, "schema": SCHEMA}}}
    response = served.http.post("/v1/chat/completions", json=body)
    if stream:
        choices = [chunk["choices"][0] for chunk in events(response.text)]
        text, reason = "".join(choice["delta"]["content"] for choice in choices), choices[-1]["finish_reason"]
    else:
        [choice] = response.json()["choices"]
        text, reason = choice["message"]["content"], choice["finish_reason"]
    assert reason == "stop"
    jsonschema_rs.validate(SCHEMA, json.loads(text))


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_every_way_to_ask(served: Served, path: str) -> None:
    for fields in ({"structured_outputs": {"json": SCHEMA}}, {"structured_outputs": {"json": json.dumps(SCHEMA)}},
                   {"guided_json": SCHEMA}, {"guided_json": json.dumps(SCHEMA)},
                   {"response_format": {"type": "json_object", "value": SCHEMA}},
                   {"response_format": {"type": "json_object", "schema": SCHEMA}},
                   {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}}):
        jsonschema_rs.validate(SCHEMA, json.loads(answer(served, path, **fields)))
    for fields in ({"structured_outputs": {"regex": "[a-c]{3}[0-9]"}}, {"guided_regex": "[a-c]{3}[0-9]"},
                   {"structured_outputs": {"grammar": 'start: LETTER{3} DIGIT\nLETTER: /[a-c]/\nDIGIT: /[0-9]/'}},
                   {"guided_grammar": "root ::= letter letter letter [0-9]\nletter ::= [a-c]"}):
        assert re.fullmatch("[a-c]{3}[0-9]", answer(served, path, **fields))
    for fields in ({"structured_outputs": {"choice": ["yes", "no"]}}, {"guided_choice": ["yes", "no"]}):
        assert answer(served, path, **fields) in ("yes", "no")


def test_text_is_free(served: Served) -> None:
    plain = {"messages": MESSAGES, "temperature": 0, "max_tokens": 20}
    free = served.http.post("/v1/chat/completions", json=plain).json()["choices"]
    for fields in ({"response_format": {"type": "text"}}, {"response_format": None, "guided_json": None},
                   {"structured_outputs": None}):
        assert served.http.post("/v1/chat/completions", json=plain | fields).json()["choices"] == free


def test_json_object_and_length(served: Served) -> None:
    """The demo model, which writes tales, seldom closes an object by itself."""
    for form in ({"response_format": {"type": "json_object"}}, {"structured_outputs": {"json_object": True}}):
        body = {"messages": MESSAGES, "max_tokens": 30, "seed": 3, "logit_bias": {"92": 8}} | form
        [choice] = served.http.post("/v1/chat/completions", json=body).json()["choices"]
        assert choice["message"]["content"].startswith("{")
        if choice["finish_reason"] == "stop":
            assert isinstance(json.loads(choice["message"]["content"]), dict)


def test_logprobs_are_finite_and_few(served: Served) -> None:
    body = {"messages": MESSAGES, "logprobs": True, "top_logprobs": 20, "guided_choice": ["yes", "no"]}
    entries = served.http.post("/v1/chat/completions", json=body).json()["choices"][0]["logprobs"]["content"]
    assert all(1 <= len(entry["top_logprobs"]) < 20 for entry in entries)
    assert all(top["token"] in "yesno</s>" for entry in entries for top in entry["top_logprobs"])


TAGS: dict[str, Any] = {  # the demo model likes to write " a"
    "type": "structural_tag", "triggers": [" a"],
    "structures": [{"begin": f" a{i}>", "schema": {"const": [i]}, "end": "</a>"} for i in range(2)],
}


@pytest.mark.parametrize("form", [{"response_format": TAGS}, {"structured_outputs": {"structural_tag": TAGS}},
                                  {"structured_outputs": {"structural_tag": json.dumps(TAGS)}}], ids=str)
def test_structural_tags(served: Served, form: dict[str, Any]) -> None:
    """Text is free, and what begins as a tag is one."""
    begun = 0
    for seed in range(5):
        body = {"messages": MESSAGES, "max_tokens": 60, "seed": seed, **form}
        [choice] = served.http.post("/v1/chat/completions", json=body).json()["choices"]
        for rest in choice["message"]["content"].split(" a")[1:]:
            begun += 1
            whole = re.match(r"(0>\[ ?0 ?\]|1>\[ ?1 ?\])</a>", rest)
            assert whole or choice["message"]["content"].endswith(rest)
    assert begun


@pytest.mark.parametrize("kind", ["json", "regex"])
@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
def test_tgi(served: Served, path: str, kind: str) -> None:
    value: Any = SCHEMA if kind == "json" else "[0-9]{4}"
    response = served.http.post(path, json={"inputs": "A king", "parameters": {
        "max_new_tokens": 200, "seed": 2, "do_sample": True, "grammar": {"type": kind, "value": value}}})
    text = (response.json() if path == "/generate" else events(response.text.replace("data:", "data: "))[-1])[
        "generated_text"]
    if kind == "json":
        jsonschema_rs.validate(SCHEMA, json.loads(text))
    else:
        assert re.fullmatch("[0-9]{4}", text)


@pytest.mark.parametrize(("fields", "param", "words"), [
    ({"response_format": {"type": "text", "value": SCHEMA}}, "response_format.value", "needs the type json_object"),
    ({"response_format": {"type": "json_object", "value": SCHEMA, "schema": SCHEMA}}, "response_format.value", "both"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema", "required"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format.json_schema.schema",
     "required"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {
        "type": "object", "properties": {"v": {"not": {}}}}}}}, "response_format.json_schema.schema",
     "/properties/v/not cannot be enforced"),
    ({"guided_regex": "(?=a)b"}, "guided_regex", "look"),
    ({"guided_choice": []}, "guided_choice", "at least 1"),
    ({"guided_json": "{"}, "guided_json", "JSON"),
    ({"guided_json": "5"}, "guided_json", "schema"),
    ({"guided_grammar": "start: missing"}, "guided_grammar", "missing"),
    ({"structured_outputs": {}}, "structured_outputs", "needs one"),
    ({"structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs.regex", "give one"),
    ({"guided_json": {}, "guided_regex": "a"}, "guided_regex", "give one"),
    ({"guided_json": {}, "ignore_eos": True}, "ignore_eos", "structured"),
    ({"response_format": {"type": "structural_tag", "structures": TAGS["structures"]}}, "response_format", "triggers"),
    ({"response_format": TAGS | {"triggers": ["x"]}}, "response_format", "structures.0.begin"),
    ({"structured_outputs": {"structural_tag": '{"type": "structural_tag", "format": {}}'}},
     "structured_outputs.structural_tag", "format"),
])
def test_refusals(served: Served, fields: dict[str, Any], param: str, words: str) -> None:
    error = refusal(served, **fields)
    assert error["param"] == param
    assert words in error["message"]
