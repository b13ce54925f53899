"""When a lost process may be started again."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from drumline.engine.core.restarts import FIRST_PAUSE_S, LONGEST_PAUSE_S, WINDOW_S, Restarts


def test_the_first_comes_at_once_and_pauses_double() -> None:
    restarts = Restarts(10)
    pauses: list[float | None] = []
    for _ in range(9):
        at = restarts.next_start(100.0)
        pauses.append(None if at is None else at - 100.0)
        restarts.started(100.0)
    assert pauses == [0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]


def test_after_a_process_that_has_proved_itself_the_next_comes_at_once() -> None:
    restarts = Restarts(10)
    for _ in range(4):
        restarts.started(100.0)
    restarts.proved()
    assert restarts.next_start(100.0) == 100.0
    restarts.started(100.0)
    assert restarts.next_start(100.0) == 100.0 + FIRST_PAUSE_S


def test_a_rank_that_proves_itself_is_still_bound_by_the_limit() -> None:
    restarts = Restarts(2)
    for _ in range(2):
        restarts.started(100.0)
        restarts.proved()
    assert restarts.next_start(101.0) is None


def test_there_are_no_more_than_the_limit_until_the_window_allows_one() -> None:
    restarts = Restarts(2)
    for now in (10.0, 20.0):
        restarts.started(now)
    assert restarts.next_start(30.0) is None
    assert restarts.allowed_at(30.0) == 10.0 + WINDOW_S
    assert restarts.next_start(10.0 + WINDOW_S) == 10.0 + WINDOW_S + FIRST_PAUSE_S
    assert restarts.next_start(20.0 + WINDOW_S) == 20.0 + WINDOW_S


def test_a_limit_of_nothing_allows_nothing_ever() -> None:
    restarts = Restarts(0)
    assert restarts.next_start(0.0) is None
    assert restarts.allowed_at(0.0) is None


def test_what_is_forgiven_does_not_count() -> None:
    restarts = Restarts(1)
    restarts.forgive()
    restarts.started(1.0)
    assert restarts.next_start(2.0) is None
    restarts.forgive()
    assert restarts.next_start(2.0) == 2.0


@given(st.lists(st.floats(0.0, 300.0), max_size=40), st.integers(0, 6))
def test_no_window_has_more_starts_than_the_limit(gaps: list[float], limit: int) -> None:
    restarts = Restarts(limit)
    now, starts = 0.0, []
    for gap in gaps:
        now += gap
        at = restarts.next_start(now)
        if at is None:
            continue
        assert now <= at <= now + LONGEST_PAUSE_S
        now = at
        restarts.started(now)
        starts.append(now)
        assert sum(one > now - WINDOW_S for one in starts) <= limit
