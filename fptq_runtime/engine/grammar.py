"""Structured output: what an answer must be, and which tokens that leaves at each step. The parsing is llguidance's."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from typing import Any, Literal

import llguidance
import numpy as np
import numpy.typing as npt
from llguidance.gbnf_to_lark import gbnf_to_lark
from llguidance.numpy import fill_next_token_bitmask

from fptq_runtime.engine.closing import Closer, Plan
from fptq_runtime.engine.json_schema import closed, culprit, prepared
from fptq_runtime.errors import FptqError

logger = logging.getLogger(__name__)

MAX_GRAMMAR = 1 << 20  # characters
COMPILE_SECONDS = 5.0
KEPT_GRAMMARS = 64
PREPARED = 400  # tokens of the way to its end that are looked at while a grammar is compiled
# Of what a mask may take: some 10 ms of the whole batch's time at worst, and 40 MB for what a grammar's masks share.
LIMITS = llguidance.LLParserLimits(max_items_in_row=500, max_lexer_states=20_000, verbose_errors=False)
JSON_OPTIONS: Any = {
    # A space at most: where any whitespace may stand, a weak model writes nothing else.
    "whitespace_pattern": " ", "item_separator": ",", "key_separator": ":", "coerce_one_of": False, "lenient": False,
}


class GrammarError(FptqError):
    """A grammar that cannot be enforced, or not within the budget. The message is for the client."""

    def __init__(self, message: str) -> None:
        super().__init__(message, "structured")


@dataclass(frozen=True)
class Grammar:
    """A language that an answer must be of, from its first character to the end of sequence; SamplingParams.structured.

    Made by the methods below. A JSON schema holds with every keyword in it, or is refused when it is compiled; an
    object's properties come in the schema's order, others only where it speaks of them or names none. Lark is
    llguidance's: `embedded` puts a schema into it, and `<|name|>` is a special token.
    """

    kind: Literal["json_schema", "regex", "lark"]
    text: str

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | bool | str) -> Grammar:
        """schema: as an object, or as JSON text."""
        return cls("json_schema", schema if isinstance(schema, str) else json.dumps(schema))

    @classmethod
    def json_object(cls) -> Grammar:
        """Any JSON object."""
        return cls.json_schema({"type": "object"})

    @classmethod
    def regex(cls, pattern: str) -> Grammar:
        """An answer that the pattern matches as a whole; Rust's syntax, without lookarounds."""
        return cls("regex", pattern)

    @classmethod
    def choice(cls, options: Iterable[str]) -> Grammar:
        """One of these strings."""
        return cls.lark("start: " + " | ".join(json.dumps(option) for option in options))

    @classmethod
    def lark(cls, text: str) -> Grammar:
        """A grammar whose first rule is `start`."""
        return cls("lark", text)

    @classmethod
    def gbnf(cls, text: str) -> Grammar:
        """llama.cpp's notation, whose first rule is `root`. Raises GrammarError."""
        try:
            return cls.lark(gbnf_to_lark(text))
        except Exception as error:  # the converter raises bare Exception
            raise GrammarError(f"the GBNF grammar cannot be read: {error}") from None


class Matcher:
    """The tokens that may follow in one sequence. ends: ids that end it, which stand where the grammar may end.
    closer: without one, an answer of max_tokens is cut where it is; with one, it is closed before.

    Masks look ahead along a draft; whatever of it comes true need not be parsed again."""

    def __init__(self, parser: llguidance.LLMatcher, ends: npt.NDArray[np.int32], max_tokens: int = 0,
                 closer: Closer | None = None) -> None:
        self._fresh = parser
        self._parser = parser.deep_copy()
        self._ends = ends  # a mask
        self._consumed = 0  # tokens of the output
        self._ahead: list[int] = []  # consumed after them
        self._astray = False  # whether the parser ever was ahead
        self._max_tokens = max_tokens
        self._closer = closer
        self._plans: list[Plan] = []  # at every place up to the last for which a mask was made

    def fill(self, token_ids: Sequence[int], min_tokens: int, masks: npt.NDArray[np.int32],
             draft: Sequence[int] = ()) -> None:
        """Set the bits of the tokens that may follow an output and, mask by mask, each token of a draft,
        [1 + draft, words]; nothing may where the draft itself may not. The output begins with what was given the last
        time. An end comes before min_tokens only where nothing else can follow. Raises GrammarError where the grammar
        is too complex, unless it is only for the draft."""
        position = len(token_ids)
        try:
            self._follow(token_ids)
            self._fill(position, min_tokens, masks[0])
        except GrammarError:
            if not self._astray:
                raise
            self._restart()  # a parser that has seen less may still do
            self._follow(token_ids)
            self._fill(position, min_tokens, masks[0])
        try:
            for place, token_id in enumerate(draft):
                if not masks[place, token_id // 32] >> token_id % 32 & 1:
                    break
                self._go_ahead(token_id)
                self._fill(position + place + 1, min_tokens, masks[place + 1])
        except GrammarError:
            masks[place + 1] = 0
            self._restart()

    def foresee(self, token_ids: Sequence[int], guess: Sequence[int]) -> tuple[list[int], int]:
        """After an output, the tokens of the text that must follow, as a tokenizer would write it, and how many of a
        guess may follow. The output begins with what was given the last time."""
        try:
            self._follow(token_ids)
        except GrammarError:
            return [], 0  # which fill will say
        way = self._plans[len(token_ids) - 1].way if len(self._plans) >= len(token_ids) > 0 else None
        if way is not None:
            rest = list(way[1:])
            return rest, next((i for i, token_id in enumerate(guess) if rest[i : i + 1] != [token_id]), len(guess))
        forced = self._parser.compute_ff_tokens()
        return forced, self._parser.validate_tokens(list(guess)) if guess else 0

    def closes(self, position: int) -> bool:
        """Whether what an output had at this place was no choice, for it had to end."""
        return position < len(self._plans) and self._plans[position].way is not None

    def _follow(self, token_ids: Sequence[int]) -> None:
        """Consume an output; of what was consumed ahead, what it does not have is taken back."""
        added = list(token_ids[self._consumed :])
        same = 0
        while same < min(len(added), len(self._ahead)) and added[same] == self._ahead[same]:
            same += 1
        if same < len(self._ahead):
            self._parser.rollback(len(self._ahead) - same)
        self._consumed, self._ahead = len(token_ids), []
        self._parser.consume_tokens(added[same:])
        self._check()

    def _go_ahead(self, token_id: int) -> None:
        self._astray = True
        self._parser.consume_token(token_id)
        self._check()
        self._ahead.append(token_id)

    def _fill(self, position: int, min_tokens: int, mask: npt.NDArray[np.int32]) -> None:
        early = position < min_tokens
        way = self._way(position, min_tokens)
        if way:
            mask[:] = 0
            mask.view(np.uint32)[way[0] // 32] = np.uint32(1 << way[0] % 32)
            return
        if way is not None:
            mask[:] = self._ends
            return
        fill_next_token_bitmask(self._parser, mask[None])
        self._check()
        if self._parser.is_accepting():
            mask |= self._ends
        if early and (others := mask & ~self._ends).any():
            mask[:] = others

    def _way(self, position: int, min_tokens: int) -> tuple[int, ...] | None:
        if self._closer is None:
            return None
        del self._plans[position:]
        before = self._plans[-1] if self._plans else Plan()
        self._plans.append(before.following(position, self._max_tokens, min_tokens, self._closer, self._parser))
        return self._plans[-1].way

    def _check(self) -> None:
        if self._parser.is_error():
            raise GrammarError(f"the grammar cannot be followed: {_one_line(self._parser.get_error())}")

    def _restart(self) -> None:
        self._parser = self._fresh.deep_copy()
        self._consumed, self._ahead, self._astray = 0, [], False


class Grammars:
    """Compiles grammars for one model's tokens, on threads of its own, and keeps the latest.

    tokenizer: its tokenizer.json, asked for with the first grammar. eos_token_ids: at least one, or every grammar is
    refused. close: whether answers are closed before max_tokens cuts them.
    """

    def __init__(self, tokenizer: Callable[[], str], vocab_size: int, eos_token_ids: Iterable[int],
                 close: bool = False) -> None:
        self._tokenizer_json = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = sorted(eos_token_ids)
        self._workers = ThreadPoolExecutor(2, "fptq-grammar")
        self._tokenizer: Future[llguidance.LLTokenizer] | None = None
        self._close = close
        self._closer: Closer | None = None  # made with the first grammar
        self._parsers: OrderedDict[Grammar, Future[llguidance.LLMatcher | str]] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def words(self) -> int:
        """Of one mask."""
        return (self._vocab_size + 31) // 32

    @property
    def tokenizer(self) -> Future[llguidance.LLTokenizer]:
        """Read when first asked for: a second or more for a large vocabulary, which is no grammar's fault."""
        with self._lock:
            if self._tokenizer is None:
                self._tokenizer = self._workers.submit(
                    lambda: llguidance.LLTokenizer(self._tokenizer_json(), n_vocab=self._vocab_size,
                                                   eos_token=self._eos_token_ids))
        return self._tokenizer

    def submit(self, grammar: Grammar) -> Future[llguidance.LLMatcher | str]:
        """Begin to compile a grammar, unless it is known: to its parser, or to why there is none."""
        tokenizer = self.tokenizer
        with self._lock:
            parser = self._parsers.pop(grammar, None) or self._workers.submit(self._prepare, grammar, tokenizer)
            self._parsers[grammar] = parser
            if len(self._parsers) > KEPT_GRAMMARS:
                self._parsers.popitem(last=False)
        return parser

    def parser(self, grammar: Grammar, timeout: float = COMPILE_SECONDS) -> llguidance.LLMatcher:
        """Waits for it, so many seconds once there is a tokenizer. Raises GrammarError."""
        wait([self.tokenizer])
        try:
            parser = self.submit(grammar).result(timeout)
        except FutureTimeoutError:
            raise GrammarError(f"the grammar was not compiled within {COMPILE_SECONDS:.0f} s; simplify it") from None
        if isinstance(parser, str):
            raise GrammarError(parser)
        return parser

    def matchers(self, grammar: Grammar, count: int, stop_token_ids: Iterable[int] = (), max_tokens: int = 0
                 ) -> list[Matcher]:
        """One for each of a request's sequences, of at most max_tokens; stop_token_ids end them too. Raises
        GrammarError."""
        parser = self.parser(grammar)
        ends = np.zeros(self.words, np.uint32)
        for token_id in {*self._eos_token_ids, *stop_token_ids}:
            ends[token_id // 32] |= np.uint32(1 << token_id % 32)
        return [Matcher(parser, ends.view(np.int32), max_tokens, self._closer) for _ in range(count)]

    def _prepare(self, grammar: Grammar, tokenizer: Future[llguidance.LLTokenizer]) -> llguidance.LLMatcher | str:
        """Compile it, and go its shortest way once: later ones share what the lexer learns there."""
        parser = self._compile(grammar, tokenizer)
        if self._close and not isinstance(parser, str):
            self._closer = self._closer or Closer(tokenizer.result())
            self._closer.way(parser, PREPARED)
        return parser

    def _compile(self, grammar: Grammar, tokenizer: Future[llguidance.LLTokenizer]) -> llguidance.LLMatcher | str:
        if len(grammar.text) > MAX_GRAMMAR:
            return f"the grammar has {len(grammar.text)} characters; at most {MAX_GRAMMAR} are taken"
        if not self._eos_token_ids:
            return "this model has no end of sequence, which a structured answer needs"
        deadline = time.monotonic() + COMPILE_SECONDS / 2

        def error_of(schema: Any) -> str | None:
            if time.monotonic() > deadline:
                return "no time is left to find out where"
            built = _from_schema(tokenizer.result(), schema)
            return built if isinstance(built, str) else None

        try:
            if grammar.kind != "json_schema":
                return _built(tokenizer.result(), _SOURCES[grammar.kind](grammar.text))
            schema = json.loads(grammar.text)
            built = _from_schema(tokenizer.result(), schema)
            if isinstance(built, str) and (found := culprit(schema, error_of)) is not None:
                return f"{found[0]} cannot be enforced: {found[1]}"
            return built
        except RecursionError:
            return "the schema is nested too deeply"
        except Exception as error:
            return _one_line(error)


def embedded(schema: Any) -> str:
    """A JSON schema as the body of a rule in Lark, `%json {…}`, which means what Grammar.json_schema does."""
    if not isinstance(schema, dict):
        schema = {"allOf": [schema]}
    return f"%json {json.dumps({**prepared(closed(schema)), 'x-guidance': JSON_OPTIONS})}"


_SOURCES = {"regex": llguidance.LLMatcher.grammar_from_regex, "lark": llguidance.LLMatcher.grammar_from_lark}


def _from_schema(tokenizer: llguidance.LLTokenizer, schema: Any) -> llguidance.LLMatcher | str:
    if isinstance(schema, bool):
        schema = {} if schema else {"enum": []}
    if not isinstance(schema, dict):
        return "a JSON schema is an object, true or false"
    for form in (closed(schema), schema):
        source = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(prepared(form)), overrides=JSON_OPTIONS)
        built = _built(tokenizer, source)
        if not isinstance(built, str):
            break
    if isinstance(built, str) and "coerce_one_of" in built:
        return "more than one of its alternatives may hold at a time; anyOf takes that"
    return built


def _built(tokenizer: llguidance.LLTokenizer, source: str) -> llguidance.LLMatcher | str:
    """A parser, or why there is none. Without the GIL, mostly."""
    parser = llguidance.LLMatcher(tokenizer, source, log_level=0, limits=LIMITS)
    return _one_line(parser.get_error()) if parser.is_error() else parser


def _one_line(error: object) -> str:
    return " ".join(str(error).split())
