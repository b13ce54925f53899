"""A plan from the asking to the last slot, and every way in which it ends early."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from drumline.engine.core.balance.shuffle import Pace
from drumline.protocol.errors import InvalidConfig
from drumline.protocol.messages import NO_FETCHES, Shuffle

from .balance_fixtures import EPOCH, OTHER, PLACES, START, Driven, answer


def moving(**changes: object) -> Driven:
    """A plan of two layers has just been begun, on demand of caller 9."""
    driven = Driven(**changes)
    driven.planned(answer(driven.asked()))
    return driven


def staged(**changes: object) -> Driven:
    """All ranks have all of the first layer."""
    driven = moving(**changes)
    driven.plan_step()
    driven.plan_step()
    driven.staged()
    return driven


def test_a_layer_is_told_staged_committed_and_brought_home_and_the_next_follows() -> None:
    driven = moving()
    assert [one.rank for one in driven.sent] == [0, 1]
    assert (driven.stage.layer, driven.stage.parts, driven.stage.rounds.tolist()) == (0, 2, [0, 1])
    assert driven.stage.fetches.tolist() == [[0, 4, 0, 2]]
    assert driven.plan_step() == Shuffle(1, first=0, end=1)
    assert driven.plan_step() == Shuffle(1, first=1, end=2)
    assert driven.plan_step() is None  # nobody is staged
    driven.staged(0)
    assert driven.plan_step() is None
    driven.staged(1)
    assert (driven.balancer.placement == START).all()
    commit = driven.step
    assert driven.plan_step() == Shuffle(1, commit=True)
    assert driven.balancer.placement.tolist() == [OTHER[0].tolist(), START[1].tolist()]
    driven.done(commit, 0)
    assert driven.plan_step() is None  # rank 1 may still need what the staging buffers took the place of
    driven.done(commit, 1)
    assert driven.plan_step() == Shuffle(1, home_first=0, home_end=1)
    assert (driven.stage.layer, driven.stage.generation) == (1, 2)
    assert driven.stage.fetches.tolist() == [[1, 0, 1, 0]]  # slots are counted within the rank that they come from


def test_the_end_of_a_plan_is_answered_with_what_was_moved() -> None:
    driven = moving()
    for _ in range(2):
        driven.plan_step()
        driven.plan_step()
        driven.staged()
        commit = driven.step
        driven.plan_step()
        assert driven.answers == []
        driven.done(commit)
        driven.plan_step()
    ((callers, report),) = driven.answers
    assert callers == (9,)
    assert (report.outcome, report.reason, report.slots_moved, report.layers) == ("moved", "planned", 2, 2)
    assert (report.policy, report.bytes_moved) == ("incremental", 400)  # as the ranks said
    assert report.moves.tolist() == [[0, 4, 0, 2], [1, 0, 0, 3]]
    assert (driven.balancer.placement == OTHER).all()
    status = driven.balancer.status()
    assert (status.state, status.plans, status.slots_moved, status.layers_left) == ("idle", 1, 2, 0)


def test_a_report_says_what_policy_made_the_plan() -> None:
    driven = Driven(policy="global")
    driven.planned(answer(driven.asked(), START, NO_FETCHES))
    driven.balancer.rebalance(8, START, 0.0)
    driven.collect()
    driven.planned(answer(driven.requests[-1], START, NO_FETCHES))
    assert [report.policy for _, report in driven.answers] == ["global", "given"]


def test_a_plan_without_moves_is_answered_at_once() -> None:
    driven = Driven()
    driven.planned(answer(driven.asked(), START, NO_FETCHES))
    assert [report.outcome for _, report in driven.answers] == ["unchanged"]
    assert driven.plan_step() is None


def test_dummy_steps_are_made_on_demand_alone() -> None:
    driven = moving()
    assert driven.balancer.demands
    driven.plan_step()
    driven.plan_step()
    assert not driven.balancer.demands  # nothing to say until ranks are staged
    due = Driven()
    due.done(0, load=[[9, 1, 1, 1, 1, 1]] * 2, steps=40)
    due.planned(answer(due.requests[0]))
    assert due.plan_step() is not None
    assert not due.balancer.demands


def test_a_plan_is_due_after_a_quarter_of_the_interval_and_then_after_each() -> None:
    driven = Driven()
    driven.done(0, load=[[8, 0, 0, 0, 4, 0]] * 2, steps=9)
    assert driven.requests == []
    driven.done(1, load=[[8, 0, 0, 0, 4, 0]] * 2, steps=1)
    (request,) = driven.requests
    assert request.snapshots().sum(axis=0).tolist() == [[24.0, 0.0, 0.0, 0.0]] * 2
    driven.planned(answer(request, START, NO_FETCHES))
    driven.done(2, load=[[8, 0, 0, 0, 4, 0]] * 2, steps=39)
    assert len(driven.requests) == 1
    driven.done(3, load=[[8, 0, 0, 0, 4, 0]] * 2, steps=1)
    assert len(driven.requests) == 2


def test_a_fault_voids_what_is_planned_and_the_answer_comes_to_nobody() -> None:
    driven = Driven()
    request = driven.asked()
    driven.balancer.closed("rank 1 is lost", 1.0)
    driven.collect()
    assert [(callers, report.outcome) for callers, report in driven.answers] == [((9,), "cancelled")]
    driven.planned(answer(request))
    assert driven.sent == []


def test_a_fault_in_the_middle_tells_what_had_been_committed() -> None:
    driven = staged()
    driven.plan_step()
    driven.balancer.closed("rank 1 is lost", 1.0)
    driven.collect()
    ((_, report),) = driven.answers
    assert (report.outcome, report.reason, report.layers) == ("cancelled", "rank 1 is lost", 1)
    assert report.moves.tolist() == [[0, 4, 0, 2]]
    assert driven.plan_step() is None
    assert driven.staged() == [False, False]


@pytest.mark.parametrize("started", [0, 1, 2])
def test_a_later_rebalance_drops_the_layer_that_is_not_committed(started: int) -> None:
    driven = moving()
    for _ in range(started):
        driven.plan_step()
    driven.balancer.rebalance(10, None, 1.0)
    driven.collect()
    assert driven.cancels == [0, 1]
    assert driven.plan_step() is None
    assert len(driven.requests) == 1
    driven.staged(0, dropped=True)
    assert driven.answers == []
    driven.staged(1, dropped=True)
    ((callers, report),) = driven.answers
    assert (callers, report.outcome, report.slots_moved) == ((9,), "cancelled", 0)
    assert (driven.balancer.placement == START).all()
    assert len(driven.requests) == 2


def test_a_later_rebalance_finishes_a_committed_layer_first() -> None:
    driven = staged()
    commit = driven.step
    driven.plan_step()
    driven.balancer.rebalance(10, None, 1.0)
    driven.collect()
    assert (driven.cancels, len(driven.requests)) == ([], 1)
    driven.done(commit)
    assert driven.balancer.demands
    assert driven.plan_step() == Shuffle(1, home_first=0, home_end=1)
    assert [report.outcome for _, report in driven.answers] == ["cancelled"]
    assert (driven.requests[1].placement == [OTHER[0], START[1]]).all()


def test_one_that_was_staged_when_it_was_cancelled_says_so_first() -> None:
    driven = moving()
    driven.plan_step()
    driven.plan_step()
    driven.balancer.rebalance(10, None, 1.0)
    driven.collect()
    assert driven.staged(0) == [True]
    assert driven.answers == []
    driven.staged(0, 1, dropped=True)
    assert len(driven.answers) == 1


def test_ranks_that_are_late_end_the_plan_and_then_are_to_blame() -> None:
    driven = moving(stage_deadline_s=5.0)
    driven.plan_step(now=1.0)
    assert driven.balancer.due_at is None  # parts wait for steps, not for ranks
    driven.plan_step(now=2.0)
    driven.staged(0)
    assert driven.balancer.due_at == 7.0
    assert driven.balancer.tick(6.9) is None
    assert driven.balancer.tick(7.0) is None
    driven.collect()
    assert driven.cancels == [0, 1]
    driven.staged(0, dropped=True)
    late = driven.balancer.tick(12.0)
    assert late is not None
    assert late.ranks == (1,)


def test_a_plan_that_does_not_come_is_answered() -> None:
    driven = Driven(plan_deadline_s=4.0)
    driven.asked(now=1.0)
    assert driven.balancer.due_at == 5.0
    driven.balancer.tick(5.0)
    driven.collect()
    assert [report.outcome for _, report in driven.answers] == ["failed"]
    assert driven.asked(now=6.0).number == 2


def test_other_ranks_are_planned_for_once_they_have_settled() -> None:
    driven = Driven()
    driven.balancer.closed("a rank was lost", 1.0)
    driven.balancer.opened(8, PLACES, START, frozenset({"a", "c"}), 1.0)
    assert driven.balancer.due_at == 3.0
    driven.balancer.tick(3.0)
    driven.collect()
    assert len(driven.requests) == 1


def test_tokens_of_a_slot_are_those_of_its_new_expert_after_the_commit() -> None:
    driven = staged()
    commit = driven.step
    assert driven.plan_step() == Shuffle(1, commit=True)
    for step in (commit, commit + 1):
        driven.done(step, load=[[0, 0, 0, 0, 7, 0], [0, 0, 0, 0, 0, 0]], steps=1)
    tokens = driven.balancer.expert_load(1).tokens.reshape(2, 2, 4)
    assert tokens[:, 0].tolist() == [[7, 0, 0, 0], [0, 0, 7, 0]]


def test_a_given_placement_is_passed_on_and_checked() -> None:
    driven = Driven()
    driven.balancer.rebalance(9, OTHER, 0.0)
    driven.collect()
    assert (driven.requests[0].target == OTHER).all()
    for wrong, found in ((OTHER[:, :5], "(2, 5)"), (OTHER + 2, "2 to 5"), (np.zeros_like(OTHER), "expert 1 of MoE")):
        with pytest.raises(InvalidConfig, match="plan") as caught:
            driven.balancer.rebalance(9, wrong, 0.0)
        assert found in str(caught.value)
    driven.planned(answer(driven.requests[0]))
    driven.balancer.closed("a rank is lost", 0.0)
    driven.collect()
    assert [(report.policy, report.outcome) for _, report in driven.answers] == [("given", "cancelled")]


def test_a_given_placement_may_put_no_second_copy_on_a_rank_but_where_one_stands_or_nothing_else_is_left() -> None:
    twice = START.copy()
    twice[1, 2] = 1  # rank 0: 0, 1, 1
    twice[1, 5] = 2
    driven = Driven()
    with pytest.raises(InvalidConfig, match="several copies of expert 1 of MoE layer 1 on ep rank 0"):
        driven.balancer.rebalance(9, twice, 0.0)
    driven.balancer.opened(EPOCH + 1, PLACES, twice, frozenset({"a", "b"}), 0.0)
    driven.balancer.rebalance(9, twice, 0.0)
    wide = replace(PLACES, slots=np.array([5, 1], np.int32))
    driven.balancer.opened(EPOCH + 2, wide, START, frozenset({"a", "b"}), 0.0)
    driven.balancer.rebalance(9, np.array([[0, 1, 2, 3, 2, 1]] * 2, dtype=np.int32), 0.0)


def test_words_that_nobody_waits_for_are_refused() -> None:
    driven = moving()
    assert driven.staged(0, generation=5) == [False]
    driven.plan_step()
    driven.plan_step()
    assert driven.staged(0, 0) == [True, False]
    assert driven.staged(1, dropped=True) == [False]


def test_the_pace_keeps_to_the_bytes_of_a_step() -> None:
    assert (Pace(100, 50, 1.0).parts, Pace(100, 50, 1.0).parts_per_step) == (2, 1)
    assert (Pace(100, 99, 1.0).parts, Pace(100, 99, 1.0).parts_per_step) == (2, 1)
    assert (Pace(100, 350, 1.0).parts, Pace(100, 350, 1.0).parts_per_step) == (1, 3)
    assert (Pace(100, 1, 1.0).parts, Pace(100, 1, 1.0).rounds_per_step) == (100, 1)
    assert (Pace(100, 9000, 1.0).parts_per_step, Pace(100, 9000, 1.0).rounds_per_step) == (8, 90)
