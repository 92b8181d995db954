"""Log-probabilities in the shapes that OpenAI has for them."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

from fptq_runtime.engine.output import TokenLogprobs
from fptq_runtime.models.tokenizer import Tokenizer
from server.protocol import ChatLogprobs, CompletionLogprobs, TokenLogprob, TopLogprob

REPLACEMENT = "\ufffd"  # what decoding makes of bytes that are no whole character


class TokenText(NamedTuple):
    """One token on its own. partial: it is a part of a character, and text is the vocabulary's spelling of it."""

    text: str
    partial: bool
    special: bool


class TokenTexts:
    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.look_up = lru_cache(maxsize=1 << 18)(self._look_up)

    def _look_up(self, token_id: int) -> TokenText:
        """The text is as it reads in the middle of a text: decoders strip the space before a first token, so the token
        is decoded after itself."""
        once = self._tokenizer.decode([token_id], skip_special_tokens=False)
        text = self._tokenizer.decode([token_id, token_id], skip_special_tokens=False)[len(once):]
        partial = REPLACEMENT in text
        special = bool(once) and not self._tokenizer.decode([token_id], skip_special_tokens=True)
        return TokenText(self._tokenizer.token(token_id) if partial else text, partial, special)


class LogprobsRenderer:
    """as_ids: tokens are named `token_id:N`, which no two tokens share. skip_special: the completion's text leaves
    special tokens out, so they take no room in text_offset."""

    def __init__(self, texts: TokenTexts, as_ids: bool, skip_special: bool) -> None:
        self._texts = texts
        self._as_ids = as_ids
        self._skip_special = skip_special

    def completion(self, entries: Iterable[tuple[int, TokenLogprobs | None]], offset: int
                   ) -> tuple[CompletionLogprobs, int]:
        """entries: token id and what is known of it. offset: characters of text before the first entry. Returns the
        offset after the last one too."""
        result = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        for token_id, entry in entries:
            result.tokens.append(self._name(token_id))
            result.token_logprobs.append(None if entry is None else entry.logprob)
            result.top_logprobs.append(None if entry is None else self._top(entry))
            result.text_offset.append(offset)
            token = self._texts.look_up(token_id)
            offset += 0 if token.special and self._skip_special else len(token.text)
        return result, offset

    def chat(self, entries: Iterable[TokenLogprobs]) -> ChatLogprobs:
        return ChatLogprobs(content=[
            TokenLogprob(token=self._name(entry.token_id), logprob=entry.logprob, bytes=self._bytes(entry.token_id),
                         top_logprobs=[TopLogprob(token=self._name(token_id), logprob=logprob,
                                                  bytes=self._bytes(token_id)) for token_id, logprob in entry.top])
            for entry in entries
        ])

    def _top(self, entry: TokenLogprobs) -> dict[str, float]:
        """Best first; two tokens of one spelling keep the better value. The token itself is always there."""
        top: dict[str, float] = {}
        for token_id, logprob in (*entry.top, (entry.token_id, entry.logprob)):
            top.setdefault(self._name(token_id), logprob)
        return top

    def _bytes(self, token_id: int) -> list[int] | None:
        token = self._texts.look_up(token_id)
        return None if token.partial else list(token.text.encode())

    def _name(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self._as_ids else self._texts.look_up(token_id).text
