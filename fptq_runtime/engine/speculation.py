"""Guesses of the tokens to come, which one step checks together: where they are from, and how many are worth it.

A guess changes no answer: what a step draws does not depend on its other rows, and a drafted token is kept only where
it is the one that is drawn. No torch.
"""

from __future__ import annotations

import sys
from array import array
from bisect import bisect_left, bisect_right
from collections import OrderedDict, abc
from dataclasses import dataclass, field
from itertools import takewhile

from fptq_runtime.engine.sequence import Sequence

# Where a guess is from: the sequence's own prompt and output, other answers to the same tenant, the request's
# prediction, its grammar, which leaves no other text, or a draft model.
KINDS = ("lookup", "history", "prediction", "forced", "draft")
MAX_DRAFT = 32  # tokens of a sequence and step
LEAST_CHANCE = 0.05  # of being right; a token with less is not drafted
LEAST_GAIN = 1.05  # in tokens per second, of a step with drafts over one without
LONGEST_MATCH = 16  # tokens; a longer one says no more
CANDIDATES = 16  # places of one pair of tokens that are compared
HISTORY_TOKENS = 16_384  # of a tenant's answers
HISTORY_PROMPT = 8  # tokens of its prompt before each answer
HISTORIES = 32  # tenants
FIRST_CHANCES = (0.3, 0.5, 0.65, 0.75, 0.85, 0.9)  # before any was measured, by length of match:
_BUCKETS = (0, 0, 0, 1, 2, 2, 3, 3, 3, *(4,) * (LONGEST_MATCH - 9), 5)
DEEPEST = 8  # guesses of a draft model for a sequence and step
ASK_AGAIN = 128  # steps after which a draft model that does not pay is asked once more
DRAFTED = 3  # a draft model's place among FIRST_CHANCES
FIRST_SLOPE = 0.1  # of a step's seconds for each row more, before it was measured


@dataclass(frozen=True)
class Draft:
    """Tokens that a sequence may go on with."""

    kind: str
    token_ids: tuple[int, ...]


NO_DRAFT = Draft("", ())


@dataclass
class DraftStats:
    """Of one step and kind. seconds_saved: what plain steps would have taken longer for the same tokens, by estimate;
    negative where the guesses were not worth their rows."""

    drafted: int = 0
    accepted: int = 0
    seconds_saved: float = 0.0


class SuffixIndex:
    """A text that grows, and where in it each pair of tokens stands."""

    def __init__(self, token_ids: abc.Iterable[int] = ()) -> None:
        self.token_ids = array("i")
        self._last: dict[int, int] = {}  # pair to the place of its second token
        self._earlier = array("i")  # by place: the one before of the same pair, or -1
        self.extend(token_ids)

    def extend(self, token_ids: abc.Iterable[int]) -> None:
        last, earlier, text = self._last, self._earlier, self.token_ids
        before = text[-1] if text else -1
        for token_id in token_ids:
            pair = before << 32 | token_id
            earlier.append(last.get(pair, -1))
            last[pair] = len(text)
            text.append(token_id)
            before = token_id

    def find(self, tail: array[int], near: int) -> tuple[int, int]:
        """Where the text goes on after the longest of its passages that `tail` ends with, and how long that is, 0 where
        there is none. Of equal ones the first from `near` on, or the last."""
        text, n = self.token_ids, len(tail)
        best = length = 0
        place = self._last.get(tail[n - 2] << 32 | tail[n - 1], -1) if n > 1 else -1
        for _ in range(CANDIDATES):
            if place < 0:
                break
            most, same = min(LONGEST_MATCH, place + 1, n), 2
            while same < most and text[place - same] == tail[n - 1 - same]:
                same += 1
            if same > length or (same == length and place >= near):
                best, length = place + 1, same
            place = self._earlier[place]
        return best, length


class Chances:
    """How often guesses were right, by kind and length of match, of late."""

    def __init__(self) -> None:
        self._right = {kind: [4 * chance for chance in FIRST_CHANCES] for kind in KINDS}
        self._all = {kind: [4.0] * len(FIRST_CHANCES) for kind in KINDS}

    def observe(self, kind: str, bucket: int, right: bool) -> None:
        self._right[kind][bucket] = 0.995 * self._right[kind][bucket] + right
        self._all[kind][bucket] = 0.995 * self._all[kind][bucket] + 1

    def of(self, kind: str, bucket: int) -> float:
        return self._right[kind][bucket] / self._all[kind][bucket]


class Guesser:
    """What one sequence may go on with. Each token that is drawn says whether the guess was right, drafted or not."""

    def __init__(self, sequence: Sequence, history: SuffixIndex | None, chances: Chances) -> None:
        self._sequence = sequence
        self._own = SuffixIndex()  # all tokens but the last, which would be found as its own passage
        self._others = [("prediction", SuffixIndex(sequence.params.prediction))] if sequence.params.prediction else []
        if history is not None:
            self._others.append(("history", history))
        self._chances = chances
        self._right = [0.0] * len(FIRST_CHANCES)
        self._all = [0.0] * len(FIRST_CHANCES)
        self._hits = self._expected = 0.0  # of late: guesses that were right, and what others' would have been
        self._left = dict.fromkeys(KINDS, sys.maxsize)  # where the last guess of each kind failed
        self._seen = sequence.num_tokens
        self._kind = "prediction" if sequence.params.prediction else ""
        self._source = self._others[0][1].token_ids if self._kind else array("i")
        self._at = 0  # in the source
        self._match = LONGEST_MATCH

    def guess(self) -> None:
        """Take in what was drawn since the last time."""
        tokens = self._sequence.token_ids
        for place in range(self._seen, len(tokens)):
            if not self._kind:
                break
            right = self._source[self._at] == tokens[place]
            self._learn(right)
            if right:
                self._at += 1
                self._match = min(self._match + 1, LONGEST_MATCH)
                if self._at == len(self._source):
                    self._kind = ""
            else:
                self._left[self._kind], self._kind = self._at, ""
        self._seen = len(tokens)
        if not self._kind:
            self._look()

    def tokens(self, most: int) -> list[int]:
        """The guess, so many tokens at most. One of the sequence's own end is taken to repeat."""
        tokens = self._source[self._at : self._at + most].tolist()
        if self._kind == "lookup" and tokens:
            tokens *= -(-most // len(tokens))
        return tokens[:most]

    def chances(self, most: int) -> list[float]:
        """Of each of so many tokens at most, that it and all before it are right; as long as it may well be."""
        chances: list[float] = []
        chance, usual = 1.0, min(1.0, (self._hits + 2) / (self._expected + 2))
        while self._kind and len(chances) < most:
            bucket = _BUCKETS[min(self._match + len(chances), LONGEST_MATCH)]
            prior = usual * self._chances.of(self._kind, bucket)
            chance *= (self._right[bucket] + 2 * prior) / (self._all[bucket] + 2)
            if chance < LEAST_CHANCE:
                break
            chances.append(chance)
        return chances

    @property
    def kind(self) -> str:
        return self._kind

    def _learn(self, right: bool) -> None:
        bucket = _BUCKETS[self._match]
        self._right[bucket] = 0.9 * self._right[bucket] + right
        self._all[bucket] = 0.9 * self._all[bucket] + 1
        self._hits = 0.95 * self._hits + right
        self._expected = 0.95 * self._expected + self._chances.of(self._kind, bucket)
        self._chances.observe(self._kind, bucket, right)

    def _look(self) -> None:
        tokens = self._sequence.token_ids
        self._own.extend(tokens[len(self._own.token_ids) : -1])
        self._match = 1
        for kind, index in (*self._others, ("lookup", self._own)):
            place, match = index.find(tokens, self._left[kind])
            source = tokens if index is self._own else index.token_ids
            if match > self._match and place < len(source):
                self._kind, self._source, self._at, self._match = kind, source, place, match


class StepCost:
    """Seconds of a step by its tokens, as they were of late: what was measured for so many, and between. What was not
    for long is believed less and less, so that one bad moment is not believed for ever. A busy machine and long
    contexts lengthen all steps alike: from each step all sizes learn, and its own the more the less it is known."""

    def __init__(self) -> None:
        self._sizes: list[int] = []  # ascending
        self._seconds: list[float] = []
        self._trust: list[float] = []

    def observe(self, tokens: int, seconds: float) -> None:
        size = tokens if tokens <= 16 else round(2 ** (round(4 * _log2(tokens)) / 4))
        self._trust = [0.996 * trust for trust in self._trust]
        at = bisect_left(self._sizes, size)
        if at == len(self._sizes) or self._sizes[at] != size:
            self._sizes.insert(at, size)
            self._seconds.insert(at, seconds)
            self._trust.insert(at, 0.5)
            return
        ratio = min(max(seconds / self._seconds[at], 0.25), 4.0)
        self._seconds = [old * ratio**0.25 for old in self._seconds]
        self._seconds[at] *= ratio ** max(0.02, 0.4 * (1 - self._trust[at]))
        self._trust[at] += 0.5 * (1 - self._trust[at])

    def __bool__(self) -> bool:
        return bool(self._sizes)

    def curve(self, base: int, more: int) -> list[float]:
        """Of steps of base to base + more tokens; none is cheaper than a smaller one."""
        start = self._measured(base)
        slope = start * FIRST_SLOPE / (1 + FIRST_SLOPE * (base - 1))
        first, last = bisect_right(self._sizes, base), bisect_right(self._sizes, base + more)
        xs, ys = [base], [start]
        for at in range(first, min(last + 1, len(self._sizes))):
            guess = start + slope * (self._sizes[at] - base)
            trust = self._trust[at]
            xs.append(self._sizes[at])
            ys.append(max(ys[-1], trust * self._seconds[at] + (1 - trust) * guess))
        if xs[-1] < base + more:
            ys.append(ys[-1] + slope * (base + more - xs[-1]))
            xs.append(base + more)
        curve = [start]
        for left, right, low, high in zip(xs, xs[1:], ys, ys[1:], strict=False):
            each = (high - low) / (right - left)
            curve += [low + each * step for step in range(1, right - left + 1)]
        return curve[: more + 1]

    def _measured(self, tokens: int) -> float:
        """Of so many tokens: measured, or between what was, or as its nearest neighbour and in proportion."""
        at = bisect_left(self._sizes, tokens)
        if at == len(self._sizes):
            nearest = self._sizes[-1]
            return self._seconds[-1] * (1 + FIRST_SLOPE * (tokens - nearest) / (1 + FIRST_SLOPE * (nearest - 1)))
        if self._sizes[at] == tokens or at == 0:
            return self._seconds[at]
        low, high = self._sizes[at - 1], self._sizes[at]
        share = (tokens - low) / (high - low)
        return (1 - share) * self._seconds[at - 1] + share * self._seconds[at]


def _log2(value: int) -> float:
    return value.bit_length() - 1 + (value / (1 << value.bit_length() - 1) - 1)


@dataclass
class Candidate:
    """A guess that fits into a step. chances: of each token, that it and all before it are right."""

    draft: Draft
    chances: list[float]


@dataclass
class Rate:
    """How often a draft model was right about one sequence, of late."""

    right: float = 0.0
    all: float = 0.0

    def observe(self, right: bool) -> None:
        self.right = 0.95 * self.right + right
        self.all = 0.95 * self.all + 1


@dataclass
class Speculator:
    """Decides what one engine's steps draft. end_token_ids: of the model."""

    end_token_ids: frozenset[int]
    cost: StepCost = field(default_factory=StepCost)
    chances: Chances = field(default_factory=Chances)
    _guessers: dict[tuple[str, int], Guesser] = field(default_factory=dict)
    _histories: OrderedDict[str, SuffixIndex] = field(default_factory=OrderedDict)
    _rates: dict[tuple[str, int], Rate] = field(default_factory=dict)
    _unasked: int = 0  # steps

    def candidate(self, sequence: Sequence, most: int) -> Candidate | None:
        """Of at most so many tokens. What a grammar forces goes first, and a guess that it forbids is none."""
        guesser = self._guessers.get(sequence.key)
        if guesser is None:
            guesser = Guesser(sequence, self._histories.get(sequence.origin.tenant), self.chances)
            self._guessers[sequence.key] = guesser
        guesser.guess()
        most = min(most, MAX_DRAFT)
        if most < 1:
            return None
        chances, kind = guesser.chances(most), guesser.kind
        tokens = guesser.tokens(len(chances)) if chances else []
        if sequence.matcher is not None:
            forced, allowed = sequence.matcher.foresee(sequence.output_token_ids, tokens)
            tokens = tokens[:allowed]
            if forced and tokens[: len(forced)] != forced:
                kind, tokens = "forced", forced[:most]
                each = self.chances.of("forced", len(FIRST_CHANCES) - 1)
                chances = [each ** (i + 1) for i in range(len(tokens))]
        tokens = list(takewhile(lambda token_id: not self._ends(sequence, token_id), tokens))
        return Candidate(Draft(kind, tuple(tokens)), chances[: len(tokens)]) if tokens else None

    def depth(self, sequences: abc.Sequence[Sequence], tokens: int, drawing: int, cost: StepCost, most: int) -> int:
        """How many tokens a draft model, whose steps cost `cost`, is to guess for each of the sequences, in a step that
        has so many tokens without them and gives `drawing` sequences one each. most: rows in all."""
        if not sequences or not self.cost:
            return 0
        count, deepest = len(sequences), min(DEEPEST, most // len(sequences))
        if not cost:
            return min(1, deepest)
        curve, each = self.cost.curve(tokens, count * deepest), cost.curve(count, 0)[0]
        chances = [self.draft_chance(sequence) for sequence in sequences]
        best, gained, depth = LEAST_GAIN * drawing / curve[0], float(drawing), 0
        for length in range(1, deepest + 1):
            gained += sum(chance**length for chance in chances)
            rate = gained / (curve[count * length] + length * each)
            if rate > best:
                best, depth = rate, length
        self._unasked += 1
        if not depth and self._unasked > ASK_AGAIN:
            depth = min(1, deepest)
        if depth:
            self._unasked = 0
        return depth

    def draft_chance(self, sequence: Sequence) -> float:
        """Of a draft model's next token for it."""
        rate = self._rates.get(sequence.key, Rate())
        return (rate.right + 4 * self.chances.of("draft", DRAFTED)) / (rate.all + 4)

    def drafted(self, sequence: Sequence, token_ids: abc.Sequence[int]) -> Candidate | None:
        """What a draft model guessed, as far as it may be."""
        tokens = list(takewhile(lambda token_id: not self._ends(sequence, token_id), token_ids))
        if sequence.matcher is not None:
            tokens = tokens[: sequence.matcher.foresee(sequence.output_token_ids, tokens)[1]]
        chance = self.draft_chance(sequence)
        return Candidate(Draft("draft", tuple(tokens)), [chance ** (i + 1) for i in range(len(tokens))]) \
            if tokens else None

    def judge(self, sequence: Sequence, drafted: int, accepted: int) -> None:
        """So many of a draft model's guesses were right."""
        rate = self._rates.setdefault(sequence.key, Rate())
        for place in range(min(accepted + 1, drafted)):
            rate.observe(place < accepted)
            self.chances.observe("draft", DRAFTED, place < accepted)

    def choose(self, candidates: abc.Sequence[Candidate | None], tokens: int, sequences: int, most: int) -> list[Draft]:
        """Of each candidate the beginning that is worth its rows, in a step that has so many tokens without them and
        gives `sequences` sequences one each: what makes the most of a second. most: rows in all."""
        drafts = [NO_DRAFT] * len(candidates)
        ranked = sorted(((chance, i) for i, candidate in enumerate(candidates) if candidate is not None
                         for chance in candidate.chances), key=lambda entry: -entry[0])[:most]
        if not ranked or not self.cost:
            return drafts
        curve = self.cost.curve(tokens, len(ranked))
        alone = curve[0] if tokens == sequences else min(self.cost.curve(sequences, 0)[0], curve[0])
        best, gained, taken = LEAST_GAIN * sequences / alone, float(sequences), 0
        for rows, (chance, _) in enumerate(ranked, 1):
            gained += chance
            rate = gained / (alone + curve[rows] - curve[0])
            if rate > best:
                best, taken = rate, rows
        lengths = [0] * len(candidates)
        for _, i in ranked[:taken]:
            lengths[i] += 1
        for i, (candidate, length) in enumerate(zip(candidates, lengths, strict=True)):
            if candidate is not None and length:
                drafts[i] = Draft(candidate.draft.kind, candidate.draft.token_ids[:length])
        return drafts

    def learn(self, outcomes: abc.Sequence[tuple[Draft, int]], tokens: int, sequences: int, seconds: float,
              drafting: float = 0.0) -> dict[str, DraftStats]:
        """A step of so many tokens in all, and of so many sequences that drew, took so long, beside what a draft model
        took. outcomes: its drafts and how many tokens of each were right."""
        stats = {"draft": DraftStats(seconds_saved=-drafting)} if drafting else {}
        drafted = sum(len(draft.token_ids) for draft, _ in outcomes)
        if drafted:
            alone = self.cost.curve(sequences, 0)[0] / sequences
            each = max(0.0, seconds - self.cost.curve(tokens - drafted, 0)[0]) / drafted
            for draft, accepted in outcomes:
                kind = stats.setdefault(draft.kind, DraftStats())
                kind.drafted += len(draft.token_ids)
                kind.accepted += accepted
                kind.seconds_saved += accepted * alone - len(draft.token_ids) * each
                if draft.kind == "forced":
                    for place in range(min(accepted + 1, len(draft.token_ids))):
                        self.chances.observe("forced", len(FIRST_CHANCES) - 1, place < accepted)
        self.cost.observe(tokens, seconds)
        return stats

    def forget(self, sequence: Sequence, remember: bool) -> None:
        """A sequence has ended. remember: its answer, for others of its tenant."""
        self._guessers.pop(sequence.key, None)
        self._rates.pop(sequence.key, None)
        if not remember or sequence.num_output_tokens < 2:
            return
        tenant = sequence.origin.tenant
        history = self._histories.pop(tenant, None) or SuffixIndex()
        if len(history.token_ids) > HISTORY_TOKENS:  # the newer half, in arrays of its own: guessers may read the old
            history = SuffixIndex(history.token_ids[-HISTORY_TOKENS // 2 :])
        history.extend(sequence.token_ids[max(0, sequence.num_prompt_tokens - HISTORY_PROMPT) :][-HISTORY_TOKENS:])
        self._histories[tenant] = history
        if len(self._histories) > HISTORIES:
            self._histories.popitem(last=False)

    def _ends(self, sequence: Sequence, token_id: int) -> bool:
        """No token that ends a sequence is drafted: nothing follows it."""
        params = sequence.params
        return token_id in params.stop_token_ids or (not params.ignore_eos and token_id in self.end_token_ids)
