"""What a model thinks before it answers, told apart from the answer."""

from __future__ import annotations

from typing import NamedTuple

from fptq_server.parsers.frame import SPACE, Content, Parser, Reasoning, Steps


class ReasoningFormat(NamedTuple):
    """mark: what tells in a chat template that the model thinks so. begin and end: what stands around its thoughts."""

    name: str
    mark: str
    begin: str
    end: str


class Thinking(Parser):
    """Reasoning at the beginning of an answer; what follows is `answer`'s to read, or content. An answer whose
    reasoning does not end is all reasoning. White space around it is left out.

    opened: the prompt ends with `begin`.
    """

    def __init__(self, form: ReasoningFormat, opened: bool, answer: Parser | None) -> None:
        super().__init__({})
        self._form = form
        self._opened = opened
        self._answer = answer

    def parse(self) -> Steps[None]:
        self.mark()
        start = self._at
        yield from self.skip_space()
        if (yield from self.accept(self._form.begin)) or self._opened:
            self.commit()
            yield from self.skip_space()
            if (yield from self.find((self._form.end,), self._reason)) is None:
                self.reasoning(self._space)
            self._space = ""
            yield from self.skip_space()
        else:
            self._at = start
            self.commit()
        while (yield from self.peek()):
            self._pass(len(self._text), self._pass_on)
        if self._answer is not None:
            self._deltas += self._answer.finish()

    def _reason(self, text: str) -> None:
        body = text.rstrip(SPACE)
        if body:
            self._deltas.append(Reasoning(self._space + body))
            self._space = ""
        self._space += text[len(body) :]

    def _pass_on(self, text: str) -> None:
        self._deltas += [Content(text)] if self._answer is None else self._answer.feed(text)
