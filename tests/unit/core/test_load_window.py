"""What reports of slots say of experts, whatever the placement was."""

from __future__ import annotations

import numpy as np
import pytest

from drumline.engine.core.balance.places import ExpertPlaces
from drumline.engine.core.balance.window import FINENESS, LoadWindow, balance_of
from drumline.protocol.messages import I32Matrix

from .balance_fixtures import OTHER, PLACES, START


def report(window: LoadWindow, step: int, rows: list[list[int]], steps: int = 4) -> None:
    for rank in (0, 1):
        window.add(rank, step, matrix(rows)[:, 3 * rank : 3 * rank + 3], steps)


def matrix(rows: list[list[int]]) -> I32Matrix:
    return np.asarray(rows, dtype=np.int32)


def opened(size: int = 100) -> LoadWindow:
    window = LoadWindow(size, 4)
    window.opened(PLACES, START)
    return window


def test_copies_of_an_expert_count_together() -> None:
    window = opened()
    report(window, 4, [[5, 1, 2, 3, 7, 0], [0, 0, 0, 1, 0, 9]])
    steps, tokens = window.load(8)
    assert steps.tolist() == [4]
    assert tokens.tolist() == [[[12, 1, 2, 3], [0, 9, 0, 1]]]
    assert window.rank_load()[1].tolist() == [[8, 10], [0, 10]]


def test_a_report_counts_for_the_placement_before_its_step() -> None:
    window = opened()
    window.commit(6, OTHER)
    report(window, 4, [[0, 0, 0, 0, 1, 0], [1, 0, 0, 0, 0, 0]])
    report(window, 6, [[0, 0, 0, 0, 2, 0], [2, 0, 0, 0, 0, 0]])
    report(window, 8, [[0, 0, 0, 0, 4, 0], [4, 0, 0, 0, 0, 0]])
    _, tokens = window.load(8)
    assert tokens[:, 0].tolist() == [[1, 0, 0, 0], [2, 0, 0, 0], [0, 0, 4, 0]]
    assert tokens[:, 1].tolist() == [[1, 0, 0, 0], [2, 0, 0, 0], [0, 0, 0, 4]]
    assert window.rank_load()[0] == 4  # of one placement alone


def test_reports_that_cross_are_told_apart() -> None:
    window = opened()
    window.add(0, 4, matrix([[1, 1, 1], [1, 1, 1]]), 4)
    window.add(0, 8, matrix([[2, 2, 2], [2, 2, 2]]), 4)
    assert window.add(1, 4, matrix([[1, 1, 1], [1, 1, 1]]), 4) is not None
    assert window.load(8)[1].sum() == 12


def test_ranks_of_a_stage_without_experts_are_not_waited_for() -> None:
    stages = (*PLACES.stages, (2, 3))
    window = LoadWindow(100, 4)
    window.opened(ExpertPlaces(stages, PLACES.slots, PLACES.nodes, PLACES.layer_stage), START)
    report(window, 4, [[5, 1, 2, 3, 7, 0], [0, 0, 0, 1, 0, 9]])
    assert window.steps == 4


def test_the_window_slides() -> None:
    window = opened(size=10)
    for step in range(1, 9):
        report(window, 4 * step, [[step, 0, 0, 0, 0, 0], [0] * 6])
    assert window.steps == 12  # the oldest snapshot is kept while it is needed for the window
    assert window.load(8)[1][:, 0, 0].tolist() == [6, 7, 8]
    assert window.load(2)[1][:, 0, 0].tolist() == [13, 8]
    assert window.load(2)[0].tolist() == [8, 4]


def test_steps_without_tokens_are_no_snapshot() -> None:
    window = opened()
    report(window, 4, [[0] * 6, [0] * 6], steps=0)
    assert window.steps == 0
    assert window.load(8)[1].shape[0] == 0


def test_the_load_of_experts_outlives_an_epoch() -> None:
    window = opened()
    report(window, 4, [[1, 0, 0, 0, 0, 0], [0] * 6])
    window.add(0, 8, matrix([[9, 9, 9], [9, 9, 9]]), 4)
    window.closed()
    assert window.add(0, 8, matrix([[9, 9, 9], [9, 9, 9]]), 4) is None
    window.opened(PLACES, OTHER)
    report(window, 4, [[2, 0, 0, 0, 0, 0], [0] * 6])
    assert window.load(8)[1][:, 0, 0].tolist() == [1, 2]


def test_ranks_of_several_stages_report_their_own_layers() -> None:
    places = ExpertPlaces(((0, 2), (1, 3)), np.array([3, 3], np.int32), np.zeros(2, np.int32), (0, 1))
    window = LoadWindow(100, 4)
    window.opened(places, START)
    for rank, row in ((0, [1, 0, 0]), (2, [0, 1, 0]), (1, [0, 2, 0]), (3, [0, 0, 3])):
        window.add(rank, 4, matrix([row]), 4)
    assert window.load(1)[1].tolist() == [[[2, 0, 0, 0], [0, 5, 0, 0]]]


@pytest.mark.parametrize("rows", [[[1, 1]], [[1, 1], [1, 1]], [[1, 1, -1], [1, 1, 1]]])
def test_a_report_that_does_not_fit_is_refused(rows: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="rank 0 reports"):
        opened().add(0, 4, matrix(rows), 4)


def test_a_rank_without_slots_has_no_load() -> None:
    places = ExpertPlaces(((0, 1, 2),), np.array([4, 0, 2], np.int32), np.zeros(3, np.int32), (0, 0))
    window = LoadWindow(100, 4)
    window.opened(places, START)
    for rank, width in ((0, 4), (1, 0), (2, 2)):
        window.add(rank, 4, np.ones((2, width), dtype=np.int32), 4)
    assert window.rank_load()[1].tolist() == [[4, 0, 2], [4, 0, 2]]


def test_balance_is_the_mean_over_the_most() -> None:
    mean, most, balance = balance_of(np.array([[4.0, 0.0, 2.0], [0.0, 0.0, 0.0]]))
    assert (mean.tolist(), most.tolist(), balance.tolist()) == ([2.0, 0.0], [4.0, 0.0], [0.5, 1.0])


def test_a_window_of_many_short_reports_joins_neighbours_and_counts_the_same() -> None:
    window = opened(size=10_000)
    for step in range(12_000):
        report(window, step, [[1, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 2]], steps=1)
    assert len(window._snapshots) <= 2 * FINENESS + 1
    steps, tokens = window.load(8)
    assert 10_000 <= steps.sum() == window.steps <= 10_000 + 10_000 // FINENESS
    assert tokens.sum(axis=0).tolist() == [[steps.sum(), 0, 0, 0], [0, 3 * steps.sum(), 0, 0]]
    assert window.rank_load()[0] == steps.sum()


def test_reports_before_and_after_a_commit_may_be_joined_and_ranks_count_from_it() -> None:
    window = opened(size=10_000)
    window.commit(6, OTHER)
    report(window, 6, [[0, 0, 0, 0, 2, 0], [2, 0, 0, 0, 0, 0]])
    report(window, 8, [[0, 0, 0, 0, 4, 0], [4, 0, 0, 0, 0, 0]])
    steps, tokens = window.load(8)
    assert steps.tolist() == [8]
    assert tokens.tolist() == [[[2, 0, 4, 0], [2, 0, 0, 4]]]
    counted, ranks = window.rank_load()
    assert (counted, ranks.tolist()) == (4, [[0, 4], [4, 0]])
