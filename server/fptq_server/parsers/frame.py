"""What every parser of a model's output is made of. Pure text: no tokens, no HTTP."""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, TypeAlias, TypeVar

T = TypeVar("T")
Steps: TypeAlias = Generator[None, None, T]  # suspends where the text does not decide yet
SPACE = " \t\r\n"
NAME = re.compile(r"\s*[\w.:/-]{0,128}\s*")


@dataclass(frozen=True)
class Content:
    text: str


@dataclass(frozen=True)
class Reasoning:
    text: str


@dataclass(frozen=True)
class CallStart:
    """The index-th tool call of an answer begins."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class Arguments:
    """The next characters of a call's arguments, which are JSON."""

    index: int
    text: str


Delta: TypeAlias = Content | Reasoning | CallStart | Arguments


class NotACall(Exception):
    """What was read resembles a call and is none."""


class JsonCalls(NamedTuple):
    """How a format writes calls whose arguments are JSON: around those of one call `open`, in which {name} stands for
    the function's name, and `close`; `between` two calls, and `before` and `after` them all. single: a turn has at most
    one."""

    open: str
    close: str
    between: str = ""
    before: str = ""
    after: str = ""
    single: bool = False


@dataclass
class Call:
    id: str
    name: str
    arguments: str = ""


@dataclass
class Answer:
    """What deltas add up to."""

    content: str = ""
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)

    def add(self, deltas: Iterable[Delta]) -> Answer:
        for delta in deltas:
            match delta:
                case Content(text):
                    self.content += text
                case Reasoning(text):
                    self.reasoning += text
                case CallStart(_, call_id, name):
                    self.calls.append(Call(call_id, name))
                case Arguments(index, text):
                    self.calls[index].arguments += text
        return self


def random_id(length: int | None) -> str:
    """length: of an id without the prefix that OpenAI's have."""
    if length is None:
        return "call_" + secrets.token_hex(12)
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(length))


class Parser:
    """Reads a model's output piece by piece; the deltas of `feed` and `finish` say the same however it is cut.

    A format says what its calls begin with, and how one is read: `call` may wait for more text with `yield from` and
    raises NotACall where it finds something else. As long as it has not called `start`, all that it read becomes
    content then. White space around a call belongs to the format and is left out.

    tools: the parameters' JSON schema of every function that may be called, by name.
    """

    name: ClassVar[str]
    marks: ClassVar[tuple[str, ...]]  # any of them in a chat template says that the model writes this format
    openers: ClassVar[tuple[str, ...]]
    inner: ClassVar[tuple[str, ...]] = ()  # markers beside them, some of which are special tokens
    bare: ClassVar[str] = ""  # what an answer begins with that may be a call without an opener
    json_calls: ClassVar[JsonCalls]
    id_length: ClassVar[int | None] = None  # of a call's id, where templates insist on one
    always: ClassVar[bool] = False  # the model writes this format where it calls nothing too

    def __init__(self, tools: Mapping[str, Any]) -> None:
        self.tools = tools
        self._text = ""
        self._at = 0  # what is before it has been read
        self._kept: int | None = None  # where the text begins that may still turn out to be content
        self._ended = False
        self._deltas: list[Delta] = []
        self._space = ""  # content, unless a call follows
        self._after_call = False
        self._num_calls = 0
        self._function = ""  # of the last call
        self._num_members = 0
        self._in_members = False
        self._steps = self.parse()

    def feed(self, text: str) -> list[Delta]:
        self._text += text
        return self._advance()

    def finish(self) -> list[Delta]:
        """What is left once nothing more comes."""
        self._ended = True
        deltas = self._advance()
        if self._space and not self._after_call:
            deltas.append(Content(self._space))
        return deltas

    def parse(self) -> Steps[None]:
        if self.bare:
            self.mark()
            start = self._at
            char = yield from self.skip_space()
            self._at, self._kept = start, None
            if char and char in self.bare:
                yield from self.attempt("")
        while (opener := (yield from self.find(self.openers, self.content))) is not None:
            yield from self.attempt(opener)

    def call(self, opener: str) -> Steps[None]:
        """Read what follows the opener: one call or several."""
        raise NotImplementedError

    # Reading

    def more(self) -> Steps[bool]:
        """Wait for more text; False at the end."""
        if self._ended:
            return False
        if self._kept is None:
            self._text, self._at = self._text[self._at :], 0
        yield
        return True

    def peek(self) -> Steps[str]:
        """The next character; empty at the end."""
        while self._at == len(self._text):
            if not (yield from self.more()):
                return ""
        return self._text[self._at]

    def skip_space(self) -> Steps[str]:
        """The character after white space."""
        while (char := (yield from self.peek())) and char in SPACE:
            self._at += 1
        return char

    def back(self, literal: str) -> None:
        """Read again what was just read."""
        self._at -= len(literal)

    def accept(self, literal: str) -> Steps[bool]:
        """Read the literal, if it is what comes."""
        while not self._text.startswith(literal, self._at):
            if not literal.startswith(self._text[self._at :]) or not (yield from self.more()):
                return False
        self._at += len(literal)
        return True

    def expect(self, literal: str) -> Steps[None]:
        if not (yield from self.accept(literal)):
            raise NotACall

    def find(self, markers: tuple[str, ...], emit: Callable[[str], None]) -> Steps[str | None]:
        """Give `emit` the text before the first of the markers, as it becomes certain, and read that marker; None where
        none of them comes."""
        while True:
            found = [(i, marker) for marker in markers if (i := self._text.find(marker, self._at)) >= 0]
            if found:
                end, marker = min(found)
                self._pass(end, emit)
                self._at += len(marker)
                return marker
            self._pass(len(self._text) - max(_begun(self._text, self._at, marker) for marker in markers), emit)
            if not (yield from self.more()):
                self._pass(len(self._text), emit)
                return None

    def until(self, *markers: str) -> Steps[str]:
        """The text before the first of the markers, which is read too. Raises NotACall where none comes."""
        parts: list[str] = []
        if (yield from self.find(markers, parts.append)) is None:
            raise NotACall
        return "".join(parts)

    def name_until(self, *markers: str) -> Steps[tuple[str, str]]:
        """A function's name, and the first of the markers, which ends it. Raises NotACall as soon as what comes is no
        name."""
        parts: list[str] = []

        def emit(text: str) -> None:
            parts.append(text)
            if not NAME.fullmatch("".join(parts)):
                raise NotACall

        marker = yield from self.find(markers, emit)
        name = "".join(parts).strip()
        if marker is None or not name:
            raise NotACall
        return name, marker

    def close(self, literal: str) -> Steps[None]:
        """Read what ends a call, which some models leave out."""
        yield from self.skip_space()
        yield from self.accept(literal)

    def json_value(self, emit: Callable[[str], None], quotes: str = '"', ends: str = ",}]") -> Steps[None]:
        """Give `emit` the text of a JSON value; only its brackets and strings are looked at, so that a value that
        breaks JSON's rules is passed on as it is. quotes: what strings may stand in. ends: what ends a number or a
        word, beside white space."""
        depth, quote, escaped = 0, "", False
        scalar = (yield from self.peek()) not in tuple("{[" + quotes)
        i = self._at
        while True:
            while i < len(self._text):
                char = self._text[i]
                if scalar and (char in SPACE or char in ends):
                    self._pass(i, emit)
                    return
                if escaped:
                    escaped = False
                elif quote:
                    escaped = char == "\\"
                    quote = "" if char == quote else quote
                elif char in quotes:
                    quote = char
                elif char in "{[":
                    depth += 1
                elif char in "}]":
                    depth -= 1
                i += 1
                if not (scalar or depth or quote or escaped):
                    self._pass(i, emit)
                    return
            self._pass(i, emit)
            if not (yield from self.more()):
                return
            i = self._at

    def value(self) -> Steps[str]:
        """The whole text of a JSON value."""
        parts: list[str] = []
        yield from self.json_value(parts.append)
        return "".join(parts)

    def mark(self) -> None:
        """What is read from here on may turn out to be content."""
        if self._kept is None:
            self._kept = self._at

    def commit(self) -> None:
        """What was read is none."""
        self._kept = None

    def attempt(self, opener: str) -> Steps[None]:
        """Read what the opener begins, which has been read. Where that is no call, the opener is content, and reading
        goes on behind it; behind a call, at the mark."""
        behind = self._kept = self._at
        calls = self._num_calls
        try:
            yield from self.call(opener)
        except NotACall:
            if self._num_calls == calls:
                self.content(opener)
                self._at = behind
            elif self._kept is not None:
                self._at = self._kept
            if self._in_members:
                self.end_members()
        self._kept = None

    # Saying

    def content(self, text: str) -> None:
        body = text.rstrip(SPACE)
        if not body:
            self._space += text
            return
        self._deltas.append(Content(body.lstrip(SPACE) if self._after_call else self._space + body))
        self._space = text[len(body) :]
        self._after_call = False

    def reasoning(self, text: str) -> None:
        if text:
            self._deltas.append(Reasoning(text))

    def start(self, name: str) -> None:
        """A call begins; nothing that was read can become content any more."""
        self._kept = None
        self._space, self._after_call = "", True
        self._function, self._num_members = name, 0
        self._deltas.append(CallStart(self._num_calls, random_id(self.id_length), name))
        self._num_calls += 1

    def arguments(self, text: str) -> None:
        if text:
            self._deltas.append(Arguments(self._num_calls - 1, text))

    # What formats share

    def json_call(self, names: tuple[str, ...] = ("name",), *, known: bool = False) -> Steps[None]:
        """{"name": …, "arguments": {…}}, the keys in any order. known: only of a function that there is, with
        arguments: what says that it is a call is nothing else."""
        yield from self.expect("{")
        name, held, started = "", "", False
        yield from self.skip_space()
        while True:
            if (yield from self.peek()) != '"':
                raise NotACall
            key = _loads((yield from self.value()))
            yield from self.skip_space()
            yield from self.expect(":")
            char = yield from self.skip_space()
            if key in ("arguments", "parameters"):
                if name and char == "{" and not started:
                    started = True
                    self.start(name)
                    yield from self.json_value(self.arguments)
                    self.mark()
                else:
                    held = yield from self.value()
            elif key in names:
                value = _loads((yield from self.value()))
                if not isinstance(value, str) or not value or (known and value not in self.tools):
                    raise NotACall
                name = value
            else:
                yield from self.value()
            yield from self.skip_space()
            if (yield from self.accept("}")):
                break
            yield from self.expect(",")
            yield from self.skip_space()
        if not started:
            if not name or (known and not held.startswith("{")):
                raise NotACall
            self.start(name)
            self.arguments(_object(held))

    def json_follows(self) -> Steps[bool]:
        """Whether an object comes, or a list of them. Not for what has been committed to."""
        start = self._at
        yield from self.skip_space()
        yield from self.accept("[")
        found = (yield from self.skip_space()) == "{"
        self._at = start
        return found

    def json_call_list(self, names: tuple[str, ...] = ("name",), *, known: bool = False) -> Steps[None]:
        """[{"name": …}, …], or one alone."""
        if (yield from self.skip_space()) == "{":
            yield from self.json_call(names, known=known)
            return
        yield from self.expect("[")
        while True:
            yield from self.skip_space()
            yield from self.json_call(names, known=known)
            self.mark()
            yield from self.skip_space()
            if not (yield from self.accept(",")):
                break
        yield from self.expect("]")

    def member(self, key: str, *ends: str, string: bool | None = None) -> Steps[str | None]:
        """One argument of a format that writes them apart: its text as it stands, up to one of the ends. It is JSON
        where it can be, unless it is a string; what the output does not say of that, the function's schema does. The
        end; None where none comes."""
        self.commit()
        self._in_members = True
        self.arguments(("{" if self._num_members == 0 else ", ") + _dumps(key) + ": ")
        self._num_members += 1
        if self._is_string(key) if string is None else string:
            self.arguments('"')
            end = yield from self.find(ends, lambda text: self.arguments(_dumps(text)[1:-1]))
            if end is not None:
                self.arguments('"')
            return end
        parts: list[str] = []
        end = yield from self.find(ends, parts.append)
        text = "".join(parts)
        try:
            self.arguments(_dumps(json.loads(text)))
        except (ValueError, RecursionError):
            self.arguments(_dumps(text))
        return end

    def end_members(self) -> None:
        self._in_members = False
        self.arguments("}" if self._num_members else "{}")

    def _is_string(self, key: str) -> bool:
        schema = self.tools.get(self._function)
        properties = schema.get("properties") if isinstance(schema, Mapping) else None
        kind = properties.get(key) if isinstance(properties, Mapping) else None
        return isinstance(kind, Mapping) and kind.get("type") == "string"

    def _pass(self, end: int, emit: Callable[[str], None]) -> None:
        if end > self._at:
            emit(self._text[self._at : end])
            self._at = end

    def _advance(self) -> list[Delta]:
        next(self._steps, None)
        deltas, self._deltas = self._deltas, []
        return deltas


def _begun(text: str, start: int, marker: str) -> int:
    """How many characters at the end of text, from start on, may be the beginning of the marker."""
    for length in range(min(len(text) - start, len(marker) - 1), 0, -1):
        if text.endswith(marker[:length]):
            return length
    return 0


def _loads(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise NotACall from None


def _dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _object(text: str) -> str:
    """Arguments as they should be: some models write none, null, or JSON within a string."""
    if text in ("", "null"):
        return "{}"
    if text.startswith('"'):
        with suppress(ValueError):
            return str(json.loads(text))
    return text
