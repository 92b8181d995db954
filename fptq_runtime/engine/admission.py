"""How long a new request would wait for its first token: what is ahead of it, at the pace that was measured."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Iterable
from itertools import accumulate
from typing import NamedTuple

MEMORY_SECONDS = 5.0  # of work, over which a step's cost is forgotten
MEMORY_ANSWERS = 100  # whose lengths are remembered
FIRST_GUESS = 256  # tokens of an answer, before any has ended


class Work(NamedTuple):
    """Of one sequence: prompt tokens to compute, tokens generated so far, and how many that may become."""

    prompt: int
    generated: int
    most: int


class Queued(NamedTuple):
    """Of sequences that wait, together: how many, their prompt tokens to compute, and the tokens expected of them."""

    sequences: float = 0
    prompt: float = 0
    output: float = 0

    def plus(self, other: Queued, times: float = 1) -> Queued:
        return Queued(*(mine + times * more for mine, more in zip(self, other, strict=True)))


class Slots:
    """Steps until each place of a batch is free, in order."""

    def __init__(self, steps: Iterable[float], count: int) -> None:
        """steps: of those that are taken."""
        self.count = count
        taken = sorted(steps)[-count:]
        free = [0.0] * (count - len(taken)) + taken
        self._totals = [0.0, *accumulate(free)]
        self._needs = [place * free[place] - self._totals[place] for place in range(count)]

    def level(self, steps: float) -> float:
        """When one is free, once so many steps more are shared among those that are free first."""
        filled = bisect_right(self._needs, max(0.0, steps))
        return (self._totals[filled] + steps) / filled


class Forecast:
    """A step costs some seconds, and more for each token: fitted to the steps of late. Answers end by themselves as
    they did of late; those that were cut by max_tokens would have gone on. In a step each of them gains as many tokens,
    with as many guesses, as they did of late."""

    def __init__(self, max_tokens: int) -> None:
        """max_tokens: of a step."""
        self._max_tokens = max_tokens
        self.budget = max_tokens  # of a step as they are of late
        # Of 1, x, y, x², xy: tokens and seconds of steps; of draws, and what they gained and guessed.
        self._sums = [0.0] * 8
        self._ended: deque[float] = deque(maxlen=MEMORY_ANSWERS)  # tokens; infinity where an answer was cut
        self._lengths: list[float] = []  # the same, in order
        self._totals = [0.0]  # of the lengths before each

    def observe_step(self, tokens: int, seconds: float, draws: int = 0, gained: int = 0, guessed: int = 0) -> None:
        """tokens: rows of the step. draws: sequences of which it drew a next token; gained: tokens that these got;
        guessed: rows that tried what follows them."""
        decay = math.exp(-seconds / MEMORY_SECONDS)
        seen = (1, tokens, seconds, tokens * tokens, tokens * seconds, draws, gained, guessed)
        self._sums = [old * decay + new for old, new in zip(self._sums, seen, strict=True)]

    def observe_answer(self, tokens: int, cut: bool) -> None:
        self._ended.append(math.inf if cut else tokens)
        lengths = sorted(self._ended)
        self._lengths, self._totals = lengths, [0.0, *accumulate(length for length in lengths if length < math.inf)]

    def output(self, work: Work) -> float:
        """Tokens that are expected still."""
        lengths, totals = self._lengths, self._totals
        longer = len(lengths) - (first := bisect_right(lengths, work.generated))
        if longer == 0:
            return min(FIRST_GUESS, work.most - work.generated) if not lengths else work.most - work.generated
        end = bisect_left(lengths, work.most)
        ended = totals[end] - totals[first] if end > first else 0.0
        return (ended + (len(lengths) - max(end, first)) * work.most) / longer - work.generated

    def slots(self, running: Iterable[Work], count: int) -> Slots:
        """The places of a batch, as far as running sequences hold them."""
        return Slots((self._steps(work.prompt) + max(self.output(work) / self._pace, 1.0) - 1 for work in running),
                     count)

    def wait(self, slots: Slots, ahead: Queued, prompt: int) -> tuple[float, float]:
        """Seconds until a prompt of so many tokens begins, behind others in the queue, and those that it then takes to
        its first token. Takes no longer the more there are."""
        held = max(ahead.output / self._pace, ahead.sequences) + max(0.0, ahead.prompt / self.budget - ahead.sequences)
        steps = max(slots.level(held), ahead.prompt / max(1, self.budget - slots.count))
        each_step, each_token = self._cost()
        tokens = ahead.prompt + steps * min(slots.count * self._rows, self._max_tokens)
        return steps * each_step + tokens * each_token, self._steps(prompt) * each_step + prompt * each_token

    def tokens_within(self, seconds: float) -> int:
        """Of a step that takes so long, as far as is known."""
        each_step, each_token = self._cost()
        if not each_token:
            return self._max_tokens
        return min(self._max_tokens, max(0, int((seconds - each_step) / each_token)))

    @property
    def _pace(self) -> float:
        """Tokens that a sequence gains in a step."""
        draws, gained = self._sums[5:7]
        return max(1.0, gained / draws) if draws else 1.0

    @property
    def _rows(self) -> float:
        """Of a sequence in a step: its last token, and guesses."""
        draws, _, guessed = self._sums[5:]
        return 1 + (guessed / draws if draws else 0.0)

    def _steps(self, prompt: int) -> int:
        return -(-prompt // self.budget)

    def _cost(self) -> tuple[float, float]:
        """Seconds of a step, and of each of its tokens."""
        n, x, y, xx, xy = self._sums[:5]
        if n == 0:
            return 0.0, 0.0
        spread = n * xx - x * x
        slope = max(0.0, (n * xy - x * y) / spread) if spread > 1e-6 * n * xx else 0.0
        base = (y - slope * x) / n
        return (base, slope) if base >= 0 else (0.0, y / x)
