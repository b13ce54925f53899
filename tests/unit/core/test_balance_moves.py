"""From one placement to another, what it costs, and how even it is."""

from __future__ import annotations

import numpy as np
import pytest

from drumline.engine.core.balance.measure import balancedness, rank_loads
from drumline.engine.core.balance.moves import between_ranks, keep_in_place, moves_between
from drumline.engine.core.balance.spend import spend

RANKS = np.array([0, 0, 1, 1, 2, 2], dtype=np.int32)
NODES = np.array([0, 0, 1], dtype=np.int32)


def _rows(*rows: list[int]) -> np.ndarray[tuple[int, int], np.dtype[np.int32]]:
    return np.array(rows, dtype=np.int32)


def test_copies_share_the_load_of_their_expert() -> None:
    load = np.array([[6.0, 2.0, 4.0]])
    placement = _rows([0, 1, 0, 2, 0, -1])
    assert rank_loads(load, placement, RANKS).tolist() == [[4.0, 6.0, 2.0]]
    assert balancedness(load, placement, RANKS).tolist() == [4.0 / 6.0]


def test_slots_that_do_not_count_have_no_load() -> None:
    load = np.array([[6.0, 2.0, 4.0]])
    ranks = np.array([0, 0, -1, -1, 2, 2])
    assert rank_loads(load, _rows([0, 1, 0, 2, 0, 2]), ranks).tolist() == [[5.0, 0.0, 7.0]]
    assert balancedness(load, _rows([0, 1, 0, 2, 0, 2]), ranks).tolist() == [6.0 / 7.0]


def test_no_load_is_even() -> None:
    assert balancedness(np.zeros((1, 3)), _rows([0, 1, 0, 2, 0, 2]), RANKS).tolist() == [1.0]


def test_an_expert_that_stays_on_its_rank_keeps_its_slot() -> None:
    standing, wanted = _rows([0, 1, 2, 3, 4, 5]), _rows([1, 5, 3, 0, 4, 2])
    assert keep_in_place(standing, wanted, RANKS).tolist() == [[5, 1, 0, 3, 4, 2]]


def test_a_second_copy_keeps_its_slot_too() -> None:
    standing, wanted = _rows([0, 0, 1, 2, 3, -1]), _rows([1, 0, 2, 2, 3, 3])
    assert keep_in_place(standing, wanted, RANKS).tolist() == [[0, 1, 2, 2, 3, 3]]


def test_a_copy_comes_from_its_rank_else_its_node_else_anywhere() -> None:
    standing = _rows([0, 1, 1, 2, 1, 3])
    moves = moves_between(standing, _rows([1, 1, 1, 3, 1, 0]), RANKS, NODES, 4)
    assert moves.tolist() == [[0, 0, 0, 1], [0, 3, 2, 5], [0, 5, 0, 0]]
    assert between_ranks(moves, RANKS, NODES) == (2, 2)
    near = moves_between(standing, _rows([0, 2, 1, 2, 1, 3]), RANKS, NODES, 4)
    assert near.tolist() == [[0, 1, 1, 3]]
    assert between_ranks(near, RANKS, NODES) == (1, 0)


def test_holders_that_are_as_near_take_turns() -> None:
    ranks, nodes = np.arange(8, dtype=np.int32), np.zeros(8, dtype=np.int32)
    moves = moves_between(_rows([0, 0, 0, 0, 1, 1, 1, 1]), _rows([0] * 8), ranks, nodes, 2)
    assert sorted(moves[:, 2].tolist()) == [0, 1, 2, 3]


def test_the_slots_of_dead_ranks_are_no_source_and_get_nothing() -> None:
    dead = np.array([-1, -1, 1, 1, 2, 2], dtype=np.int32)
    moves = moves_between(_rows([0, 1, 1, 2, 1, 3]), _rows([3, 3, 0, 2, 1, 3]), dead, NODES, 4)
    assert moves.tolist() == [[0, 2, -1, -1]]
    assert between_ranks(moves, dead, NODES) == (0, 0)


def test_what_there_is_goes_to_the_layers_that_get_most_for_it() -> None:
    worth = np.array([[0.1, 0.5, 0.9], [0.1, 0.2, 0.3]], dtype=np.float32)
    cost = np.array([[0, 4, 8], [0, 4, 8]])
    allowed = np.ones_like(worth, dtype=np.bool_)
    assert [spend(worth, cost, allowed, most).tolist() for most in (16, 12, 8, 5, 3)] == [
        [2, 2],
        [2, 1],
        [2, 0],
        [1, 0],
        [0, 0],
    ]


@pytest.mark.parametrize("seed", range(20))
def test_no_more_is_spent_than_there_is_and_only_on_what_is_allowed(seed: int) -> None:
    random = np.random.default_rng(seed)
    worth = np.sort(random.random((9, 12)), axis=1).astype(np.float32)
    cost = np.concatenate([np.zeros((9, 1), int), np.cumsum(random.integers(0, 9, (9, 11)), axis=1)], axis=1)
    allowed = random.random((9, 12)) < 0.6
    allowed[:, 0] = True
    most = int(random.integers(0, 200))
    chosen = spend(worth, cost, allowed, most)
    assert cost[np.arange(9), chosen].sum() <= most
    assert allowed[np.arange(9), chosen].all()
