"""Scenarios that are played both on real processes and on the simulator."""

from __future__ import annotations

from drumline.engine.testing.scenario import Scenario, ScheduledFault

FOUR_AT_ONCE = Scenario(
    "four at once",
    (
        ScheduledFault("duplicate", rank=0, messages=("StepDone",), times=2),
        ScheduledFault("kill", rank=1, point="decode"),
        ScheduledFault("partition", 0.1, rank=0, seconds=0.1),
        ScheduledFault("coordinator", 0.3),
    ),
)
ASLEEP = Scenario("asleep", (ScheduledFault("stop", rank=0, seconds=60.0),))
