"""One misfortune at one moment of a shuffle, and what must come of it."""

from __future__ import annotations

from collections import Counter

import pytest

from drumline.engine.core.balance.config import BalanceConfig
from drumline.protocol.layout import Layout
from tests.simulation.cluster.day import Day
from tests.simulation.cluster.faults import MOVING_POINTS, RankFault
from tests.simulation.cluster.schedule import OtherFault, Schedule
from tests.simulation.cluster.test_recovery import longest_pause, plain_shape, streams

FOUR = Layout(4, enable_expert_parallel=True)
STAGES = Layout(3, 2, 1, enable_expert_parallel=True)
ASKED_AT = 8.5


def moving_day(layout: Layout, *faults: RankFault | OtherFault, **changed: object) -> Day:
    """Somebody asks for a placement while six streams run, again while a rank that was killed is away, and once more
    when it is back."""
    balance = BalanceConfig(step_interval=1 << 30, load_interval=4, bytes_per_step=100, expert_bytes=90)
    stages = (0, 0, 1, 1) if layout.pipeline_parallel_size > 1 else (0, 0, 0, 0)
    shape = plain_shape(layout, balance=balance, redundant=2, moe_layer_stage=stages, **changed)
    others = [OtherFault("given_rebalance", ASKED_AT + late) for late in (0.0, 1.5, 20.0)]
    ranks = [fault for fault in faults if isinstance(fault, RankFault)]
    others += [fault for fault in faults if isinstance(fault, OtherFault)]
    return Day(Schedule(11, shape, streams(), ranks, others))


def outcomes(seen: Counter[str]) -> dict[str, int]:
    """What became of the plans that somebody asked for."""
    return {name: seen["asked_" + name] for name in ("moved", "cancelled", "failed")}


@pytest.mark.parametrize("layout", [FOUR, STAGES], ids=("dp4", "dp3-pp2"))
@pytest.mark.parametrize("point", MOVING_POINTS)
def test_a_rank_killed_at_any_moment_of_a_shuffle_ends_it_and_the_next_plan_succeeds(
    point: str, layout: Layout
) -> None:
    day = moving_day(layout, RankFault("kill", layout.num_ranks - 2, ASKED_AT - 1.0, point))
    seen = day.run()
    assert seen["fault_kill_" + point] == 1
    assert seen["end_length"] == 6
    assert seen["rebalances"] == 3
    assert outcomes(seen) == {"moved": 2, "cancelled": 1, "failed": 0}
    assert longest_pause(day) < 1.0


@pytest.mark.parametrize("point", MOVING_POINTS)
def test_a_coordinator_killed_at_any_moment_of_a_shuffle_leaves_the_experts_where_they_are_known(point: str) -> None:
    day = moving_day(FOUR, RankFault("coordinator", 1, ASKED_AT - 1.0, point))
    seen = day.run()
    assert seen["terms"] == 2
    assert seen["spawned"] == 4
    assert seen["end_length"] == 6
    assert outcomes(seen) == {"moved": 2, "cancelled": 0, "failed": 0}


def test_whole_copies_in_staging_buffers_spare_the_checkpoint() -> None:
    seen = moving_day(FOUR, RankFault("kill", 3, ASKED_AT - 1.0, "home")).run()
    assert seen["left_with_spare"] >= 1


def test_experts_that_do_not_arrive_are_given_up_and_cost_one_rank_at_most() -> None:
    """Its peers wait as long as the rank that is cut off."""
    day = moving_day(FOUR, OtherFault("stuck_link", ASKED_AT - 0.1, 2, 100.0))
    seen = day.run()
    assert seen["stages_cancelled"] >= 4
    assert seen["killed"] == 1
    assert seen["end_length"] == 6


def test_a_slow_link_delays_a_plan_and_nothing_else() -> None:
    day = moving_day(FOUR, OtherFault("stuck_link", ASKED_AT - 0.1, 2, 2.0))
    seen = day.run()
    assert outcomes(seen) == {"moved": 3, "cancelled": 0, "failed": 0}
    assert seen["killed"] == 0
    assert longest_pause(day) < 0.5
