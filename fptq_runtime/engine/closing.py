"""How a structured answer that has little room left is brought to its end, instead of being cut in its middle."""

from __future__ import annotations

from dataclasses import dataclass, replace

import llguidance

# Bytes in the order in which they are tried: what ends a string or a number, what is a short value, the rest.
CANDIDATES = bytes(dict.fromkeys([*b'",:0123456789ntf[{-', *range(ord("A"), ord("{")), *range(256)]))
REPEATED = 6  # so often in a row a token leads nowhere
MARGIN = 16  # tokens that one token may add to what must follow, where none of an answer has added more
LOOKS = 4  # while what is left shrinks to three quarters, at most one


class Closer:
    """Of one model's tokens."""

    def __init__(self, tokenizer: llguidance.LLTokenizer) -> None:
        def single(byte: int) -> list[int]:
            return tokenizer.tokenize_bytes(bytes([byte]))

        self._closing = single(ord("}")), single(ord("]"))
        self._text = single(ord(")"))  # which may stand nowhere in JSON but within a string
        self._candidates = [token_ids for token_ids in map(single, CANDIDATES) if len(token_ids) == 1]

    def way(self, parser: llguidance.LLMatcher, most: int) -> tuple[int, ...] | None:
        """A few tokens behind which the grammar may end, at most so many; None where none were found. The parser stays
        where it is."""
        parser = parser.deep_copy()
        way: list[int] = []
        while not parser.is_accepting():
            step = parser.compute_ff_tokens() or self._step(parser, way)
            if not step or len(way) + len(step) > most or parser.try_consume_tokens(step) < len(step):
                return None
            way += step
        return None if parser.is_error() else tuple(way)

    def _step(self, parser: llguidance.LLMatcher, way: list[int]) -> list[int]:
        if not parser.validate_tokens(self._text):
            for bracket in self._closing:
                if parser.validate_tokens(bracket):
                    return bracket
        return next((token_ids for token_ids in self._candidates
                     if way[-REPEATED:] != token_ids * REPEATED and parser.validate_tokens(token_ids)), [])


@dataclass(frozen=True)
class Plan:
    """At one place of an output. way: what must follow from there, then the end; None while anything may that the
    grammar allows. look: the place at which the way to the end is measured again. length: what it was the last time.
    growth: the most that it grew by, from one look to the next."""

    look: int = 0
    length: int = 0
    growth: int = 0
    way: tuple[int, ...] | None = None

    def following(self, place: int, most: int, min_tokens: int, closer: Closer, parser: llguidance.LLMatcher) -> Plan:
        """At the next place, where an output of at most so many tokens has `place` of them."""
        if self.way is not None:
            return replace(self, way=self.way[1:])
        if place < self.look:
            return self
        left = most - place
        way = closer.way(parser, left)
        if way is None:  # there is none, or not yet
            return replace(self, look=place + max(1, left // LOOKS))
        growth = max(self.growth, len(way) - self.length) if place else 0
        spare = left - len(way) - min(max(MARGIN, growth), most // 8)
        if way and spare <= 0 and place + len(way) >= min_tokens:
            return Plan(way=way)
        return Plan(place + max(1, spare // LOOKS), len(way), growth)
