"""What a request's sender asks for, and how it ends. No torch."""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import SupportsIndex

from fptq_runtime.config import Pooling
from fptq_runtime.engine.grammar import Grammar
from fptq_runtime.errors import FptqError

MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_N = 64


class FinishReason(str, enum.Enum):
    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True)
class Origin:
    """Who sends a request, and how soon it must begin. tenants share what there is, and no cached prompt; of one
    priority the lower number goes first; a request that would wait longer than max_wait seconds for its first token is
    refused."""

    tenant: str = ""
    priority: int = 0
    max_wait: float = math.inf


ANYONE = Origin()


@dataclass(eq=False)
class Adapter:
    """slot: 0 adds nothing. digest: what keys and values that it had a part in are known by. users: sequences that have
    not ended; with the last of them a dropped one leaves its slot."""

    name: str
    slot: int
    digest: bytes
    path: Path
    users: int = 0
    dropped: bool = False


NO_ADAPTER = Adapter("", 0, b"", Path())


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn; OpenAI's and vLLM's names and meanings.

    temperature 0 is greedy. top_k 0 and top_p 1 are off. Penalties: repetition multiplies (prompt and output),
    presence and frequency subtract (output only). seed None draws one for the request. logprobs: how many top
    alternatives to return beside the chosen token's own; prompt_logprobs the same for every prompt token.
    stop strings are cut from the text. min_tokens: until so many are out, neither an end-of-sequence or stop id is
    drawn nor a stop string looked for. shown_special_tokens: ids of special tokens that the text has, though
    skip_special_tokens leaves the others out. Raises FptqError that names the parameter.

    structured: what the answer must be, such as Grammar.json_schema({"type": "object", …}) or Grammar.lark('start: …').
    It ends only where the grammar does, or early by max_tokens or a stop string; min_tokens forbids an end only where
    the answer can go on. Log-probabilities are those among the allowed tokens.

    prediction: tokens that the answer may resemble. It changes nothing but the time that is taken.

    pooling: no token is drawn (max_tokens 0); the answer is one vector made of the prompt's hidden states behind the
    last norm, its last token's or a mean.
    """

    n: int = 1
    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    shown_special_tokens: frozenset[int] = frozenset()
    structured: Grammar | None = None
    prediction: tuple[int, ...] = ()
    pooling: Pooling | None = None

    def __post_init__(self) -> None:
        def check(name: str, ok: bool, allowed: str) -> None:
            if not ok:
                raise FptqError(f"{name} must be {allowed}, not {getattr(self, name)!r}", name)

        for name in ("n", "max_tokens", "min_tokens", "top_k"):
            check(name, isinstance(getattr(self, name), SupportsIndex), "an integer")
        for name in ("seed", "logprobs", "prompt_logprobs"):
            check(name, isinstance(getattr(self, name), (SupportsIndex, NoneType)), "an integer or None")
        check("n", 1 <= self.n <= MAX_N, f"between 1 and {MAX_N}")
        check("max_tokens", self.max_tokens >= 0, "at least 0")
        check("min_tokens", 0 <= self.min_tokens <= self.max_tokens, "between 0 and max_tokens")
        check("temperature", 0 <= self.temperature <= 100, "between 0 and 100")
        check("top_p", 0 < self.top_p <= 1, "in (0, 1]")
        check("top_k", self.top_k >= 0, "0 (off) or more")
        check("min_p", 0 <= self.min_p <= 1, "in [0, 1]")
        check("repetition_penalty", 0.01 <= self.repetition_penalty <= 100, "between 0.01 and 100")
        check("presence_penalty", -2 <= self.presence_penalty <= 2, "between -2 and 2")
        check("frequency_penalty", -2 <= self.frequency_penalty <= 2, "between -2 and 2")
        check("logit_bias", all(k >= 0 and math.isfinite(v) and abs(v) <= 100 for k, v in self.logit_bias.items()),
              "token ids to values between -100 and 100")
        check("seed", self.seed is None or -(1 << 63) <= self.seed < 1 << 64, "a 64-bit integer")
        check("stop", not isinstance(self.stop, str), "a sequence of strings")
        if len(self.stop) > MAX_STOP_STRINGS:
            raise FptqError(f"stop has {len(self.stop)} strings; at most {MAX_STOP_STRINGS} are taken", "stop")
        if not all(self.stop):
            raise FptqError("stop has an empty string, which every text begins with", "stop")
        check("ignore_eos", not self.ignore_eos or self.structured is None, "false where the answer is structured")
        if self.pooling is not None:
            check("max_tokens", self.max_tokens == 0, "0 where hidden states are pooled")
            check("n", self.n == 1, "1 where hidden states are pooled")
            check("prompt_logprobs", self.prompt_logprobs is None, "None where hidden states are pooled")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            check(name, value is None or 0 <= value <= MAX_LOGPROBS, f"between 0 and {MAX_LOGPROBS}")
