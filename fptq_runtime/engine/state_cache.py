"""Which slot keeps the state that recurrent layers have at the end of which cached text. No torch."""

from __future__ import annotations

from collections import OrderedDict


class StateCache:
    """slots: beside those of running sequences. What was used least recently makes place for what is kept next. A state
    is known by the digest of the block that ends where it was taken.

    copies: from slot to slot, to be made in this order before the next step computes anything.
    """

    def __init__(self, slots: range) -> None:
        self._slots = slots
        self._blank = list(reversed(slots))
        self._slot_of: OrderedDict[bytes, int] = OrderedDict()
        self.copies: list[tuple[int, int]] = []

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._slot_of

    def keep(self, digest: bytes, slot: int) -> None:
        """What a sequence has in its slot, until the next step moves it on."""
        if digest not in self._slot_of:
            target = self._blank.pop() if self._blank else self._slot_of.popitem(last=False)[1]
            self._slot_of[digest] = target
            self.copies.append((slot, target))
        self._slot_of.move_to_end(digest)

    def restore(self, digest: bytes, slot: int) -> None:
        """Into the slot of a sequence that goes on from there."""
        self._slot_of.move_to_end(digest)
        self.copies.append((self._slot_of[digest], slot))

    def check_integrity(self) -> None:
        """Raise AssertionError where a slot is lost, or keeps two states."""
        slots = [*self._blank, *self._slot_of.values()]
        assert sorted(slots) == list(self._slots), "a kept state's slot is lost, or keeps two"
