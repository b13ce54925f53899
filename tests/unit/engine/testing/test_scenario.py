"""Scenarios as data: what is refused, what is drawn."""

from __future__ import annotations

import itertools

import msgspec
import pytest

from drumline.engine.testing.scenario import (
    FROM_INSIDE,
    MESSAGE_KINDS,
    OTHER_KINDS,
    RANK_KINDS,
    Chances,
    Scenario,
    ScheduledFault,
    random_scenario,
)

BUSY = Chances(every_s=1.0)
MOVING = Chances(every_s=1.0, experts_move=True)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"kind": "kil", "rank": 0}, "kind"),
        ({"kind": "kill", "rank": 0, "point": "lunch"}, "point"),
        ({"kind": "kill"}, "rank"),
        ({"kind": "partition"}, "rank"),
        ({"kind": "coordinator", "at_s": -1.0}, "at_s"),
        ({"kind": "drop", "probability": 1.5}, "probability"),
    ],
)
def test_a_fault_that_cannot_be_is_refused_by_name(fields: dict[str, object], named: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=f"^{named}"):
        msgspec.convert(fields, ScheduledFault)


def test_a_scenario_survives_json() -> None:
    drawn = random_scenario(3, 4, 200.0, BUSY)
    assert msgspec.json.decode(msgspec.json.encode(drawn), type=Scenario) == drawn


def test_the_same_seed_draws_the_same_faults_and_another_seed_others() -> None:
    assert random_scenario(3, 4, 100.0, BUSY) == random_scenario(3, 4, 100.0, BUSY)
    assert random_scenario(3, 4, 100.0, BUSY).faults != random_scenario(4, 4, 100.0, BUSY).faults


def test_in_the_long_run_every_kind_is_drawn_and_about_as_often_as_asked() -> None:
    faults = random_scenario(1, 4, 2000.0, MOVING).faults
    assert {fault.kind for fault in faults} == {*RANK_KINDS, *MESSAGE_KINDS, *OTHER_KINDS}
    assert {fault.rank for fault in faults if fault.kind == "kill"} == {0, 1, 2, 3}
    assert 1800 < len(faults) < 3000
    assert all(0 < fault.at_s < 2001 for fault in faults)


def test_no_request_is_near_two_faults_from_inside() -> None:
    moments = [fault.at_s for fault in random_scenario(1, 4, 2000.0, BUSY).faults if fault.kind in FROM_INSIDE]
    assert len(moments) > 10
    assert all(later - earlier >= 60.0 for earlier, later in itertools.pairwise(moments))


@pytest.mark.parametrize("point", ["loading", "joining", "leave", "regroup"])
def test_a_point_in_a_regroup_comes_with_the_kill_that_leads_there(point: str) -> None:
    faults = random_scenario(1, 4, 2000.0, BUSY).faults
    at_point = [number for number, fault in enumerate(faults) if fault.point == point]
    assert at_point
    for number in at_point:
        trigger = faults[number + 1]
        assert (trigger.kind, trigger.point) == ("kill", "now")
        assert (trigger.rank == faults[number].rank) == (point in ("loading", "joining"))


def test_only_where_experts_move_does_something_befall_what_moves_them() -> None:
    moving, resting = (random_scenario(1, 4, 2000.0, chances).faults for chances in (MOVING, BUSY))
    assert {"staging", "commit"} <= {fault.point for fault in moving}
    assert not {"staging", "commit"} & {fault.point for fault in resting}
    assert not any(fault.kind == "planner" for fault in resting)


def test_one_rank_alone_has_nobody_to_regroup_with() -> None:
    assert not {"leave", "regroup"} & {fault.point for fault in random_scenario(1, 1, 2000.0, BUSY).faults}
