"""Free, used and cached blocks."""

from __future__ import annotations

import numpy as np
import pytest

from drumline.engine.core.block_pool import BlockPool, RecencyQueue


def ids(*blocks: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.asarray(blocks, dtype=np.int64)


def key(pool: BlockPool, *blocks: int) -> None:
    pool.keyed[list(blocks)] = True


def test_a_fresh_pool_gives_ascending_blocks_and_number_0_to_nobody() -> None:
    pool = BlockPool([3, 2])
    assert pool.allocate(0, 2).tolist() == [1, 2]
    assert pool.allocate(1, 2).tolist() == [4, 5]
    assert (pool.available(0), pool.available(1)) == (1, 0)
    assert pool.refs.tolist() == [0, 1, 1, 0, 1, 1]


def test_one_block_for_each_of_many_rows_comes_from_the_replica_of_the_row() -> None:
    pool = BlockPool([4, 4, 4])
    blocks = pool.allocate_each(ids(0, 0, 2, 2, 2), ids(2, 0, 3))
    assert blocks.tolist() == [1, 2, 9, 10, 11]
    assert pool.available_everywhere().tolist() == [2, 4, 1]


def test_blocks_without_cached_content_are_given_away_before_cached_ones() -> None:
    pool = BlockPool([4])
    blocks = pool.allocate(0, 4)
    key(pool, 2, 3)
    pool.release(0, blocks)
    assert (pool.available(0), pool.cached(0)) == (4, 2)
    assert sorted(pool.allocate(0, 2).tolist()) == [1, 4]
    assert (pool.available(0), pool.cached(0)) == (2, 2)


def test_cached_blocks_go_least_recently_freed_first_and_of_one_row_the_last_first() -> None:
    pool = BlockPool([4])
    first, second = pool.allocate(0, 2), pool.allocate(0, 2)
    key(pool, 1, 2, 3, 4)
    pool.release(0, second)
    pool.release(0, first)
    assert [pool.allocate(0, 1).tolist() for _ in range(4)] == [[4], [3], [2], [1]]


def test_a_block_given_away_loses_its_key_and_the_loss_is_told() -> None:
    pool = BlockPool([1])
    block = pool.allocate(0, 1)
    key(pool, 1)
    pool.keys[1] = [5, 6, 7, 8]
    pool.release(0, block)
    pool.allocate(0, 1)
    assert not pool.keyed[1]
    assert [(blocks.tolist(), keys.tolist()) for blocks, keys in pool.lost] == [([1], [[5, 6, 7, 8]])]


def test_a_shared_block_is_free_when_its_last_user_lets_go() -> None:
    pool = BlockPool([2])
    block = pool.allocate(0, 1)
    key(pool, 1)
    pool.share(0, block)
    pool.release(0, block)
    assert (pool.available(0), pool.refs[1]) == (1, 1)
    pool.release(0, block)
    assert (pool.available(0), pool.cached(0)) == (2, 1)


def test_sharing_a_cached_free_block_takes_it_out_of_the_free_ones() -> None:
    pool = BlockPool([2])
    pool.release(0, _keyed(pool, pool.allocate(0, 2)))
    assert pool.idle_among(ids(1, 2)) == 2
    pool.share(0, ids(2))
    assert (pool.available(0), pool.cached(0), pool.idle_among(ids(1, 2))) == (1, 1, 1)
    assert pool.allocate(0, 1).tolist() == [1]


def test_forgetting_what_is_cached_leaves_every_block_free() -> None:
    pool = BlockPool([3])
    pool.release(0, _keyed(pool, pool.allocate(0, 3)))
    pool.forget_cached(0)
    assert (pool.available(0), pool.cached(0), int(pool.keyed.sum())) == (3, 0, 0)
    assert sorted(pool.allocate(0, 3).tolist()) == [1, 2, 3]


def test_the_recency_queue_keeps_its_order_through_removals_and_compaction() -> None:
    queue = RecencyQueue(first=1, capacity=4)
    expected: list[int] = []
    rng = np.random.default_rng(0)
    for _ in range(300):
        outside = [block for block in range(1, 5) if block not in expected]
        action = rng.integers(3)
        if action == 0 and outside:
            chosen = rng.permutation(outside)[: rng.integers(1, len(outside) + 1)]
            queue.push(chosen)
            expected += chosen.tolist()
        elif action == 1 and expected:
            count = int(rng.integers(1, len(expected) + 1))
            assert queue.pop(count).tolist() == expected[:count]
            del expected[:count]
        elif expected:
            gone = int(rng.choice(expected))
            queue.remove(ids(gone))
            expected.remove(gone)
        assert len(queue) == len(expected)


def test_more_blocks_than_there_are_is_an_error() -> None:
    pool = BlockPool([2])
    with pytest.raises(LookupError, match="1 blocks asked of 0"):
        pool.allocate(0, 3)


def _keyed(
    pool: BlockPool, blocks: np.ndarray[tuple[int], np.dtype[np.int64]]
) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    pool.keyed[blocks] = True
    return blocks
