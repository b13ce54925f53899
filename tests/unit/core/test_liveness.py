"""Step deadlines, and who is blamed for a step that does not end."""

from __future__ import annotations

import pytest

from drumline.engine.core.liveness import CALL_LEASE_S, LEAST_DEADLINE_S, GroupClock, furthest_behind
from drumline.engine.core.members import RankRecord


def run_steps(clock: GroupClock, count: int, took_s: float, tokens: int = 1, ranks: tuple[int, ...] = (0, 1)) -> float:
    """``count`` steps one after another. Returns the time at the end."""
    now = 0.0
    for step in range(count):
        for rank in ranks:
            clock.sent(rank, step, tokens, now)
        now += took_s
        for rank in ranks:
            clock.done(rank, step, now)
    return now


def test_without_recent_steps_a_step_gets_two_seconds() -> None:
    clock = GroupClock(None)
    clock.sent(0, 0, 1000, 1.0)
    assert clock.due_at() == 1.0 + LEAST_DEADLINE_S
    assert clock.overdue(2.9) is None
    overdue = clock.overdue(3.0)
    assert overdue is not None
    assert (overdue.step, overdue.ranks, overdue.limit_s) == (0, (0,), LEAST_DEADLINE_S)


def test_a_step_is_not_overdue_while_a_rank_that_owes_it_holds_a_lease() -> None:
    clock = GroupClock(0.5)
    for rank in (0, 1):
        clock.sent(rank, 7, 1, 0.0)
    clock.lease(0, 7, 30.0, 1.0)
    assert clock.due_at() == 31.0
    assert clock.overdue(30.9) is None
    overdue = clock.overdue(31.0)
    assert overdue is not None
    assert overdue.ranks == (0, 1)
    clock.done(0, 7, 2.0)
    assert clock.overdue(2.1) is not None  # rank 1 asked for nothing


def test_a_lease_is_over_with_the_reply_to_its_step() -> None:
    clock = GroupClock(0.5)
    clock.sent(0, 7, 1, 0.0)
    clock.lease(0, 7, 30.0, 0.1)
    clock.done(0, 7, 5.0)
    clock.sent(0, 8, 1, 5.0)
    assert clock.overdue(5.6) is not None


def test_a_lease_for_a_later_step_outlives_replies_to_earlier_ones() -> None:
    clock = GroupClock(0.5)
    clock.sent(0, 7, 1, 0.0)
    clock.sent(0, 8, 1, 0.0)
    clock.lease(0, 8, 30.0, 0.1)
    clock.done(0, 7, 0.2)
    assert clock.overdue(29.0) is None


def test_a_rank_that_gives_its_lease_back_has_a_moment_for_its_reply() -> None:
    clock = GroupClock(0.5)
    clock.sent(0, 7, 1, 0.0)
    clock.lease(0, 7, 30.0, 0.1)
    clock.lease(0, 7, 0.0, 10.0)
    assert clock.overdue(11.9) is None
    assert clock.overdue(12.0) is not None


def test_who_leaves_may_take_what_the_steps_in_flight_may_take() -> None:
    clock = GroupClock(None)
    assert clock.leave_s(0.0) == LEAST_DEADLINE_S
    now = run_steps(clock, 8, 1.0)
    clock.sent(0, 99, 1, now)
    assert clock.leave_s(now) == pytest.approx(10.0)
    clock.lease(0, 99, 40.0, now)
    assert clock.leave_s(now + 1.0) == pytest.approx(39.0)


def test_quick_steps_get_two_seconds() -> None:
    clock = GroupClock(None)
    now = run_steps(clock, 8, 0.01)
    clock.sent(0, 99, 1, now)
    assert clock.overdue(now + 1.9) is None
    assert clock.overdue(now + 2.1) is not None


def test_slow_steps_get_ten_times_their_median() -> None:
    clock = GroupClock(None)
    now = run_steps(clock, 8, 1.0)
    clock.sent(0, 99, 1, now)
    assert clock.overdue(now + 9.9) is None
    assert clock.overdue(now + 10.1) is not None


def test_a_step_that_fills_a_pipeline_gets_the_time_of_all_its_stages() -> None:
    clock = GroupClock(None, stages=4)
    now = run_steps(clock, 8, 1.0)
    clock.sent(0, 99, 1, now)
    assert clock.overdue(now + 39.9) is None
    assert clock.overdue(now + 40.1) is not None


def test_a_prefill_gets_time_for_its_tokens() -> None:
    clock = GroupClock(None)
    now = run_steps(clock, 8, 0.05, tokens=4)
    clock.sent(0, 99, 400, now)
    assert clock.overdue(now + 49.0) is None
    assert clock.overdue(now + 51.0) is not None


def test_a_deadline_that_was_set_is_kept() -> None:
    clock = GroupClock(0.5)
    now = run_steps(clock, 8, 1.0)
    clock.sent(0, 99, 1000, now)
    assert clock.overdue(now + 0.4) is None
    assert clock.overdue(now + 0.6) is not None


def test_a_step_behind_another_counts_from_when_it_could_begin() -> None:
    clock = GroupClock(0.5)
    now = run_steps(clock, 8, 0.1)
    clock.sent(0, 98, 1, now)
    clock.sent(0, 99, 1, now)
    clock.done(0, 98, now + 0.4)
    assert clock.overdue(now + 0.8) is None
    assert clock.age(0, now + 0.8) == pytest.approx(0.4)
    assert clock.overdue(now + 1.0) is not None


def test_a_step_is_complete_with_its_last_reply() -> None:
    clock = GroupClock(None)
    for rank in (0, 1):
        clock.sent(rank, 5, 1, 0.0)
    assert clock.oldest_step == 5
    assert not clock.done(0, 5, 0.1)
    assert clock.age(0, 0.1) == 0.0
    assert clock.done(1, 5, 0.2)
    assert clock.oldest_step == -1


def test_only_the_oldest_step_of_a_rank_is_owed() -> None:
    clock = GroupClock(None)
    for step in (5, 6):
        clock.sent(0, step, 1, 0.0)
    assert clock.owes(0, 5)
    assert not clock.owes(0, 6)
    assert not clock.owes(1, 5)
    clock.done(0, 5, 0.1)
    assert not clock.owes(0, 5)
    assert clock.owes(0, 6)


def test_an_idle_group_is_never_overdue() -> None:
    clock = GroupClock(0.1)
    now = run_steps(clock, 9, 0.01)
    assert clock.overdue(now + 1e6) is None


def test_a_new_epoch_forgets_what_was_in_flight_but_not_how_long_steps_take() -> None:
    clock = GroupClock(None)
    now = run_steps(clock, 9, 1.0)
    clock.sent(0, 99, 1, now)
    clock.lease(0, 99, 60.0, now)
    clock.forget()
    assert clock.due_at() is None
    clock.sent(0, 0, 1, now)
    assert clock.overdue(now + 9.9) is None
    assert clock.overdue(now + 10.1) is not None


def test_the_time_of_a_call_is_not_that_of_the_steps_behind_it() -> None:
    clock = GroupClock(0.5)
    now = run_steps(clock, 8, 0.1)
    for rank in (0, 1):
        clock.called(rank, 70 + rank, 5.0, now)
    for rank in (0, 1):
        clock.sent(rank, 99, 1, now)
    clock.answered(70, now + 0.1)
    assert clock.overdue(now + 4.0) is None
    assert clock.age(0, now + 4.0) == 0.0
    clock.answered(71, now + 4.0)
    assert clock.age(0, now + 4.3) == pytest.approx(0.3)
    assert clock.overdue(now + 4.4) is None
    overdue = clock.overdue(now + 4.6)
    assert overdue is not None
    assert overdue.waited_s == pytest.approx(0.6)


def test_a_call_gives_no_time_to_the_steps_ahead_of_it() -> None:
    clock = GroupClock(0.5)
    now = run_steps(clock, 8, 0.1)
    clock.sent(0, 99, 1, now)
    clock.called(0, 70, 5.0, now + 0.1)
    clock.sent(0, 100, 1, now + 0.1)
    overdue = clock.overdue(now + 0.6)
    assert overdue is not None
    assert overdue.step == 99


def test_the_lease_of_a_call_ends() -> None:
    clock = GroupClock(0.5)
    now = run_steps(clock, 8, 0.1)
    clock.called(0, 70, 1.0, now)
    clock.sent(0, 99, 1, now)
    assert clock.overdue(now + CALL_LEASE_S + 0.4) is None
    assert clock.overdue(now + CALL_LEASE_S + 0.6) is not None
    clock.answered(70, now + 2 * CALL_LEASE_S)
    assert clock.overdue(now + CALL_LEASE_S + 0.6) is not None


def test_a_long_timeout_is_a_long_lease() -> None:
    clock = GroupClock(0.5)
    now = run_steps(clock, 8, 0.1)
    clock.called(0, 70, 10 * CALL_LEASE_S, now)
    clock.sent(0, 99, 1, now)
    assert clock.overdue(now + 10 * CALL_LEASE_S) is None
    assert clock.overdue(now + 10 * CALL_LEASE_S + 0.6) is not None


def test_a_call_leaves_the_time_that_steps_take_as_it_was() -> None:
    clock = GroupClock(None)
    now = run_steps(clock, 8, 0.01)
    for step in range(100, 164):
        clock.called(0, step, 5.0, now)
        clock.sent(0, step, 1, now)
        clock.answered(step, now + 5.0)
        clock.done(0, step, now + 5.01)
        now += 5.01
    assert clock.limit_s(1) == LEAST_DEADLINE_S


def test_a_step_that_is_done_means_that_the_call_ahead_of_it_is() -> None:
    clock = GroupClock(0.5)
    now = run_steps(clock, 8, 0.1)
    clock.called(0, 70, 5.0, now)
    clock.sent(0, 99, 1, now)
    clock.done(0, 99, now + 0.1)
    clock.sent(0, 100, 1, now + 0.1)
    assert clock.overdue(now + 0.7) is not None
    clock.called(0, 71, 5.0, now + 0.7)
    clock.forget()
    clock.sent(0, 0, 1, now + 0.7)
    assert clock.age(0, now + 1.0) == pytest.approx(0.3)


def test_who_is_furthest_behind_is_blamed_and_who_waits_inside_is_not() -> None:
    records = {rank: RankRecord(rank, 0, step=7, collective=3, inside=True, heard_at=5.0) for rank in range(4)}
    records[2].inside = False
    assert furthest_behind(records, records) == 2
    records[3].collective = 2
    assert furthest_behind(records, records) == 3
    records[1].step = 6
    assert furthest_behind(records, records) == 1
    assert furthest_behind((0, 2), records) == 2
    silent = {rank: RankRecord(rank, 0, heard_at=float(9 - rank)) for rank in range(3)}
    assert furthest_behind(silent, silent) == 2
