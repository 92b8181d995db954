"""What the engine says of a request, one event a token and sequence, and how a sequence's text becomes certain."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from fptq_runtime.engine.request import FinishReason
from fptq_runtime.kernels.base import Float32Array


@dataclass(frozen=True)
class TokenLogprobs:
    """One position: the token that stands there, its natural log-probability under the model (before temperature
    and penalties, as in vLLM; of a structured answer, among the tokens that its grammar allows), and the `logprobs`
    most likely tokens, fewer where fewer are allowed, best first, the lower id first on ties."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class RequestOutput:
    """What one sequence gained: one token, or none. A step may have several of them.

    token_ids holds the new token, or none (max_tokens 0, or a finish by abort or error). text is what became certain
    with it: characters that a stop string or a split UTF-8 sequence may still claim are held back. prompt_logprobs
    comes once, with the first event of sequence 0; its first entry is None, since nothing precedes the first token.
    num_restored_tokens: of those cached, how many came from disk.
    num_accepted_tokens, num_rejected_tokens: of the request's prediction, tried so far, rightly and in vain.
    stop_reason: the stop string or stop id that ended it; None for the model's own end of sequence. failure: why it
    ended with an error, where that is the request's fault. embedding: the pooled hidden states [H], with the last event
    of a request that asks for them. scheduled_time: time.monotonic() when it left the queue.
    """

    request_id: str
    index: int
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprobs, ...]
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_restored_tokens: int = 0
    num_output_tokens: int = 0
    num_accepted_tokens: int = 0
    num_rejected_tokens: int = 0
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    failure: str | None = None
    embedding: Float32Array | None = field(default=None, compare=False)
    scheduled_time: float | None = field(default=None, compare=False)


class TokenTexts(Protocol):
    """The text of a sequence's tokens, one after the other."""

    def step(self, token_id: int) -> str | None:
        """What is certain with this token; None where it needs the next one."""
        ...


class Detokenizer(Protocol):
    """What the engine asks of a tokenizer."""

    def stream(self, skip_special_tokens: bool = True, prompt_token_ids: Sequence[int] = (),
               shown: Collection[int] = ()) -> TokenTexts:
        """The text of what follows the prompt. shown: special tokens that are not skipped."""
        ...

    def to_json(self) -> str:
        """tokenizer.json, as it is used."""
        ...


class TextStream:
    """A sequence's text, token by token, cut before the first stop string that completes.

    Characters that may be the beginning of a stop string are held back until the next token decides.
    """

    def __init__(self, stream: TokenTexts, stop: Sequence[str]) -> None:
        self._stream = stream
        self._stop = stop
        self._held = ""

    def step(self, token_id: int, stoppable: bool) -> tuple[str, str | None]:
        """The text that became certain, and the stop string that ended it. Not `stoppable`: let stop strings pass."""
        self._held += self._stream.step(token_id) or ""
        if not self._stop or not stoppable:
            return self.flush(), None
        matches = [(self._held.find(stop), stop) for stop in self._stop if stop in self._held]
        if matches:
            start, stop = min(matches, key=lambda match: match[0])
            text, self._held = self._held[:start], ""
            return text, stop
        keep = max(_overlap(self._held, stop) for stop in self._stop)
        certain = len(self._held) - keep
        text, self._held = self._held[:certain], self._held[certain:]
        return text, None

    def flush(self) -> str:
        """What is held back, once nothing more can follow."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of text that a stop string begins with."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
