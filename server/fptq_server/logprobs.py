"""Log-probabilities in the shapes that OpenAI has for them."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

from fptq_runtime.engine.output import TokenLogprobs
from fptq_runtime.models.tokenizer import REPLACEMENT, Tokenizer
from fptq_server.protocol import (
    ChatLogprobs,
    CompletionLogprobs,
    PromptLogprob,
    PromptLogprobs,
    TokenLogprob,
    TopLogprob,
)

CONTEXT = 8  # last tokens of a prompt that shape the text after it


class TokenText(NamedTuple):
    """One token on its own, in the middle of a text. name: OpenAI's, which spells a part of a character in bytes."""

    raw: bytes
    text: str
    name: str
    special: bool


class TokenTexts:
    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.look_up = lru_cache(maxsize=1 << 18)(self._look_up)

    def _look_up(self, token_id: int) -> TokenText:
        raw = self._tokenizer.token_bytes(token_id)
        special = bool(raw) and self._tokenizer.is_special(token_id)
        try:
            text = name = raw.decode()
        except UnicodeDecodeError:
            text, name = raw.decode(errors="replace"), "bytes:" + raw.decode(errors="backslashreplace")
        return TokenText(raw, text, name, special)

    def first(self, token_id: int) -> bytes:
        """What a token adds where no text precedes it: some decoders strip its space."""
        raw = self.look_up(token_id).raw
        return raw[1:] if raw[:1] == b" " and not self._tokenizer.decode([token_id], False).startswith(" ") else raw


class TextPosition:
    """Where the next token of a text begins, in characters. A token that leaves a character open does not move it.

    skip_special: the text leaves special tokens out. context: token ids before the text.
    """

    def __init__(self, texts: TokenTexts, skip_special: bool, context: Sequence[int] = ()) -> None:
        self._texts = texts
        self._skip_special = skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._begun = False
        self._open = False
        self.offset = 0
        for token_id in context[-CONTEXT:]:
            self.advance(token_id)
        self._open = bool(self._bytes_left())
        self.offset = 0

    def advance(self, token_id: int) -> None:
        token = self._texts.look_up(token_id)
        if token.special and self._skip_special:
            return
        raw = token.raw if self._begun else self._texts.first(token_id)
        self._begun = True
        text = self._decoder.decode(raw)
        if self._open and text:  # the context's last character is completed, or shown as U+FFFD, which is not ours
            text = text.removeprefix(REPLACEMENT)
            self._open = False
        self.offset += len(text)

    def _bytes_left(self) -> bytes:
        return self._decoder.getstate()[0]


class LogprobsRenderer:
    """as_ids: tokens are named `token_id:N`, which no two tokens share."""

    def __init__(self, texts: TokenTexts, as_ids: bool, skip_special: bool) -> None:
        self._texts = texts
        self._as_ids = as_ids
        self._skip_special = skip_special

    def position(self, context: Sequence[int] = ()) -> TextPosition:
        return TextPosition(self._texts, self._skip_special, context)

    def completion(self, entries: Iterable[tuple[int, TokenLogprobs | None]], count: int, position: TextPosition
                   ) -> CompletionLogprobs:
        """entries: token id and what is known of it, of which the `count` likeliest are shown. position: of the first
        of them; it is moved past the last."""
        result = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        for token_id, entry in entries:
            result.tokens.append(self._name(token_id))
            result.token_logprobs.append(None if entry is None else entry.logprob)
            result.top_logprobs.append(None if entry is None else self._top(entry, count))
            result.text_offset.append(position.offset)
            position.advance(token_id)
        return result

    def prompt(self, entries: Iterable[TokenLogprobs | None], count: int) -> PromptLogprobs:
        """vLLM's: each prompt token and the `count` likeliest in its place."""
        result: PromptLogprobs = []
        for entry in entries:
            if entry is None:
                result.append(None)
                continue
            ranked: dict[int, tuple[float, int | None]] = {
                token_id: (logprob, rank) for rank, (token_id, logprob) in enumerate(entry.top[:count], 1)}
            ranked.setdefault(entry.token_id, (entry.logprob, None))
            result.append({str(token_id): PromptLogprob(logprob=logprob, rank=rank,
                                                        decoded_token=self._texts.look_up(token_id).text)
                           for token_id, (logprob, rank) in ranked.items()})
        return result

    def chat(self, entries: Iterable[TokenLogprobs]) -> ChatLogprobs:
        return ChatLogprobs(content=[
            TokenLogprob(token=self._name(entry.token_id), logprob=entry.logprob, bytes=self._bytes(entry.token_id),
                         top_logprobs=[TopLogprob(token=self._name(token_id), logprob=logprob,
                                                  bytes=self._bytes(token_id)) for token_id, logprob in entry.top])
            for entry in entries
        ])

    def _top(self, entry: TokenLogprobs, count: int) -> dict[str, float]:
        """Best first; two tokens of one spelling keep the better value. The token itself is always there."""
        top: dict[str, float] = {}
        for token_id, logprob in (*entry.top[:count], (entry.token_id, entry.logprob)):
            top.setdefault(self._name(token_id), logprob)
        return top

    def _bytes(self, token_id: int) -> list[int]:
        return list(self._texts.look_up(token_id).raw)

    def _name(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self._as_ids else self._texts.look_up(token_id).name
