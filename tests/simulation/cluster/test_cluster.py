"""500 random days of a whole engine; on each, nothing is lost, repeated or wrong, and everything comes to rest."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings

from tests.simulation.cluster.day import run_schedule
from tests.simulation.cluster.schedule import Schedule, make_schedule
from tests.simulation.cluster.strategies import schedules

BATCH = 50
BATCHES = 10


@pytest.mark.parametrize("batch", range(BATCHES))
def test_random_days_end_with_every_request_whole(batch: int) -> None:
    seen: Counter[str] = Counter()
    for seed in range(batch * BATCH, (batch + 1) * BATCH):
        seen.update(run_schedule(make_schedule(seed)))
    missing = [name for name in _EVERY_BATCH if seen[name] == 0]
    assert missing == [], f"a batch that meets none of these proves nothing: {seen}"


_EVERY_BATCH = (
    "end_stop",
    "end_length",
    "resume",
    "spawned",
    "killed",
    "fault_kill",
    "fault_stop",
    "fault_coordinator",
    "replica_steps",
    "event_recovered",
)


@settings(max_examples=40, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(schedules())
def test_any_schedule_that_can_be_drawn_ends_whole(schedule: Schedule) -> None:
    run_schedule(schedule)
