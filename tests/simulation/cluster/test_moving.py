"""1,000 random plans for the experts, with random cancellations, deaths and stops: no layer is ever mixed, nothing is
lost, and the coordinator knows what stands where."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.simulation.cluster.day import run_schedule
from tests.simulation.cluster.moving import make_moving_schedule

BATCHES = 5
PLANS = 200
"""Begun in each batch."""
MOST_DAYS = 100


@pytest.mark.parametrize("batch", range(BATCHES))
def test_random_plans_move_experts_and_never_leave_a_layer_mixed(batch: int) -> None:
    seen: Counter[str] = Counter()
    first = batch * MOST_DAYS
    for seed in range(first, first + MOST_DAYS):
        seen.update(run_schedule(make_moving_schedule(seed)))
        if seen["plans_begun"] >= PLANS:
            break
    missing = [name for name in _EVERY_BATCH if seen[name] == 0]
    assert missing == [], f"a batch that meets none of these proves nothing: {seen}"
    assert seen["plans_begun"] >= PLANS


_EVERY_BATCH = (
    "commits_of_layers",
    "stages_cancelled",
    "left_with_spare",
    "plans_moved",
    "plans_cancelled",
    "plans_failed",
    "plans_unchanged",
    "plans_never",
    "rebalances",
    "load_reports",
    "fault_kill",
    "fault_stop",
    "fault_coordinator",
    "event_joined",
    "end_length",
)
