"""A sequence of tokens on its way through the engine. No torch."""

from __future__ import annotations

import enum
import secrets
import time
from array import array
from collections import abc
from typing import TYPE_CHECKING

from fptq_runtime.engine.request import ANYONE, NO_ADAPTER, Adapter, Origin, SamplingParams

if TYPE_CHECKING:
    from fptq_runtime.engine.grammar import Matcher
    from fptq_runtime.engine.output import TextStream, TokenLogprobs
    from fptq_runtime.engine.pooling import Pooler
    from fptq_runtime.engine.sampler import Sampling


class SequenceStatus(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    """One sequence on its way through the engine (a request with n > 1 becomes n of these).

    Tokens are computed when their keys and values are in the cache: the scheduler moves num_computed_tokens towards
    num_tokens, and a token is sampled when they meet. The engine gives it how it is sampled, what may be (None:
    anything), what makes its text, and what pools its hidden states (None: its logits are wanted).
    """

    sampling: Sampling
    matcher: Matcher | None
    text: TextStream
    pooler: Pooler | None

    def __init__(self, request_id: str, index: int, prompt_token_ids: abc.Sequence[int], params: SamplingParams,
                 seed: int, arrival_time: float, origin: Origin = ANYONE, adapter: Adapter = NO_ADAPTER) -> None:
        self.request_id = request_id
        self.origin = origin
        self.adapter = adapter
        self.cost = 1.0  # of its tenant's share, in tokens
        self.turn = (origin.priority, 0.0)  # its place in the queue; the lowest goes first
        self.index = index
        self.params = params
        self.seed = seed
        self.token_ids = array("i", prompt_token_ids)  # the prompt, then what was sampled
        self.num_prompt_tokens = len(prompt_token_ids)
        self.num_computed_tokens = 0
        self.num_cached_tokens = 0  # prompt tokens found in the prefix cache when first scheduled
        self.num_restored_tokens: int | None = None  # of those, brought back from disk; None before that was tried
        self.num_accounted_tokens = 0  # found in the cache or computed at least once, as StepStats count them
        self.num_told_tokens = 0  # of the output, as reported; the last step may have drawn some beyond a stop string
        self.num_accepted_tokens = 0  # of its prediction: drafted, and right
        self.num_rejected_tokens = 0
        self.num_preemptions = 0
        self.block_table = array("i")  # copied into every step's input, hence not a list
        self.state_slot = -1  # while it runs: where recurrent layers keep its state
        self.state_stops: tuple[int, ...] = ()  # in tokens, ascending: a chunk ends there, and its state is kept
        self.block_hashes: list[bytes] = []  # of the full blocks hashed so far
        self.status = SequenceStatus.WAITING
        self.arrival_time = arrival_time
        self.scheduled_time: float | None = None
        self.first_token_time: float | None = None
        self.last_token_time: float | None = None
        self.prompt_logprobs: list[TokenLogprobs | None] = [None]  # so far; nothing precedes the first token
        self.failure: str | None = None  # why its grammar can be followed no further

    @classmethod
    def expand(cls, request_id: str, prompt_token_ids: abc.Sequence[int], params: SamplingParams,
               origin: Origin = ANYONE, adapter: Adapter = NO_ADAPTER) -> list[Sequence]:
        """The n sequences of one request. Sequence i is seeded with seed + i, as if it had been sent alone so."""
        seed = secrets.randbits(63) if params.seed is None else params.seed
        now = time.monotonic()
        return [cls(request_id, i, prompt_token_ids, params, seed + i, now, origin, adapter) for i in range(params.n)]

    @property
    def key(self) -> tuple[str, int]:
        return self.request_id, self.index

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def output_token_ids(self) -> array[int]:
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def needs_prompt_logits(self) -> bool:
        """Every prompt position's logits are wanted, and the prompt is not known to be through. They are reported
        once, by sequence 0."""
        return self.params.prompt_logprobs is not None and self.index == 0 and self.num_output_tokens == 0

    @property
    def needs_all_rows(self) -> bool:
        """Those of cached tokens are wanted too."""
        return self.needs_prompt_logits or self.params.pooling not in (None, "last")

    def unscored(self, start: int, num_tokens: int) -> range:
        """Of the tokens that a step computes, the positions whose rows of logits tell of a prompt token, the next one,
        that has no log-probability yet: after a preemption rows may come a second time."""
        if not self.needs_prompt_logits:
            return range(0)
        end = min(start + num_tokens, self.num_prompt_tokens - 1)
        return range(max(start, len(self.prompt_logprobs) - 1), end)
