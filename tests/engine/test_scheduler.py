"""Random walks over the scheduler alone: no model, a made-up token for every sample."""

from __future__ import annotations

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fptq_runtime.engine.block_manager import BlockManager
from fptq_runtime.engine.request import SamplingParams
from fptq_runtime.engine.scheduler import Scheduler
from fptq_runtime.engine.sequence import Sequence

MAX_LEN = 96


def request(name: str, prompt: list[int], **params: object) -> Sequence:
    return Sequence(name, 0, prompt, SamplingParams(**params), seed=0, arrival_time=0.0)  # type: ignore[arg-type]


class SchedulerWalk(RuleBasedStateMachine):
    """Whatever comes, the books stay in order, budgets hold, slots hold the right tokens, and everyone finishes."""

    @initialize(
        spare_blocks=st.integers(0, 12),
        max_num_seqs=st.integers(1, 6),
        max_tokens=st.integers(1, 70),
        max_prompt_logits=st.integers(1, 9),
        caching=st.booleans(),
    )
    def start(self, spare_blocks: int, max_num_seqs: int, max_tokens: int, max_prompt_logits: int,
              caching: bool) -> None:
        blocks = BlockManager(MAX_LEN // 16 + spare_blocks, 16, caching)
        self.scheduler = Scheduler(blocks, max_num_seqs, max_tokens, max_prompt_logits)
        self.max_tokens, self.max_prompt_logits = max_tokens, max_prompt_logits
        self.memory: dict[int, tuple[int, ...]] = {}  # what each slot was written for: the text up to its token
        self.live: dict[str, Sequence] = {}
        self.count = 0

    @rule(
        shared=st.integers(0, 40),
        own=st.integers(1, 40),
        family=st.integers(0, 1),
        max_tokens=st.integers(0, 15),
        echo=st.booleans(),
    )
    def add(self, shared: int, own: int, family: int, max_tokens: int, echo: bool) -> None:
        prompt = ([family] * shared + [self.count + 2] * own)[: MAX_LEN - 15]
        self.count += 1
        new = request(str(self.count), prompt, max_tokens=max_tokens, prompt_logprobs=0 if echo else None)
        self.live[new.request_id] = new
        self.scheduler.add(new)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.scheduler.finish(self.live.pop(data.draw(st.sampled_from(sorted(self.live)))))

    @rule()
    def step(self) -> None:
        computed_before = {name: r.num_computed_tokens for name, r in self.live.items()}
        running = {r.request_id for r in self.scheduler.running}
        output = self.scheduler.schedule()
        self.scheduler.check_integrity()
        assert output.num_tokens <= self.max_tokens
        assert bool(output.scheduled) == bool(self.live)
        assert sum(i.num_logits for i in output.scheduled if i.sequence.needs_prompt_logits) <= self.max_prompt_logits
        scheduled = {i.sequence.request_id for i in output.scheduled}
        assert len(scheduled) == len(output.scheduled)
        preempted = {r.request_id for r in output.preempted}
        lacking_rows = {name for name in running if self.live[name].needs_prompt_logits}
        assert running - preempted - lacking_rows <= scheduled, "a running sequence was passed over"
        for item in output.scheduled:
            r = item.sequence
            assert item.start == r.num_computed_tokens
            if r.request_id in running:
                assert item.start == computed_before[r.request_id]
            for position in range(item.start, item.start + item.num_tokens):
                self.memory[self.slot(r, position)] = tuple(r.token_ids[: position + 1])
        for item in output.scheduled:
            r = item.sequence
            for position in range(item.start + item.num_tokens):
                assert self.memory[self.slot(r, position)] == tuple(r.token_ids[: position + 1]), "foreign content"
        sampled = [[hash(tuple(i.sequence.token_ids)) % 3] if i.samples else [] for i in output.scheduled]
        self.scheduler.update(output, sampled)
        for item in output.scheduled:
            r = item.sequence
            if r.num_output_tokens >= r.params.max_tokens and r.num_computed_tokens >= r.num_prompt_tokens:
                self.scheduler.finish(self.live.pop(r.request_id))

    @invariant()
    def books(self) -> None:
        if hasattr(self, "scheduler"):
            self.scheduler.check_integrity()

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        bound = 1 + sum(r.num_tokens + r.params.max_tokens for r in self.live.values()) * 20
        while self.live:
            self.step()
            bound -= 1
            assert bound, "the scheduler does not come to an end"
        assert self.scheduler.blocks.num_free_blocks == self.scheduler.blocks.num_blocks

    def slot(self, r: Sequence, position: int) -> int:
        return r.block_table[position // 16] * 16 + position % 16


SchedulerWalk.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
TestSchedulerWalk = SchedulerWalk.TestCase


def scheduler(num_blocks: int = 32, max_num_seqs: int = 8, max_tokens: int = 64, max_prompt_logits: int = 64,
              caching: bool = True) -> Scheduler:
    return Scheduler(BlockManager(num_blocks, 16, caching), max_num_seqs, max_tokens, max_prompt_logits)


def chunks(s: Scheduler) -> dict[str, tuple[int, int, int]]:
    """One step. (start, tokens, logits rows) by request."""
    output = s.schedule()
    s.update(output, [[1] if item.samples else [] for item in output.scheduled])
    return {i.sequence.request_id: (i.start, i.num_tokens, i.num_logits) for i in output.scheduled}


def test_decoding_shares_the_budget_with_a_long_prompt() -> None:
    s = scheduler(max_tokens=20)
    s.add(request("a", [1] * 5))
    assert chunks(s) == {"a": (0, 5, 1)}
    s.add(request("b", [2] * 50))
    assert chunks(s) == {"a": (5, 1, 1), "b": (0, 19, 0)}
    assert chunks(s) == {"a": (6, 1, 1), "b": (19, 19, 0)}
    assert chunks(s) == {"a": (7, 1, 1), "b": (38, 12, 1)}
    assert chunks(s) == {"a": (8, 1, 1), "b": (50, 1, 1)}


def test_an_earlier_prompt_leaves_a_token_for_each_later_sequence() -> None:
    s = scheduler(max_tokens=10, max_prompt_logits=9)
    s.add(request("short echo", [1] * 3, prompt_logprobs=0))
    s.add(request("long echo", [2] * 30, prompt_logprobs=0))
    s.add(request("plain", [3]))
    assert chunks(s) == {"short echo": (0, 3, 3), "long echo": (0, 6, 6), "plain": (0, 1, 1)}
    assert chunks(s) == {"short echo": (3, 1, 1), "long echo": (6, 8, 8), "plain": (1, 1, 1)}


def test_the_last_prompt_token_is_computed_even_where_all_is_cached() -> None:
    s = scheduler()
    s.add(request("a", [1] * 32))
    chunks(s)
    s.add(request("b", [1] * 32))
    s.add(request("c", [1] * 33))
    s.add(request("echo", [1] * 33, prompt_logprobs=0))
    step = chunks(s)
    assert step["b"] == (16, 16, 1)
    assert step["c"] == (32, 1, 1)
    assert step["echo"][0] == 0


def test_the_last_one_in_gives_way_and_comes_back_first() -> None:
    s = scheduler(num_blocks=4, caching=False)
    first, second, third = (request(name, [1] * 17, max_tokens=40) for name in "abc")
    for r in (first, second, third):
        s.add(r)
    chunks(s)
    assert s.running == [first]  # 2 blocks each, and one in reserve for who runs already
    s.finish(first)
    s = scheduler(num_blocks=5, caching=False)
    first, second, third = (request(name, [1] * 15, max_tokens=60) for name in "abc")
    for r in (first, second, third):
        s.add(r)
    for _ in range(10):
        chunks(s)
    assert s.running == [first, second]  # all three grew into a second block, of which there were two
    for _ in range(16):
        output = s.schedule()
        s.update(output, [[1]] * len(output.scheduled))
        if output.preempted:
            break
    assert output.preempted == [second]
    assert list(s.waiting) == [second, third]
    kept = list(second.token_ids)
    s.finish(first)
    assert chunks(s)["b"] == (0, len(kept), 1)  # its prompt and what it had decoded
    assert list(second.token_ids) == [*kept, 1]


def test_siblings_wait_for_the_prompt_they_can_share() -> None:
    s = scheduler(max_tokens=40)
    for r in Sequence.expand("r", [1] * 49, SamplingParams(n=3)):
        s.add(r)
    steps = []
    for _ in range(3):
        output = s.schedule()
        s.update(output, [[1] if item.samples else [] for item in output.scheduled])
        steps.append([(item.sequence.index, item.start) for item in output.scheduled])
    assert steps == [[(0, 0)], [(0, 40)], [(0, 49), (1, 48), (2, 48)]]


def test_never_more_sequences_than_tokens_in_a_step() -> None:
    s = scheduler(max_num_seqs=8, max_tokens=3)
    for i in range(8):
        s.add(request(str(i), [1]))
    for _ in range(5):
        assert len(chunks(s)) == 3


@pytest.mark.parametrize("seed", range(3))
def test_same_arrivals_same_schedule(seed: int) -> None:
    def walk() -> list[dict[str, tuple[int, int, int]]]:
        generator, s = random.Random(seed), scheduler(num_blocks=10, max_tokens=24)
        for i in range(8):
            s.add(request(str(i), [generator.randrange(2)] * generator.randrange(1, 60)))
        return [chunks(s) for _ in range(30)]

    assert walk() == walk()
