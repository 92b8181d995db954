"""What the next step computes. Plain data in and out, no torch.

Every sequence chases num_tokens with num_computed_tokens under one token budget; a prompt's chunk and a decoded token
differ only in how far behind they are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from fptq_runtime.engine.block_manager import BlockManager
from fptq_runtime.engine.request import Request, RequestStatus


@dataclass(frozen=True)
class ScheduledRequest:
    """Compute tokens start to start + num_tokens of a sequence; the last num_logits of these rows need logits, and
    where `samples`, the very last row yields the sequence's next token."""

    request: Request
    start: int
    num_tokens: int
    num_logits: int
    samples: bool


@dataclass
class SchedulerOutput:
    """One step: the sequences to compute, in batch order, and what happened on the way to it."""

    scheduled: list[ScheduledRequest] = field(default_factory=list)
    admitted: list[Request] = field(default_factory=list)  # for the first time; those resumed are not among them
    preempted: list[Request] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(item.num_tokens for item in self.scheduled)


class Scheduler:
    """First come, first served. `waiting` and `running` are in order of arrival, except that a preempted sequence
    goes to the head of the queue.

    max_prompt_logits: rows of prompt logits in one step, besides one row for each sequence.
    The cache must hold at least one sequence of the greatest length, or the oldest sequence could not finish.
    """

    def __init__(self, blocks: BlockManager, max_num_seqs: int, max_num_batched_tokens: int,
                 max_prompt_logits: int) -> None:
        self.blocks = blocks
        # Never more sequences than tokens in a step, so that each of them advances in every step.
        self.max_num_seqs = min(max_num_seqs, max_num_batched_tokens)
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_prompt_logits = max_prompt_logits
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    def finish(self, request: Request) -> None:
        """Take a sequence out, whatever its state, and free its blocks."""
        if request.status is RequestStatus.RUNNING:
            self.running.remove(request)
        elif request.status is RequestStatus.WAITING:
            self.waiting.remove(request)
        self.blocks.free(request)
        request.status = RequestStatus.FINISHED

    def schedule(self) -> SchedulerOutput:
        output = SchedulerOutput()
        tokens, prompt_logits = self.max_num_batched_tokens, self.max_prompt_logits
        position = 0
        while position < len(self.running):
            request = self.running[position]
            behind = len(self.running) - position - 1  # each of those keeps a token of the budget
            item = _chunk(request, tokens - behind, prompt_logits)
            while item and not self.blocks.allocate(request, item.start + item.num_tokens):
                victim = self.running.pop()
                self._preempt(victim)
                output.preempted.append(victim)
                if victim is request:
                    item = None
            if item:
                output.scheduled.append(item)
                tokens -= item.num_tokens
                prompt_logits -= item.num_logits if request.needs_prompt_logits else 0
            position += 1
        while self.waiting and not output.preempted and tokens > 0 and len(self.running) < self.max_num_seqs:
            item = self._admit(self.waiting[0], tokens, prompt_logits)
            if item is None:
                break
            request = self.waiting.popleft()
            self.running.append(request)
            output.scheduled.append(item)
            if request.num_preemptions == 0:
                output.admitted.append(request)
            tokens -= item.num_tokens
            prompt_logits -= item.num_logits if request.needs_prompt_logits else 0
        return output

    def update(self, output: SchedulerOutput, sampled: Sequence[int | None]) -> None:
        """The step was computed and drew sampled[i] for output.scheduled[i], or None. Sequences that were finished
        meanwhile are passed over."""
        for item, token_id in zip(output.scheduled, sampled, strict=True):
            request = item.request
            if request.status is RequestStatus.FINISHED:
                continue
            request.num_computed_tokens = item.start + item.num_tokens
            self.blocks.publish(request, item.start)
            if token_id is not None:
                request.token_ids.append(token_id)

    def check_integrity(self) -> None:
        """Raise AssertionError where an invariant is broken. For tests."""
        assert len(self.running) <= self.max_num_seqs
        assert all(request.status is RequestStatus.RUNNING for request in self.running)
        for request in self.waiting:
            assert request.status is RequestStatus.WAITING
            assert not request.block_table
            assert request.num_computed_tokens == 0
        requests = [*self.running, *self.waiting]
        assert len({request.key for request in requests}) == len(requests), "a sequence is queued twice"
        for request in self.running:
            assert 0 <= request.num_computed_tokens <= request.num_tokens
            assert len(request.block_table) >= self.blocks.blocks_for(request.num_computed_tokens)
        self.blocks.check_integrity(self.running)

    def _admit(self, request: Request, tokens: int, prompt_logits: int) -> ScheduledRequest | None:
        """Give a waiting sequence its first blocks, where the cache has room for all of its tokens and for what every
        running sequence still lacks and one more block: admitted with less it would soon be preempted."""
        if self._sibling_is_behind(request):
            return None
        prefix = [] if request.needs_prompt_logits else self.blocks.find_prefix(request)
        missing = self.blocks.blocks_for(request.num_tokens) - len(prefix)
        promised = sum(max(0, self.blocks.blocks_for(r.num_tokens) - len(r.block_table)) + 1 for r in self.running)
        if missing + promised > self.blocks.free_blocks_after(prefix):
            return None
        request.num_computed_tokens = len(prefix) * self.blocks.block_size
        item = _chunk(request, tokens, prompt_logits)
        if item is None:
            request.num_computed_tokens = 0
            return None
        if request.num_preemptions == 0:
            request.num_cached_tokens = request.num_computed_tokens
        self.blocks.share(request, prefix)
        self.blocks.allocate(request, item.start + item.num_tokens)
        request.status = RequestStatus.RUNNING
        return item

    def _sibling_is_behind(self, request: Request) -> bool:
        """Another sequence of the same request is computing the very prompt that this one could share."""
        if not self.blocks.enable_prefix_caching or request.params.n == 1:
            return False
        shareable = (request.num_prompt_tokens - 1) // self.blocks.block_size * self.blocks.block_size
        return any(r.request_id == request.request_id and r.num_computed_tokens < shareable for r in self.running)

    def _preempt(self, request: Request) -> None:
        """Its tokens stay; their keys and values are computed again."""
        self.blocks.free(request)
        request.num_computed_tokens = 0
        request.num_preemptions += 1
        request.status = RequestStatus.WAITING
        self.waiting.appendleft(request)


def _chunk(request: Request, max_tokens: int, max_prompt_logits: int) -> ScheduledRequest | None:
    """The next tokens of a sequence, or None where a budget allows none."""
    start = request.num_computed_tokens
    num_tokens = min(request.num_tokens - start, max_tokens)
    if request.needs_prompt_logits:
        num_tokens = min(num_tokens, max_prompt_logits)
    if num_tokens < 1:
        return None
    samples = start + num_tokens == request.num_tokens and request.params.max_tokens > 0
    num_logits = num_tokens if request.needs_prompt_logits else int(samples)
    return ScheduledRequest(request, start, num_tokens, num_logits, samples)
