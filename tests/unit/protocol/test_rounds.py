"""Which experts travel at once."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from drumline.protocol.errors import InvalidConfig
from drumline.protocol.messages import I32, I32Matrix
from drumline.protocol.rounds import pair_rounds


def _fetches(moves: list[tuple[int, int]]) -> tuple[I32Matrix, I32]:
    """Fetches and receivers of moves (source, receiver); each into a slot of its own, out of slot 0."""
    rows = [(7, slot, source, 0) for slot, (source, _) in enumerate(moves)]
    return np.array(rows, dtype=np.int32).reshape(-1, 4), np.array([to for _, to in moves], dtype=np.int32)


def _by_round(moves: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    fetches, receivers = _fetches(moves)
    ordered, bounds = pair_rounds(fetches, receivers)
    pairs = [(int(source), int(receivers[slot])) for _, slot, source, _ in ordered.tolist()]
    assert sorted(map(tuple, ordered.tolist())) == sorted(map(tuple, fetches.tolist()))
    assert bounds[0] == 0
    assert bounds[-1] == len(moves)
    assert bounds.dtype == ordered.dtype == np.int32
    return [pairs[first:end] for first, end in pairwise(bounds.tolist())]


def _degree(moves: list[tuple[int, int]]) -> int:
    travel = [move for move in moves if move[0] != move[1]]
    sides = [np.array([move[side] for move in travel], dtype=np.int64) for side in (0, 1)]
    return max((int(np.bincount(side).max(initial=0)) for side in sides), default=0)


def test_a_ring_is_one_round() -> None:
    assert _by_round([(0, 1), (1, 2), (2, 0)]) == [[(0, 1), (1, 2), (2, 0)]]


def test_no_rank_sends_twice_or_receives_twice_in_a_round() -> None:
    assert [len(pairs) for pairs in _by_round([(0, 1), (0, 2), (3, 1), (3, 2)])] == [2, 2]


@pytest.mark.parametrize("seed", range(20))
def test_random_moves_take_as_many_rounds_as_the_busiest_rank_has_sends_or_receives(seed: int) -> None:
    draw = np.random.default_rng(seed)
    ranks = int(draw.integers(2, 12))
    moves = [(int(a), int(b)) for a, b in draw.integers(0, ranks, (int(draw.integers(1, 90)), 2)) if a != b]
    rounds = _by_round(moves)
    for pairs in rounds:
        for side in (0, 1):
            assert len({pair[side] for pair in pairs}) == len(pairs)
    assert len(rounds) == _degree(moves)


def test_messages_between_two_ranks_keep_one_order_on_both_sides() -> None:
    fetches, receivers = _fetches([(0, 1)] * 3 + [(1, 0)] * 2)
    ordered, bounds = pair_rounds(fetches, receivers)
    assert ordered[:, 1].tolist() == [0, 3, 1, 4, 2]
    assert bounds.tolist() == [0, 2, 4, 5]


def test_local_moves_go_beside_others_one_per_rank_and_round() -> None:
    assert _by_round([(1, 1), (1, 1), (0, 1), (1, 0)]) == [[(1, 1), (0, 1), (1, 0)], [(1, 1)]]


def test_a_copy_of_what_is_fetched_comes_in_a_later_round() -> None:
    fetches = np.array([[0, 5, 0, 2], [0, 6, 1, 3], [0, 7, 1, 1], [0, 8, 0, 0]], dtype=np.int32)
    receivers = np.array([1, 1, 1, 1], dtype=np.int32)
    first_slots = np.full(4, 4, dtype=np.int32)
    ordered, bounds = pair_rounds(fetches, receivers, first_slots)
    # Slot 6 copies slot 7, still as it was; slot 7 copies slot 5, which is fetched first.
    assert [ordered[first:end, 1].tolist() for first, end in pairwise(bounds.tolist())] == [
        [5, 6],
        [7, 8],
    ]


def test_without_first_slots_a_local_move_waits_for_all_that_stands_before_it() -> None:
    assert _by_round([(0, 1), (0, 1), (1, 1)]) == [[(0, 1)], [(0, 1)], [(1, 1)]]


def test_nothing_to_move_is_no_round() -> None:
    fetches, receivers = _fetches([])
    ordered, bounds = pair_rounds(fetches, receivers)
    assert ordered.shape == (0, 4)
    assert bounds.tolist() == [0]


@pytest.mark.parametrize(
    ("fetches", "receivers", "said"),
    [
        (np.zeros((2, 3), np.int32), np.zeros(2, np.int32), r"fetches.*\[2, 3\].*\(n, 4\)"),
        (np.zeros((2, 4), np.int32), np.zeros(3, np.int32), r"receivers.*\[3\].*\(2,\)"),
        (np.array([[0, 0, 0, 0], [1, 0, 0, 0]], np.int32), np.zeros(2, np.int32), r"layers \[0, 1\]"),
        (np.array([[0, 0, -1, 0]], np.int32), np.zeros(1, np.int32), r"source -1"),
    ],
)
def test_what_cannot_be_moved_is_refused(fetches: I32Matrix, receivers: I32, said: str) -> None:
    with pytest.raises(InvalidConfig, match=said):
        pair_rounds(fetches, receivers)
