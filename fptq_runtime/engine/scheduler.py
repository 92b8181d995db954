"""What the next step computes. Plain data in and out, no torch.

Every sequence chases num_tokens with num_computed_tokens under one token budget; a prompt's chunk and a decoded token
differ only in how far behind they are.
"""

from __future__ import annotations

from collections import abc, deque
from dataclasses import dataclass, field, replace
from itertools import islice

from fptq_runtime.engine.admission import Forecast
from fptq_runtime.engine.block_manager import BlockManager
from fptq_runtime.engine.sequence import Sequence, SequenceStatus
from fptq_runtime.engine.speculation import NO_DRAFT, Draft

LEAST_PROMPT = 16  # tokens of prompts in a step, however small its budget


@dataclass(frozen=True)
class ScheduledSequence:
    """Compute tokens start to start + num_tokens of a sequence, then those of its draft; the last num_logits of these
    rows need logits, or are pooled, and where `samples`, the row before the draft yields the sequence's next token, and
    each row of the draft the one after, if the draft is right so far."""

    sequence: Sequence
    start: int
    num_tokens: int
    num_logits: int
    samples: bool
    draft: Draft = NO_DRAFT

    @property
    def num_rows(self) -> int:
        return self.num_tokens + len(self.draft.token_ids)

    @property
    def pooled(self) -> bool:
        return self.sequence.params.pooling is not None


@dataclass
class SchedulerOutput:
    """One step: the sequences to compute, in batch order, and what happened on the way to it."""

    scheduled: list[ScheduledSequence] = field(default_factory=list)
    admitted: list[Sequence] = field(default_factory=list)  # for the first time; those resumed are not among them
    preempted: list[Sequence] = field(default_factory=list)
    state_copies: list[tuple[int, int]] = field(default_factory=list)  # from slot to slot, before all else, in order

    @property
    def num_tokens(self) -> int:
        return sum(item.num_rows for item in self.scheduled)


class Scheduler:
    """First come, first served, within a priority and a tenant. Tenants take turns by what they ask for (start-time
    fair queueing): a sequence's turn begins where its tenant's last one ends, or now where that has had its turn.
    `waiting` is in the order of turns, except that a preempted sequence goes to the head of the queue.

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
        self._budget = max_num_batched_tokens  # of the step that was planned last
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.lacks_blocks = False  # or more would have run in the last step
        self._state_slots = list(range(self.max_num_seqs - 1, -1, -1))  # that no running sequence has; a stack
        self._now = 0.0  # the turn that was admitted last
        self._ends: dict[str, float] = {}  # of the last turn of each tenant, where that is to come

    def add(self, sequence: Sequence) -> None:
        tenant = sequence.origin.tenant
        begin = max(self._now, self._ends.get(tenant, 0.0))
        self._ends[tenant] = begin + sequence.cost
        sequence.turn = (sequence.origin.priority, begin)
        place = len(self.waiting)
        while place and self.waiting[place - 1].turn > sequence.turn and not self.waiting[place - 1].num_preemptions:
            place -= 1
        self.waiting.insert(place, sequence)

    def share_before(self, tenant: str, other: str) -> float:
        """Of what another tenant has waiting, the part whose turn is before that of what a tenant sends now."""
        begins, ends = (max(self._now, self._ends.get(name, 0.0)) for name in (tenant, other))
        return min(1.0, (begins - self._now) / (ends - self._now)) if ends > self._now else 0.0

    def finish(self, sequence: Sequence) -> None:
        """Take a sequence out, whatever its state, and free its blocks."""
        if sequence.status is SequenceStatus.RUNNING:
            self.running.remove(sequence)
            self._state_slots.append(sequence.state_slot)
        elif sequence.status is SequenceStatus.WAITING:
            self.waiting.remove(sequence)
        self.blocks.free(sequence)
        sequence.status = SequenceStatus.FINISHED

    def budget(self, forecast: Forecast, itl_target: float | None) -> int | None:
        """Tokens of the next step, where somebody waits for the next of an answer and is to have it in itl_target
        seconds."""
        if itl_target is None:
            return None
        tokens = forecast.tokens_within(itl_target)
        forecast.budget = max(tokens, len(self.running) + LEAST_PROMPT)
        return tokens if any(sequence.num_output_tokens for sequence in self.running) else None

    def schedule(self, budget: int | None = None) -> SchedulerOutput:
        """budget: tokens, where fewer than max_num_batched_tokens; some of a prompt there always are."""
        output = SchedulerOutput()
        self.lacks_blocks = False
        self._budget = self.max_num_batched_tokens if budget is None else \
            min(self.max_num_batched_tokens, max(budget, len(self.running) + LEAST_PROMPT))
        tokens, prompt_logits = self._budget, self.max_prompt_logits
        position = 0
        while position < len(self.running):
            sequence = self.running[position]
            behind = len(self.running) - position - 1  # each of those keeps a token of the budget
            item = _chunk(sequence, tokens - behind, prompt_logits)
            while item and not self.blocks.allocate(sequence, item.start + item.num_tokens):
                victim = self.running[-1]
                self.preempt(victim)
                self.lacks_blocks = True
                output.preempted.append(victim)
                if victim is sequence:
                    item = None
            if item:
                output.scheduled.append(item)
                tokens -= item.num_tokens
                prompt_logits -= item.num_logits if sequence.needs_prompt_logits else 0
            position += 1
        while self.waiting and not output.preempted and tokens > 0 and len(self.running) < self.max_num_seqs:
            item = self._admit(self.waiting[0], tokens, prompt_logits)
            if item is None:
                break
            sequence = self.waiting.popleft()
            self.running.append(sequence)
            output.scheduled.append(item)
            if sequence.num_preemptions == 0:
                output.admitted.append(sequence)
                self._now = max(self._now, sequence.turn[1])
                self._ends = {tenant: end for tenant, end in self._ends.items() if end > self._now}
            tokens -= item.num_tokens
            prompt_logits -= item.num_logits if sequence.needs_prompt_logits else 0
        if output.scheduled and self.blocks.states is not None:
            output.state_copies, self.blocks.states.copies = self.blocks.states.copies, []
        return output

    def restore(self) -> None:
        """Have read what the store has of those prompts that may be admitted next, as many as the cache has room for:
        of more, one would be evicted for another."""
        blocks = self.blocks
        blocks.end_loads()
        if not blocks.can_restore or not self.waiting or len(self.running) >= self.max_num_seqs:
            return
        room = blocks.num_free_blocks + blocks.num_loading_blocks - self._promised()
        for sequence in list(islice(self.waiting, self.max_num_seqs - len(self.running))):
            prefix = blocks.find_prefix(sequence)
            evictable = blocks.num_free_blocks - blocks.free_blocks_after(prefix)
            room -= blocks.blocks_for(sequence.num_tokens) - len(prefix) + evictable
            if room < 0:
                break
            room -= 1
            if sequence.num_restored_tokens is None and not sequence.needs_all_rows \
                    and not blocks.is_restoring(sequence):
                blocks.restore(sequence)

    def room_for_drafts(self, output: SchedulerOutput) -> int:
        """Rows that the step may have beside those that were scheduled."""
        rows = sum(item.num_logits for item in output.scheduled if not item.pooled)
        return min(self._budget - output.num_tokens, self.max_num_seqs + self.max_prompt_logits - rows)

    def reserve(self, item: ScheduledSequence, count: int) -> int:
        """Blocks for so many tokens after an item's, or for as many as find a place, which it returns: not one is taken
        that a running sequence will need for its next token."""
        sequence, end = item.sequence, item.start + item.num_tokens
        if self.blocks.blocks_for(end + count) - len(sequence.block_table) > \
                self.blocks.num_free_blocks - len(self.running) or not self.blocks.allocate(sequence, end + count):
            return min(count, len(sequence.block_table) * self.blocks.block_size - end)
        return count

    def extend(self, output: SchedulerOutput, drafts: abc.Sequence[Draft]) -> None:
        """Give output.scheduled[i] drafts[i], or as much of it as finds a place."""
        for i, draft in enumerate(drafts):
            if not draft.token_ids:
                continue
            item = output.scheduled[i]
            if fits := self.reserve(item, len(draft.token_ids)):
                output.scheduled[i] = replace(item, num_logits=item.num_logits + fits,
                                              draft=replace(draft, token_ids=draft.token_ids[:fits]))

    def update(self, output: SchedulerOutput, sampled: abc.Sequence[abc.Sequence[int]]) -> None:
        """The step was computed and drew the tokens sampled[i] for output.scheduled[i]: none, or those of its draft
        that are right and one more, or fewer where the sequence ends with them. Sequences that were finished meanwhile
        are passed over."""
        for item, token_ids in zip(output.scheduled, sampled, strict=True):
            sequence = item.sequence
            if sequence.status is SequenceStatus.FINISHED:
                continue
            sequence.token_ids.extend(token_ids)
            sequence.num_computed_tokens = item.start + item.num_tokens + max(0, len(token_ids) - 1)
            self.blocks.publish(sequence, item.start)
            if sequence.num_computed_tokens in sequence.state_stops:
                self.blocks.keep_state(sequence)

    def check_integrity(self) -> None:
        """Raise AssertionError where an invariant is broken. For tests."""
        assert len(self.running) <= self.max_num_seqs
        assert all(sequence.status is SequenceStatus.RUNNING for sequence in self.running)
        for sequence in self.waiting:
            assert sequence.status is SequenceStatus.WAITING
            assert not sequence.block_table
            assert sequence.num_computed_tokens == 0
        sequences = [*self.running, *self.waiting]
        assert len({sequence.key for sequence in sequences}) == len(sequences), "a sequence is queued twice"
        slots = [*self._state_slots, *(sequence.state_slot for sequence in self.running)]
        assert sorted(slots) == list(range(self.max_num_seqs)), "a state's slot is lost, or has two owners"
        for sequence in self.running:
            assert 0 <= sequence.num_computed_tokens <= sequence.num_tokens
            assert len(sequence.block_table) >= self.blocks.blocks_for(sequence.num_computed_tokens)
        self.blocks.check_integrity(self.running)

    def _admit(self, sequence: Sequence, tokens: int, prompt_logits: int) -> ScheduledSequence | None:
        """Give a waiting sequence its first blocks, where the cache has room for all of its tokens and for what every
        running sequence still lacks and one more block: admitted with less it would soon be preempted."""
        if self._sibling_is_behind(sequence) or self.blocks.is_restoring(sequence):
            return None
        prefix = [] if sequence.needs_all_rows else self.blocks.find_prefix(sequence)
        missing = self.blocks.blocks_for(sequence.num_tokens) - len(prefix)
        if missing + self._promised() > self.blocks.free_blocks_after(prefix):
            self.lacks_blocks = True
            return None
        sequence.num_computed_tokens = len(prefix) * self.blocks.block_size
        sequence.state_stops = self.blocks.state_stops(sequence, sequence.num_computed_tokens)
        item = _chunk(sequence, tokens, prompt_logits)
        if item is None:
            sequence.num_computed_tokens = 0
            return None
        if sequence.num_preemptions == 0:
            sequence.num_cached_tokens = sequence.num_computed_tokens
        self.blocks.share(sequence, prefix)
        sequence.status = SequenceStatus.RUNNING
        sequence.state_slot = self._state_slots.pop()
        self.blocks.restore_state(sequence)
        self.blocks.allocate(sequence, item.start + item.num_tokens)
        return item

    def _promised(self) -> int:
        """Blocks that running sequences still lack, and one more of each."""
        return sum(max(0, self.blocks.blocks_for(r.num_tokens) - len(r.block_table)) + 1 for r in self.running)

    def _sibling_is_behind(self, sequence: Sequence) -> bool:
        """Another of the same request is computing the very prompt that this one could share."""
        if not self.blocks.enable_prefix_caching or sequence.params.n == 1:
            return False
        shareable = (sequence.num_prompt_tokens - 1) // self.blocks.block_size * self.blocks.block_size
        return any(r.request_id == sequence.request_id and r.num_computed_tokens < shareable
                   and (self.blocks.states is None or shareable in r.state_stops) for r in self.running)

    def preempt(self, sequence: Sequence) -> None:
        """Take out what runs. Its tokens stay; their keys, values and states are computed again."""
        self.running.remove(sequence)
        self._state_slots.append(sequence.state_slot)
        self.blocks.free(sequence)
        sequence.num_computed_tokens = 0
        sequence.num_preemptions += 1
        sequence.status = SequenceStatus.WAITING
        self.waiting.appendleft(sequence)


def _chunk(sequence: Sequence, max_tokens: int, max_prompt_logits: int) -> ScheduledSequence | None:
    """The next tokens of a sequence, or None where a budget allows none."""
    start = sequence.num_computed_tokens
    stop = next((stop for stop in sequence.state_stops if stop > start), sequence.num_tokens)
    num_tokens = min(stop - start, max_tokens)
    if sequence.needs_prompt_logits:
        num_tokens = min(num_tokens, max_prompt_logits)
    if num_tokens < 1:
        return None
    through = start + num_tokens == sequence.num_tokens
    samples = through and sequence.params.max_tokens > 0
    pools = through and sequence.params.pooling is not None
    num_logits = num_tokens if sequence.needs_all_rows else int(samples or pools)
    return ScheduledSequence(sequence, start, num_tokens, num_logits, samples)
