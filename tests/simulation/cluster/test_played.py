"""Scenarios for real processes on the virtual clock."""

from __future__ import annotations

import pytest

from drumline.engine.testing.scenario import Chances, Scenario, random_scenario
from drumline.protocol.layout import Layout
from tests.scenarios import ASLEEP, FOUR_AT_ONCE
from tests.simulation.cluster.day import Day
from tests.simulation.cluster.played import day_of
from tests.simulation.cluster.test_recovery import plain_shape, streams

BEGINS = 6.5
"""Ranks have loaded after 5 s, and the streams are in full flow."""
TWO = Layout(2, enable_expert_parallel=True)


@pytest.mark.parametrize("scenario", [FOUR_AT_ONCE, ASLEEP], ids=lambda scenario: scenario.name)
def test_what_real_processes_go_through_is_gone_through_here(scenario: Scenario) -> None:
    day = Day(day_of(scenario, plain_shape(TWO), streams(), BEGINS))
    happened = day.run()
    assert happened["end_length"] == 6
    if scenario is ASLEEP:
        assert happened["fault_stop_now"] == 1
    else:
        assert happened["fault_kill_decode"] == 1
        assert happened["message_duplicate"] == 2


@pytest.mark.parametrize("seed", range(4))
def test_random_scenarios_end_with_every_request_whole(seed: int) -> None:
    shape = plain_shape(Layout(4, enable_expert_parallel=True), restart_limit=60)
    scenario = random_scenario(seed, 4, 20.0, Chances(every_s=1.0))
    day = Day(day_of(scenario, shape, streams(tokens=190), BEGINS))
    happened = day.run()
    assert happened["end_length"] == 6
    assert day.cluster.faults.caused > 5
