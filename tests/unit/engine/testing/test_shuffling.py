"""Where experts are moved to on purpose: elsewhere, and nowhere twice."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from drumline.engine.testing.shuffling import turned
from drumline.protocol.errors import InvalidConfig


def by_rank(row: np.ndarray, slots: list[int]) -> list[set[int]]:
    bounds = np.cumsum([0, *slots])
    return [set(row[a:b].tolist()) for a, b in itertools.pairwise(bounds)]


@pytest.mark.parametrize("slots", [[10, 10], [5, 5, 5, 5], [7, 7, 6]])
def test_every_expert_keeps_a_copy_no_rank_gets_two_and_most_travel(slots: list[int]) -> None:
    home = np.tile(np.array([*range(16), 0, 1, 2, 3], dtype=np.int32), (3, 1))
    away = turned(home, slots)
    assert away.dtype == np.int32
    for before, after in zip(home, away, strict=True):
        assert sorted(before) == sorted(after)
        held, gets = by_rank(before, slots), by_rank(after, slots)
        assert [len(one) for one in gets] == slots
        assert sum(len(new - old) for new, old in zip(gets, held, strict=True)) > len(before) // 2


def test_a_layer_for_which_there_is_no_other_placement_stays() -> None:
    home = np.array([[0, 1, 0, 1]], dtype=np.int32)
    assert (turned(home, [2, 2]) == home).all()


def test_slots_that_do_not_add_up_are_refused() -> None:
    with pytest.raises(InvalidConfig, match="slots"):
        turned(np.zeros((1, 4), dtype=np.int32), [2, 1])
