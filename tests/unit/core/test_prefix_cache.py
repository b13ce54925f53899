"""Prefix hashes and the index of cached blocks."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from drumline.engine.core.block_pool import BlockPool
from drumline.engine.core.prefix_cache import PrefixCache, PrefixHasher

SIZE = 4


@pytest.fixture
def hasher() -> PrefixHasher:
    return PrefixHasher(SIZE, 64, np.random.default_rng(1))


def text(*tokens: int) -> npt.NDArray[np.int32]:
    return np.asarray(tokens, dtype=np.int32)


class Store:
    """A pool, a history and a cache; :meth:`fill` is what a row does that computes a prompt."""

    def __init__(self, hasher: PrefixHasher, num_blocks: tuple[int, ...] = (8,)) -> None:
        self.pool = BlockPool(num_blocks)
        self.history = np.zeros((self.pool.first[-1], SIZE), dtype=np.int32)
        self.cache = PrefixCache(self.pool, self.history, hasher)
        self.hasher = hasher

    def fill(self, tokens: npt.NDArray[np.int32], replica: int = 0) -> npt.NDArray[np.int64]:
        count = len(tokens) // SIZE
        blocks = self.pool.allocate(replica, count)
        self.history[blocks] = tokens[: count * SIZE].reshape(count, SIZE)
        self.cache.insert(np.full(count, replica), blocks, self.hasher.states(tokens))
        return blocks

    def lookup(self, tokens: npt.NDArray[np.int32], replica: int = 0) -> list[int]:
        found: list[int] = self.cache.lookup(replica, tokens, self.hasher.states(tokens)).tolist()
        return found


def test_the_state_of_a_prefix_is_the_sum_of_token_plus_one_times_weight(hasher: PrefixHasher) -> None:
    tokens = text(5, 0, 7, 1, 9, 9, 9, 9, 3)
    weights = hasher._weights.transpose(0, 2, 1).reshape(-1, 4)
    expected = [
        [
            sum((int(token) + 1) * int(weights[i, lane]) for i, token in enumerate(tokens[:end])) % 2**64
            for lane in range(4)
        ]
        for end in (4, 8)
    ]
    assert hasher.states(tokens).tolist() == expected


def test_states_of_many_rows_can_be_extended_block_by_block(hasher: PrefixHasher) -> None:
    tokens = np.arange(24, dtype=np.int32)
    states = hasher.states(tokens)
    sums = hasher.block_sums(tokens[8:16].reshape(2, SIZE), np.asarray([2, 3]))
    assert np.array_equal(states[1] + sums[0], states[2])
    assert np.array_equal(states[2] + sums[1], states[3])


def test_another_key_makes_other_hashes() -> None:
    tokens = np.arange(8, dtype=np.int32)
    one, other, again = (PrefixHasher(SIZE, 8, np.random.default_rng(key)).states(tokens) for key in (1, 2, 1))
    assert not np.array_equal(one, other)
    assert np.array_equal(one, again)


def test_the_longest_cached_prefix_of_whole_blocks_is_found(hasher: PrefixHasher) -> None:
    store = Store(hasher)
    store.fill(np.arange(14, dtype=np.int32))
    assert store.lookup(np.arange(14, dtype=np.int32)) == [1, 2, 3]
    assert store.lookup(text(*range(8), 99, 9, 10, 11)) == [1, 2]
    assert store.lookup(text(99, *range(1, 12))) == []


def test_the_same_tokens_after_another_beginning_are_not_a_hit(hasher: PrefixHasher) -> None:
    store = Store(hasher)
    store.fill(text(1, 1, 1, 1, 7, 7, 7, 7))
    assert store.lookup(text(2, 2, 2, 2, 7, 7, 7, 7)) == []
    assert store.lookup(text(7, 7, 7, 7)) == []


def test_a_prefix_that_is_cached_stays_where_it_is(hasher: PrefixHasher) -> None:
    store = Store(hasher)
    tokens = np.arange(8, dtype=np.int32)
    store.fill(tokens)
    second = store.fill(tokens)
    assert store.lookup(tokens) == [1, 2]
    assert not store.pool.keyed[second].any()


def test_two_rows_that_fill_the_same_prefix_in_one_step_leave_one_cached_copy(hasher: PrefixHasher) -> None:
    store = Store(hasher)
    blocks = store.pool.allocate(0, 2)
    store.history[blocks] = [[1, 2, 3, 4], [1, 2, 3, 4]]
    states = hasher.states(text(1, 2, 3, 4))
    store.cache.insert(np.zeros(2, dtype=np.int64), blocks, np.concatenate([states, states]))
    assert len(store.cache) == 1
    assert np.count_nonzero(store.pool.keyed) == 1
    assert len(store.lookup(text(1, 2, 3, 4))) == 1


def test_a_block_given_away_is_no_hit_even_before_the_purge(hasher: PrefixHasher) -> None:
    store = Store(hasher, num_blocks=(2,))
    store.pool.release(0, store.fill(np.arange(8, dtype=np.int32)))
    store.pool.allocate(0, 1)
    assert store.lookup(np.arange(8, dtype=np.int32)) == [1]
    assert len(store.cache) == 2
    store.cache.purge()
    assert len(store.cache) == 1


def test_the_purge_spares_a_block_that_was_filled_again_with_the_same_prefix(hasher: PrefixHasher) -> None:
    store = Store(hasher, num_blocks=(1,))
    tokens = np.arange(4, dtype=np.int32)
    store.pool.release(0, store.fill(tokens))
    store.fill(tokens)
    store.cache.purge()
    assert store.lookup(tokens) == [1]


def test_replicas_do_not_see_each_others_blocks(hasher: PrefixHasher) -> None:
    store = Store(hasher, num_blocks=(2, 2))
    tokens = np.arange(4, dtype=np.int32)
    store.fill(tokens, replica=1)
    assert (store.lookup(tokens, replica=0), store.lookup(tokens, replica=1)) == ([], [3])


def test_a_forgotten_replica_has_no_hits_and_the_others_keep_theirs(hasher: PrefixHasher) -> None:
    store = Store(hasher, num_blocks=(2, 2))
    tokens = np.arange(4, dtype=np.int32)
    store.fill(tokens, replica=0)
    store.fill(tokens, replica=1)
    store.cache.forget(0)
    assert (store.lookup(tokens, replica=0), store.lookup(tokens, replica=1)) == ([], [3])
    assert len(store.cache) == 1


def test_a_hit_whose_tokens_differ_is_refused(hasher: PrefixHasher) -> None:
    """As if two prefixes had the same key."""
    store = Store(hasher)
    tokens = np.arange(8, dtype=np.int32)
    store.fill(tokens)
    store.history[2, 0] = 999
    assert store.lookup(tokens) == [1]
