"""An answer that max_tokens would cut is closed before. The oracle is jsonschema-rs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema_rs
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fptq_runtime
from fptq_runtime.engine.grammar import Grammar, Grammars
from fptq_runtime.engine.request import FinishReason, SamplingParams
from fptq_runtime.models.tokenizer import Tokenizer
from tests.engine.fake import EOS, make_engine, run, solo, text, tokens

TOKENIZER = Tokenizer(Path(fptq_runtime.__file__).parent / "demo")
GRAMMARS = Grammars(TOKENIZER.to_json, TOKENIZER.vocab_size, (1,), close=True)

ITEM: dict[str, Any] = {
    "type": "object", "required": ["kind", "note"], "additionalProperties": False,
    "properties": {"kind": {"enum": ["red", "green"]}, "note": {"type": "string", "minLength": 3}}}
SCHEMAS: dict[str, Any] = {
    "texts": {"type": "array", "items": {"type": "string"}},
    "anything": {"type": "object", "additionalProperties": {}},
    "values": {"type": "object", "properties": {
        "day": {"type": "string", "format": "date"}, "many": {"type": "integer", "minimum": 100},
        "much": {"type": "number", "exclusiveMaximum": -1.5}, "way": {"type": "string", "pattern": "^a*b{2}\\\\d$"},
        "id": {"type": "string", "format": "uuid"}, "maybe": {"anyOf": [{"type": "null"}, ITEM]}},
        "required": ["day", "many", "much", "way", "id", "maybe"], "additionalProperties": False},
    "items": {"type": "object", "properties": {"title": {"type": "string"}, "items": {"type": "array", "items": ITEM}},
              "required": ["title", "items"], "additionalProperties": False},
}


def answer(schema: Any, max_tokens: int, seed: int) -> tuple[list[int], bool]:
    """What a model of random logits writes, and whether it had to end."""
    generator = np.random.default_rng(seed)
    [matcher] = GRAMMARS.matchers(Grammar.json_schema(schema), 1, max_tokens=max_tokens)
    output: list[int] = []
    while len(output) < max_tokens:
        mask = np.zeros((1, GRAMMARS.words), np.int32)
        matcher.fill(output, 0, mask)
        allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
        output.append(int(generator.choice(allowed)))
        if output[-1] == 1:
            return output[:-1], matcher.closes(len(output) - 1)
    return output, matcher.closes(len(output) - 1)


@settings(max_examples=60)
@given(name=st.sampled_from(sorted(SCHEMAS)), max_tokens=st.integers(160, 260), seed=st.integers(0, 1 << 30))
def test_it_is_whole(name: str, max_tokens: int, seed: int) -> None:
    token_ids, closed = answer(SCHEMAS[name], max_tokens, seed)
    said = TOKENIZER.decode(token_ids)
    assert jsonschema_rs.validator_for(SCHEMAS[name], validate_formats=True).is_valid(json.loads(said)), said
    assert not closed or len(token_ids) >= max_tokens * 3 // 4  # it had most of its room


def test_what_cannot_be_closed_is_cut() -> None:
    [events] = solo([5], SamplingParams(max_tokens=20, structured=Grammar.regex("A{50}"))).values()
    assert (text(events), events[-1].finish_reason) == ("A" * 20, FinishReason.LENGTH)


def test_what_may_end_anywhere_has_all_of_its_room() -> None:
    [events] = solo([5], SamplingParams(max_tokens=20, structured=Grammar.regex("A*"), logit_bias={EOS: -100})).values()
    assert text(events) == "A" * 20


@pytest.mark.parametrize("speculation", [False, True])
def test_it_says_length_and_is_the_same_in_company(speculation: bool) -> None:
    """And where drafts are tried; a text's end is no text."""
    schema = {"type": "array", "items": {"type": "string", "minLength": 2}, "minItems": 2}
    engine = make_engine(max_model_len=128, speculation=speculation)
    grammar = Grammar.json_schema(schema)
    sent = {str(seed): ([seed, 2], SamplingParams(max_tokens=30 + seed, structured=grammar, seed=seed,
                                                 skip_special_tokens=False, temperature=seed % 2))
            for seed in range(12)}
    for name, (prompt, params) in sent.items():
        engine.add_request(name, prompt, params)
    reasons = []
    for (name, _), events in run(engine).items():
        [alone] = solo(*sent[name], max_model_len=128).values()
        assert tokens(events) == tokens(alone)
        assert jsonschema_rs.is_valid(schema, json.loads(text(events)))
        reasons.append(events[-1].finish_reason)
    assert FinishReason.LENGTH in reasons


def test_it_can_be_turned_off() -> None:
    engine = make_engine(close_structured=False)
    grammar = Grammar.json_schema({"type": "string", "minLength": 5})
    engine.add_request("a", [1], SamplingParams(max_tokens=20, structured=grammar, logit_bias={34: -100}))
    assert not text(run(engine)["a", 0]).endswith('"')
