"""Oracles: Python's re for what a regular language holds, jsonschema-rs for schemas, and a grammar's own words."""

from __future__ import annotations

import math
import random
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fptq_runtime
from fptq_runtime.engine import grammar as grammar_module
from fptq_runtime.engine.grammar import Grammar, GrammarError, Grammars
from fptq_runtime.engine.request import FinishReason, SamplingParams
from fptq_runtime.errors import FptqError
from fptq_runtime.models.tokenizer import Tokenizer
from tests.engine.fake import EOS, VOCAB, gist, make_engine, run, solo, text, tokens

DEMO = Path(fptq_runtime.__file__).parent / "demo"
PATTERNS = ["[0-9]{2,5}(,[0-9]{1,3}){0,3}", "(YES|NO|[A-F]{3,9})", "A{5,8}( B{2,4})?", "[A-Z]+(-[A-Z]+)*\\?"]


def one(prompt: list[int], grammar: Grammar, **params: Any) -> list[Any]:
    """Events of the only sequence."""
    return solo(prompt, SamplingParams(**{"max_tokens": 60, "structured": grammar, **params}))[0]


@settings(max_examples=40)
@given(pattern=st.sampled_from(PATTERNS), seed=st.integers(0, 1 << 30), temperature=st.sampled_from([0.0, 1.0, 3.0]))
def test_an_answer_is_of_its_language(pattern: str, seed: int, temperature: float) -> None:
    events = one([1, 2, seed % 90], Grammar.regex(pattern), seed=seed, temperature=temperature)
    answer = text(events)
    if events[-1].finish_reason is FinishReason.STOP:
        assert re.fullmatch(pattern, answer)
        assert tokens(events)[-1] == EOS
    else:
        assert events[-1].finish_reason is FinishReason.LENGTH
        assert len(tokens(events)) == 60 or re.fullmatch(pattern, answer)


@pytest.mark.parametrize("options", [
    {"num_blocks": 6, "max_num_batched_tokens": 40, "enable_prefix_caching": False}, {"asynchronous": True},
    {"asynchronous": True, "num_blocks": 6, "enable_prefix_caching": False}, {"max_num_seqs": 3},
], ids=str)
def test_company_and_preemption_do_not_matter(options: dict[str, Any]) -> None:
    engine = make_engine(max_model_len=96, speculation=True, **options)
    generator = random.Random(str(options))
    sent = {}
    for i in range(12):
        grammar = None if i % 4 == 3 else Grammar.regex(["[A-F]{40,60}", "([0-9]{3},){8,12}[0-9]?", "A{5,8}"][i % 4])
        params = SamplingParams(
            n=generator.choice([1, 2]), max_tokens=60, temperature=generator.choice([0, 1]), seed=i, structured=grammar,
            min_tokens=generator.choice([0, 6]), logprobs=generator.choice([None, 3]),
            stop=generator.choice([(), ("AB",)]), stop_token_ids=generator.choice([(), (7,)]), repetition_penalty=1.2)
        sent[str(i)] = [generator.randrange(1, VOCAB) for _ in range(generator.randrange(1, 30))], params
        engine.add_request(str(i), *sent[str(i)])
    preemptions, events = 0, {}
    while engine.has_unfinished_requests:
        outputs, stats = engine.step()
        preemptions += stats.preemptions
        for output in outputs:
            events.setdefault((output.request_id, output.index), []).append(output)
        engine.check_integrity()
    assert (preemptions > 0) == ("num_blocks" in options)
    for name, (prompt, params) in sent.items():
        for index, alone in solo(prompt, params, max_model_len=96).items():
            assert gist(events[name, index]) == gist(alone)


def test_min_tokens_forces_no_more_than_the_grammar_has() -> None:
    """It keeps an answer that can go on from ending, and no other."""
    for seed in range(10):
        answer = text(one([seed], Grammar.regex("A{2,9}"), min_tokens=7, seed=seed))
        assert 7 <= len(answer) <= 9
        assert text(one([seed], Grammar.choice(["YES", "NO"]), min_tokens=7, seed=seed)) in ("YES", "NO")


def test_a_stop_id_ends_where_the_grammar_may() -> None:
    """Here one that the grammar has no word with."""
    ends = set()
    for seed in range(40):
        events = one([seed], Grammar.regex("A{2,30}"), seed=seed, stop_token_ids=(7,), logit_bias={7: 4, EOS: 4})
        assert re.fullmatch("A{2,30}", text(events))
        ends.add(events[-1].stop_reason)
    assert ends == {None, 7}


def test_max_tokens_and_stop_strings_cut() -> None:
    events = one([5], Grammar.regex("A{50}"), max_tokens=10)
    assert (text(events), events[-1].finish_reason) == ("A" * 10, FinishReason.LENGTH)
    events = one([5], Grammar.regex("A{8}B"), stop=("AAB",))
    assert (text(events), events[-1].finish_reason, events[-1].stop_reason) == ("A" * 6, FinishReason.STOP, "AAB")


def test_bias_and_penalties_move_within_the_grammar() -> None:
    for options in ({"logit_bias": {ord("Z"): 100}}, {"logit_bias": {EOS: 100}}, {"repetition_penalty": 50.0}):
        assert text(one([3], Grammar.choice(["AB", "CD"]), **options)) in ("AB", "CD")
    assert text(one([3], Grammar.choice(["AB", "CD"]), logit_bias={ord("C"): 100})) == "CD"


def test_log_probabilities_are_those_of_what_is_allowed() -> None:
    events = one([3], Grammar.regex("[AB]C"), logprobs=5)
    first, second, end = (entry for event in events for entry in event.logprobs)
    assert {token_id for token_id, _ in first.top} == {ord("A"), ord("B")}
    assert sum(math.exp(value) for _, value in first.top) == pytest.approx(1)
    assert (second.token_id, second.logprob, second.top) == (ord("C"), 0, ((ord("C"), 0),))
    assert (end.token_id, end.logprob) == (EOS, 0)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_grammar_that_grows_too_complex_ends_its_sequence_alone(asynchronous: bool) -> None:
    engine = make_engine(asynchronous=asynchronous, close_structured=False)
    ambiguous = Grammar.lark('start: a\na: "B" | a a a | a "C" a | a "B" a')
    engine.add_request("good", [1, 2], SamplingParams(max_tokens=100, structured=Grammar.regex("A{200}")))
    engine.add_request("bad", [1, 2], SamplingParams(max_tokens=200, structured=ambiguous, logit_bias={EOS: -100}))
    events = run(engine)
    assert events["bad", 0][-1].finish_reason is FinishReason.ERROR
    assert "cannot be followed" in events["bad", 0][-1].failure
    assert text(events["good", 0]) == "A" * 100


def test_ignore_eos_is_refused() -> None:
    with pytest.raises(FptqError, match="ignore_eos"):
        SamplingParams(structured=Grammar.json_object(), ignore_eos=True)


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(Tokenizer(DEMO).to_json, 4096, (1,))


@pytest.mark.parametrize(("grammar", "message"), [
    (Grammar.regex("(a"), "unclosed"),
    (Grammar.regex("(?=a)b"), "look"),
    (Grammar.lark("begin: \"a\""), "start"),
    (Grammar.lark("start: other"), "other"),
    (Grammar.json_schema("{"), "line 1 column 2"),
    (Grammar.json_schema("5"), "object"),
    (Grammar.json_schema({"type": "strange"}), "strange"),
    (Grammar.json_schema({"not": {"type": "null"}}), "not"),
    (Grammar.json_schema({"x-guidance": {"lenient": True}, "not": {"type": "null"}}), "not"),
    (Grammar.json_schema(False), "nsatisfiable"),
    (Grammar.json_schema({"$ref": "http://example.com/schema"}), "example.com"),
    (Grammar.regex("a" * (1 << 20 | 1)), "characters"),
], ids=lambda value: str(value)[:60])
def test_what_cannot_be_enforced_is_refused(grammars: Grammars, grammar: Grammar, message: str) -> None:
    for _ in range(2):  # the second time it is known
        with pytest.raises(GrammarError, match=message) as caught:
            grammars.parser(grammar)
        assert "\n" not in str(caught.value)
        assert caught.value.param == "structured"


def test_gbnf() -> None:
    grammar = Grammar.gbnf('root ::= item ("," item)*\nitem ::= [A-C] [0-9]{2}\n')
    for seed in range(10):
        events = one([seed], grammar, seed=seed, logit_bias={EOS: 3})
        if events[-1].finish_reason is FinishReason.STOP:
            assert re.fullmatch("[A-C][0-9]{2}(,[A-C][0-9]{2})*", text(events))
    with pytest.raises(GrammarError, match="GBNF"):
        Grammar.gbnf("root := x")


@pytest.mark.parametrize("options", [["a", "b"], ['"', "\\", "\n", "é", "🙂", "a|b", "[x]", "//", "  ", "\x7f", '"i']])
def test_choices_are_taken_literally(grammars: Grammars, options: list[str]) -> None:
    tokenizer = Tokenizer(DEMO)
    for option in options:
        for other in (option, option + "x"):
            [matcher] = grammars.matchers(Grammar.choice(options), 1)
            token_ids = tokenizer.encode(other, False)
            whole = matcher._parser.try_consume_tokens(token_ids) == len(token_ids) and matcher._parser.is_accepting()
            assert whole == (other in options)


def test_the_latest_grammars_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_module, "KEPT_GRAMMARS", 2)
    grammars = Grammars(Tokenizer(DEMO).to_json, 4096, (1,))
    first, second, third = (Grammar.regex(f"a{{{n}}}") for n in (1, 2, 3))
    kept = grammars.parser(first), grammars.parser(second)
    assert grammars.parser(first) is kept[0]
    grammars.parser(third)
    assert grammars.parser(first) is kept[0]
    assert grammars.parser(second) is not kept[1]


def test_a_model_without_an_end_has_no_structured_answers() -> None:
    with pytest.raises(GrammarError, match="end of sequence"):
        Grammars(Tokenizer(DEMO).to_json, 4096, ()).parser(Grammar.json_object())
