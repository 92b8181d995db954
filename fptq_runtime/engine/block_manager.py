"""Who holds which KV block, and which block holds which text. No torch.

A block is in use (reference count > 0), or it is free. Of the free ones some still hold a cached prefix; those are
given out last, least recently used first. Only full blocks are ever shared, so no block is written by two sequences.
"""

from __future__ import annotations

import time
from array import array
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from hashlib import blake2b

from fptq_runtime.engine.block_store import BlockStore
from fptq_runtime.engine.sequence import Sequence, SequenceStatus
from fptq_runtime.engine.state_cache import StateCache

LOAD_SECONDS = 2.0  # that a prompt waits for the store; then it is computed
LEAST_KEPT = 64  # tokens: to compute fewer again costs no more than to keep a state


@dataclass
class _Load:
    """What is being read of a sequence's prefix, into blocks that are neither free nor anyone's."""

    sequence: Sequence
    digests: list[bytes]
    blocks: list[int]
    reads: list[Future[bool]]
    deadline: float


class BlockManager:
    """store: what holds published blocks beside the cache. states: of recurrent layers, without one of which at its end
    no prefix is shared."""

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool,
                 store: BlockStore | None = None, states: StateCache | None = None) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.states = states
        self._store = store
        self._ref_counts = [0] * num_blocks
        self._blank = list(range(num_blocks - 1, -1, -1))  # free, nothing worth keeping; a stack
        self._evictable: OrderedDict[int, None] = OrderedDict()  # free but cached, the oldest first
        self._loads: list[_Load] = []
        self._block_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}

    @property
    def num_free_blocks(self) -> int:
        return len(self._blank) + len(self._evictable)

    @property
    def usage(self) -> float:
        """Share of the blocks that sequences hold."""
        return 1 - self.num_free_blocks / self.num_blocks

    @property
    def num_loading_blocks(self) -> int:
        return sum(len(load.blocks) for load in self._loads)

    @property
    def can_restore(self) -> bool:
        """There is a store, and it answers."""
        return self._store is not None and all(time.monotonic() < load.deadline for load in self._loads)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def find_prefix(self, sequence: Sequence) -> list[int]:
        """Cached blocks of the longest prefix to go on from that leaves at least one token to compute."""
        if not self._shares(sequence):
            return []
        blocks = self._cached(sequence)
        while self.states is not None and blocks and sequence.block_hashes[len(blocks) - 1] not in self.states:
            del blocks[-1]
        return blocks

    def _shares(self, sequence: Sequence) -> bool:
        """Prefixes with others. Embeddings are computed by another executor, whose states nobody copies."""
        return self.enable_prefix_caching and (self.states is None or sequence.params.pooling is None)

    def _cached(self, sequence: Sequence) -> list[int]:
        """Of the longest known prefix, whether it has a state or not."""
        blocks: list[int] = []
        for index in range((sequence.num_tokens - 1) // self.block_size):
            block = self._block_of.get(self._block_hash(sequence, index))
            if block is None:
                break
            blocks.append(block)
        return blocks

    def free_blocks_after(self, prefix: Iterable[int]) -> int:
        """How many blocks would still be free, were these cached ones taken."""
        return self.num_free_blocks - sum(block in self._evictable for block in prefix)

    def share(self, sequence: Sequence, prefix: Iterable[int]) -> None:
        """Start a sequence's block table with cached blocks."""
        for block in prefix:
            self._ref_counts[block] += 1
            self._evictable.pop(block, None)
            sequence.block_table.append(block)

    def allocate(self, sequence: Sequence, num_tokens: int) -> bool:
        """Let the block table hold num_tokens. False, and nothing changes, where too few blocks are free."""
        missing = self.blocks_for(num_tokens) - len(sequence.block_table)
        if missing > self.num_free_blocks:
            return False
        for _ in range(missing):
            block = self._take()
            self._ref_counts[block] = 1
            sequence.block_table.append(block)
        return True

    def state_stops(self, sequence: Sequence, start: int) -> tuple[int, ...]:
        """After how many tokens, of those from `start` on, a sequence's state is worth keeping: where what is known of
        it ends, since there another text went on otherwise, and at its last block's end, where the next turn of a chat
        goes on."""
        if self.states is None or not self._shares(sequence):
            return ()
        ends = {len(self._cached(sequence)), (sequence.num_tokens - 1) // self.block_size}
        return tuple(sorted(end * self.block_size for end in ends if end * self.block_size - start >= LEAST_KEPT))

    def keep_state(self, sequence: Sequence) -> None:
        """At the end of the last of its blocks that is full, where it is now."""
        assert self.states is not None
        index = sequence.num_computed_tokens // self.block_size - 1
        self.states.keep(self._block_hash(sequence, index), sequence.state_slot)

    def restore_state(self, sequence: Sequence) -> None:
        """Of the shared blocks that it begins with, where there are any."""
        if self.states is not None and sequence.block_table:
            self.states.restore(sequence.block_hashes[len(sequence.block_table) - 1], sequence.state_slot)

    def publish(self, sequence: Sequence, num_computed_before: int) -> None:
        """Offer for sharing the blocks that became full since num_computed_before tokens were computed."""
        if not self.enable_prefix_caching:
            return
        for index in range(num_computed_before // self.block_size, sequence.num_computed_tokens // self.block_size):
            digest, block = self._block_hash(sequence, index), sequence.block_table[index]
            if digest not in self._block_of and block not in self._hash_of:
                self._cache(digest, block)
                if self._store is not None:
                    self._store.save(digest, block)

    def restore(self, sequence: Sequence) -> None:
        """Begin to bring into the cache what the store has of a sequence's prefix; steps go on meanwhile. By the load's
        end the sequence has its num_restored_tokens."""
        assert self._store is not None
        loading = {digest for load in self._loads for digest in load.digests}
        digests: list[bytes] = []
        for index in range((sequence.num_tokens - 1) // self.block_size):
            digest = self._block_hash(sequence, index)
            if (block := self._block_of.get(digest)) is None:
                if len(digests) == self.num_free_blocks or digest in loading or not self._store.has(digest):
                    break
                digests.append(digest)
            elif block in self._evictable:
                self._evictable.move_to_end(block)
        held = sum(block in self._evictable for block in self.find_prefix(sequence))
        del digests[max(0, self.num_free_blocks - held) :]
        blocks = [self._take() for _ in digests]
        reads = [self._store.load(digest, block) for digest, block in zip(digests, blocks, strict=True)]
        self._loads.append(_Load(sequence, digests, blocks, reads, time.monotonic() + LOAD_SECONDS))
        self.end_loads()

    def is_restoring(self, sequence: Sequence) -> bool:
        return any(load.sequence is sequence and time.monotonic() < load.deadline for load in self._loads)

    def end_loads(self, timeout: float = 0.0) -> None:
        """Offer for sharing what has been loaded. timeout: seconds to wait for what the oldest load lacks."""
        if timeout and self._loads:
            wait(self._loads[0].reads, timeout)
        for load in [load for load in self._loads if all(read.done() for read in load.reads)]:
            self._loads.remove(load)
            whole = [read.result() for read in load.reads]
            loaded = whole.index(False) if False in whole else len(whole)
            if load.sequence.status is SequenceStatus.WAITING:
                load.sequence.num_restored_tokens = loaded * self.block_size
            for digest, block in zip(load.digests[:loaded], load.blocks, strict=False):
                if digest in self._block_of:
                    self._blank.append(block)
                else:
                    self._cache(digest, block)
                    self._evictable[block] = None
            self._blank += load.blocks[loaded:]

    def free(self, sequence: Sequence) -> None:
        """Give back a sequence's blocks. Its last ones are the first to be evicted: a prefix is shared more often."""
        for block in reversed(sequence.block_table):
            self._ref_counts[block] -= 1
            if self._ref_counts[block] == 0:
                if block in self._hash_of:
                    self._evictable[block] = None
                else:
                    self._blank.append(block)
        sequence.block_table = array("i")

    def check_integrity(self, holders: Iterable[Sequence]) -> None:
        """Raise AssertionError unless the books agree with the sequences that hold blocks."""
        counts = [0] * self.num_blocks
        for sequence in holders:
            assert len(set(sequence.block_table)) == len(sequence.block_table), "a block stands twice in a table"
            for block in sequence.block_table:
                counts[block] += 1
        assert counts == self._ref_counts, "reference counts differ from the block tables"
        loading = [block for load in self._loads for block in load.blocks]
        free = [*self._blank, *self._evictable, *loading]
        assert len(free) == len(set(free)), "a block is free twice"
        assert set(free) == {block for block, count in enumerate(counts) if count == 0}, "free and used blocks overlap"
        assert self._block_of == {digest: block for block, digest in self._hash_of.items()}, "the cache maps differ"
        assert not self._hash_of.keys() & set(self._blank), "a blank block is cached"
        assert self._evictable.keys() <= self._hash_of.keys(), "an evictable block is not cached"
        if self.states is not None:
            self.states.check_integrity()

    def _take(self) -> int:
        """A free block, of those that hold a prefix the oldest."""
        if self._blank:
            return self._blank.pop()
        block, _ = self._evictable.popitem(last=False)
        del self._block_of[self._hash_of.pop(block)]
        return block

    def _cache(self, digest: bytes, block: int) -> None:
        self._block_of[digest] = block
        self._hash_of[block] = digest

    def _block_hash(self, sequence: Sequence, index: int) -> bytes:
        """What block `index` holds: a digest of its tokens and, through its parent's digest, of all before them, of its
        adapter and of its tenant, so that no time taken tells of another's prompts.
        128 bits, so that two texts never share a block by chance."""
        hashes, size = sequence.block_hashes, self.block_size
        while len(hashes) <= index:
            start = len(hashes) * size
            parent = hashes[-1] if hashes else sequence.adapter.digest + sequence.origin.tenant.encode()
            tokens = array("i", sequence.token_ids[start : start + size]).tobytes()
            hashes.append(blake2b(parent + tokens, digest_size=16).digest())
        return hashes[index]
