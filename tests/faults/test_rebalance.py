"""Whatever ends while experts move: no stream notices, no layer is mixed, and the next plan is carried out.
Other layouts: ``python -m tests.faults.soak --only shuffles``."""

from __future__ import annotations

from tests.faults.shuffles import Shuffles, balanced

ASLEEP_S = 6.0


async def test_a_rank_may_be_killed_in_any_phase(mark: str) -> None:
    async with Shuffles.of(balanced("dp2-ep")) as shuffles:
        await shuffles.kill_while_planning(1)
        await shuffles.kill_at("staging", 0)
        await shuffles.kill_when_half_are_staged(1, of_those=False)
        await shuffles.kill_when_half_are_staged(1, of_those=True)
        await shuffles.kill_at("commit", 1)
        await shuffles.kill_after_the_commit(0)
        assert shuffles.done == ["planning", "staging", "half staged", "half staged", "commit", "after the commit"]


async def test_coordinator_and_planner_may_be_killed_and_a_rank_stopped(mark: str) -> None:
    async with Shuffles.of(balanced("dp2-ep")) as shuffles:
        await shuffles.kill_planner()
        await shuffles.kill_coordinator()
        await shuffles.stop_at_staging(1, ASLEEP_S)
        assert shuffles.done == ["planner", "coordinator", "stopped"]
