"""Who makes plans for a simulated coordinator: late, wrong or never, when the schedule says so."""

from __future__ import annotations

import random
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from drumline.engine.core.balance.plan import PlacementPlan, PlanRequest
from drumline.engine.core.balance.policies import make_plan
from drumline.engine.core.decisions import Rebalanced
from drumline.protocol.errors import InvalidConfig
from drumline.protocol.messages import I32Matrix, RebalanceReport
from tests.simulation.cluster.random_plans import random_placement, random_plan
from tests.simulation.worker import RuleBrokenError

if TYPE_CHECKING:
    from tests.simulation.cluster.host import Host

TROUBLES = ("never", "error", "late")
OUTCOMES = ("moved", "unchanged", "cancelled", "failed")


class SimPlanner:
    """Of one coordinator. ``unanswered``: callers of rebalances that have heard nothing yet, with the placement that
    they gave, if they did."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._clock = host.clock
        self._chance = random.Random(host.clock.random.random())
        self._callers = 0
        self._newest: PlacementPlan | None = None
        self.unanswered: dict[int, I32Matrix | None] = {}

    # -------------------------------------------------------------------- plans

    def plan(self, request: PlanRequest) -> None:
        """Make a plan, elsewhere."""
        self._clock.seen["plans_wanted"] += 1
        for process in list(self._host.cluster.supervisor.processes.values()):
            self._host.cluster.faults.point(process, "planning")
        shape = self._host.cluster.shape
        trouble = self._chance.choice(TROUBLES) if self._chance.random() < shape.plan_trouble else ""
        if trouble == "never":
            self._clock.seen["plans_never"] += 1
            return
        if trouble == "error":
            answer = PlacementPlan(request.number, request.placement, error="the planner has died")
        else:
            answer = make_plan(request, lambda: 0.0) if shape.real_plans else random_plan(request, self._chance)
        late = 30.0 if trouble == "late" else 1.0
        self._clock.soon(shape.plan_s * late, partial(self._host.act, partial(self._planned, answer)))

    def _planned(self, plan: PlacementPlan) -> None:
        host, balance = self._host, self._host.coordination.balance
        if balance is None:
            raise RuleBrokenError("a plan was asked for where experts stay")
        balance.planned(plan, host.now)
        run = balance.balancer._run
        if run is not None and run.plan is plan:
            self._newest = plan
            self._clock.seen["plans_begun"] += 1
        host.coordination.balanced(host.now)
        host.changed(host.now)

    # -------------------------------------------------------------------- rebalances

    def rebalance(self, given: bool) -> None:
        """Somebody asks for one, with a placement of its own or without."""
        self._host.act(partial(self._rebalance, given))

    def _rebalance(self, given: bool) -> None:
        host, balance = self._host, self._host.coordination.balance
        if balance is None:
            return
        self._callers += 1
        self._clock.seen["rebalances"] += 1
        self._clock.note(f"caller {self._callers} asks for a rebalance, {given=}")
        placement = self._given() if given else None
        self.unanswered[self._callers] = placement
        try:
            balance.rebalance(self._callers, placement, host.now)
        except InvalidConfig:
            if placement is not None and placement.shape == balance.placement.shape:
                raise
            del self.unanswered[self._callers]
            self._clock.seen["rebalances_refused"] += 1
        host.coordination.balanced(host.now)
        host.changed(host.now)

    def _given(self) -> I32Matrix | None:
        """A placement that somebody wants, for the engine as it is or, now and then, as it was."""
        membership = self._host.coordination.membership
        group, balance = membership.groups[0], self._host.coordination.balance
        if balance is None or group.refit is None or balance.placement.shape != group.refit.placement.shape:
            return None
        if self._chance.random() < self._host.cluster.shape.plan_trouble / 4:
            return np.ascontiguousarray(balance.placement[:, 1:])
        return random_placement(balance.placement, group.refit.slots, self._chance)

    def rebalanced(self, told: Rebalanced) -> None:
        """What became of a plan: every caller hears of it once, and what was moved is what was planned."""
        report, balance = told.report, self._host.coordination.balance
        self._clock.note(f"plan for {told.callers}: {report.outcome}: {report.reason}")
        if report.outcome not in OUTCOMES or not report.reason:
            raise RuleBrokenError(f"a rebalance ends as {report}")
        self._clock.seen["plans_" + report.outcome] += 1
        for caller in told.callers:
            if caller not in self.unanswered:
                raise RuleBrokenError(f"caller {caller} is answered twice: {report}")
            given = self.unanswered.pop(caller)
            self._clock.seen["asked_" + report.outcome] += 1
            if given is not None and report.outcome in ("moved", "unchanged"):
                self._check_given(given, report)
        if report.outcome == "moved" and balance is not None:
            self._check_moved(report, balance.placement)

    def _check_given(self, given: I32Matrix, report: RebalanceReport) -> None:
        balance = self._host.coordination.balance
        if balance is None or not np.array_equal(balance.placement, given):
            raise RuleBrokenError(f"{report}, asked for {given.tolist()}")

    def _check_moved(self, report: RebalanceReport, placement: I32Matrix) -> None:
        plan = self._newest
        if plan is None or not np.array_equal(placement, plan.placement):
            raise RuleBrokenError(f"{report} and the placement is {placement.tolist()}, planned {plan}")
        if not report.slots_moved == len(report.moves) == len(plan.moves):
            raise RuleBrokenError(f"{report} of {plan}")
