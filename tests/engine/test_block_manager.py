from __future__ import annotations

from fptq_runtime.engine.block_manager import BlockManager
from fptq_runtime.engine.request import SamplingParams
from fptq_runtime.engine.sequence import Sequence


def computed(blocks: BlockManager, token_ids: list[int]) -> Sequence:
    """A sequence whose tokens are all in the cache."""
    request = Sequence("r", 0, token_ids, SamplingParams(), 0, 0.0)
    blocks.share(request, prefix := blocks.find_prefix(request))
    assert blocks.allocate(request, len(token_ids))
    before = len(prefix) * blocks.block_size
    request.num_computed_tokens = len(token_ids)
    blocks.publish(request, before)
    return request


def found(blocks: BlockManager, token_ids: list[int]) -> list[int]:
    return blocks.find_prefix(Sequence("f", 0, token_ids, SamplingParams(), 0, 0.0))


def test_a_prefix_is_shared_block_by_block() -> None:
    blocks = BlockManager(8, 16, True)
    a = computed(blocks, [1] * 16 + [2] * 16 + [3] * 5)
    table = list(a.block_table)
    assert found(blocks, [1] * 16 + [2] * 16 + [9]) == table[:2]
    assert found(blocks, [1] * 16 + [9] * 17) == table[:1]
    assert found(blocks, [9] * 16 + [2] * 16 + [9]) == []  # the same block after another text is another block
    assert found(blocks, [2] * 16 + [9]) == []
    b = computed(blocks, [1] * 16 + [2] * 16 + [4] * 5)
    assert list(b.block_table[:2]) == table[:2]
    assert blocks.num_free_blocks == 4
    blocks.check_integrity([a, b])
    blocks.free(a)
    blocks.check_integrity([b])
    assert blocks.num_free_blocks == 5
    blocks.free(b)
    assert blocks.num_free_blocks == 8
    assert found(blocks, [1] * 33) == table[:1]  # still there


def test_at_least_one_token_is_left_to_compute() -> None:
    blocks = BlockManager(8, 16, True)
    computed(blocks, [1] * 32)
    assert len(found(blocks, [1] * 33)) == 2
    assert len(found(blocks, [1] * 32)) == 1
    assert len(found(blocks, [1] * 16)) == 0


def test_the_least_recently_used_is_evicted_first_and_tails_before_heads() -> None:
    blocks = BlockManager(4, 16, True)
    old, new = computed(blocks, [1] * 32), computed(blocks, [2] * 32)
    blocks.free(old)
    blocks.free(new)
    blocks.free(computed(blocks, [3] * 16))
    assert len(found(blocks, [1] * 33)) == 1
    assert len(found(blocks, [2] * 33)) == 2
    blocks.free(computed(blocks, [1] * 17))  # uses the old head once more, and evicts for its second block
    assert len(found(blocks, [1] * 33)) == 1
    assert len(found(blocks, [3] * 17)) + len(found(blocks, [2] * 33)) == 2
    blocks.check_integrity([])


def test_too_few_blocks_change_nothing() -> None:
    blocks = BlockManager(2, 16, True)
    holder = computed(blocks, [1] * 16)
    request = Sequence("r", 0, [2] * 40, SamplingParams(), 0, 0.0)
    assert not blocks.allocate(request, 40)
    assert not request.block_table
    assert blocks.num_free_blocks == 1
    blocks.check_integrity([holder])


def test_without_caching_nothing_is_found() -> None:
    blocks = BlockManager(8, 16, False)
    blocks.free(computed(blocks, [1] * 33))
    assert found(blocks, [1] * 33) == []
    blocks.check_integrity([])


def test_equal_blocks_computed_twice_are_published_once() -> None:
    blocks = BlockManager(8, 16, True)
    a, b = (Sequence(str(i), 0, [1] * 17, SamplingParams(), 0, 0.0) for i in range(2))
    for request in (a, b):
        blocks.allocate(request, 17)
        request.num_computed_tokens = 17
        blocks.publish(request, 0)
    assert found(blocks, [1] * 17) == [a.block_table[0]]
    blocks.check_integrity([a, b])
    blocks.free(a)
    blocks.free(b)
    blocks.check_integrity([])
