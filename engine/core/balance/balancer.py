"""The balance of experts of one lockstep group: its load, its plans, and how they are carried out; no I/O.

A plan is asked for every so many steps, on demand, and when the ranks have changed. Somebody else makes it, outside of
this process; meanwhile steps go on, and what was asked is void when the epoch ends.
"""

from __future__ import annotations

from collections import Counter

import numpy as np

from drumline.engine.core.balance.answers import wrong_with
from drumline.engine.core.balance.config import BalanceConfig
from drumline.engine.core.balance.places import ExpertPlaces
from drumline.engine.core.balance.plan import PlacementPlan
from drumline.engine.core.balance.reports import (
    Ledger,
    balance_line,
    carried_out,
    check_placement,
    count_single,
    eplb_status,
    report_of,
    untouched,
)
from drumline.engine.core.balance.shuffle import Pace, ShuffleRun, ToRank, layer_plans
from drumline.engine.core.balance.turns import GIVEN, Asked, Following, Late, Run, plan_request
from drumline.engine.core.balance.window import LoadWindow
from drumline.engine.core.decisions import Log, PlanWanted, Rebalanced
from drumline.protocol.messages import (
    NO_MATRIX,
    ExpertLoad,
    I32Matrix,
    RebalanceReport,
    Shuffle,
    Staged,
    StepDone,
)
from drumline.protocol.status import EplbStatus

SNAPSHOTS = 8
"""How many a policy is given: it plans for their spread, not only for their mean."""
FIRST_SHARE = 4
"""The first plan is made after a quarter of the interval."""
SETTLE_S = 2.0
"""Ranks that have changed may change again at once: one that was lost comes back."""

BalanceOutput = ToRank | PlanWanted | Rebalanced | Log


class Balancer:
    """``placement``: int32 (moe_layers, slots), the one in force, (0, 0) while no epoch is open. What it has to say
    gathers in :meth:`take`. To the group it is the carrier of shuffles."""

    def __init__(self, config: BalanceConfig, num_experts: int, term: int) -> None:
        self.config = config
        self.placement: I32Matrix = NO_MATRIX
        self._num_experts = num_experts
        self._term = term
        self._pace = Pace(config.expert_bytes, config.bytes_per_step, config.stage_deadline_s)
        self._window = LoadWindow(config.window_size, num_experts)
        self._places: ExpertPlaces | None = None
        self._members: frozenset[str] = frozenset()
        self._epoch = -1
        self._asked: Asked | None = None
        self._next: Following | None = None
        self._run: Run | None = None
        self._requests = 0
        self._generation = 1
        self._generations: Counter[int] = Counter()
        self._ledger = Ledger()
        self._steps_until_plan = max(config.step_interval // FIRST_SHARE, 1)
        self._plan_at: float | None = None
        self._out: list[BalanceOutput] = []

    # -------------------------------------------------------------------------------------------------------- epochs

    def opened(
        self, epoch: int, places: ExpertPlaces, placement: I32Matrix, members: frozenset[str], now: float
    ) -> None:
        """An epoch has opened with this placement. ``members``: the incarnations that compute in it."""
        self.closed("another epoch has begun", now)
        self._epoch = epoch
        self._places = places
        self.placement = np.array(placement, dtype=np.int32)
        self._window.opened(places, self.placement)
        if self._members and members != self._members:
            self._plan_at = now + SETTLE_S
        self._members = members

    def closed(self, why: str, now: float) -> None:
        """The epoch is over: what was planned, or under way, is void, and the next epoch starts from what there is."""
        self._places = None
        self._window.closed()
        if self._asked is not None:
            asked, self._asked = self._asked, None
            self._answer(asked.callers, untouched("cancelled", why))
        if self._run is not None:
            self._finish(self._run, "cancelled", why, now)
        if self._next is not None:
            self._answer(self._next.callers, untouched("cancelled", why))
            self._next = None

    # ---------------------------------------------------------------------------------------------------------- load

    def step_done(self, rank: int, done: StepDone, now: float) -> None:
        """A rank has answered a step. Raises ValueError for a load that does not fit."""
        if len(done.load):
            snapshot = self._window.add(rank, done.step, done.load, done.load_steps)
            if snapshot is not None:
                self._counted(snapshot.steps, done.step, now)
        if self._run is not None:
            self._run.shuffle.step_done(rank, done.step)

    def _counted(self, steps: int, step: int, now: float) -> None:
        if steps and self.config.log_balancedness:
            self._out.append(Log(balance_line(step, *self._window.rank_load())))
        self._steps_until_plan -= steps
        if self._steps_until_plan <= 0 and self._idle:
            self._ask(NO_MATRIX, [], now)

    @property
    def _idle(self) -> bool:
        return self._places is not None and self._asked is None and self._run is None

    # ---------------------------------------------------------------------------------------------------------- plans

    def rebalance(self, caller: int, placement: I32Matrix | None, now: float) -> None:
        """Plan now, or have ``placement``, int32 (moe_layers, slots). Answered by :class:`Rebalanced`. What another one
        asked for, or what is under way, ends: the layer that is being moved is dropped, or finished if it is committed.
        Raises InvalidConfig for a placement that cannot be."""
        target = NO_MATRIX if placement is None else placement
        if self._places is None:
            self._answer([caller], untouched("failed", "its ranks come together now: no epoch is open"))
            return
        if len(target):
            check_placement(target, self.placement, self._places.slots, self._num_experts)
        why = "another rebalance was asked for"
        if self._asked is not None:
            superseded, self._asked = self._asked, None
            self._answer(superseded.callers, untouched("cancelled", why))
        if self._next is not None:
            self._answer(self._next.callers, untouched("cancelled", why))
        self._next = Following(target, [caller])
        if self._run is not None:
            self._run.shuffle.cancel(why, now)
        self._proceed(now)

    def _ask(self, target: I32Matrix, callers: list[int], now: float) -> None:
        self._plan_at = None
        self._steps_until_plan = self.config.step_interval
        self._requests += 1
        policy = GIVEN if len(target) else self.config.policy
        self._asked = Asked(self._requests, policy, callers, now)
        if self._places is None:
            raise AssertionError("a plan is asked for while no epoch is open")
        _, tokens = self._window.load(SNAPSHOTS)
        if not len(tokens):
            tokens = np.ones((1, len(self.placement), self._num_experts))
        request = plan_request(self.config, self._requests, tokens, self.placement, self._places, target)
        self._out.append(PlanWanted(request))

    def planned(self, plan: PlacementPlan, now: float) -> None:
        """The answer to :class:`PlanWanted`. One that nobody waits for any more is dropped."""
        asked, places = self._asked, self._places
        if asked is None or places is None or plan.number != asked.number:
            return
        self._asked = None
        self._ledger.plans += 1
        wrong = "" if plan.error else wrong_with(plan, self.placement, places.slot_rank, self._num_experts)
        if wrong:
            self._answer(asked.callers, untouched("failed", f"the planner's answer is no plan: {wrong}"))
        elif plan.error or not len(plan.moves):
            outcome = "failed" if plan.error else "unchanged"
            self._answer(asked.callers, report_of(plan, asked.policy, outcome, plan.error, now - asked.since))
        else:
            layers = layer_plans(plan.placement, plan.moves, places)
            run = ShuffleRun(layers, places, self._pace, self._term, self._epoch, self._generation)
            self._run = Run(run, plan, self.placement, asked)
            self._out.append(Log(f"eplb: {plan.reason}"))
        self._proceed(now)

    def _proceed(self, now: float) -> None:
        """Pass on what the run has to say; when it is over, say what became of it, and go on with what waits."""
        run = self._run
        if run is not None:
            self._out += run.shuffle.take()
            self._generation = run.shuffle.generation
            if run.shuffle.over:
                self._finish(run, "cancelled" if run.shuffle.cancelled else "moved", run.shuffle.cancelled, now)
        if self._next is not None and self._idle:
            following, self._next = self._next, None
            self._ask(following.target, following.callers, now)

    def _finish(self, run: Run, outcome: str, why: str, now: float) -> None:
        self._run = None
        moved = run.shuffle.moved
        self._ledger.slots_moved += moved.slots
        self._ledger.bytes_moved += moved.bytes
        report = report_of(run.plan, run.asked.policy, outcome, why, now - run.asked.since)
        self._answer(run.asked.callers, carried_out(report, moved, run.before, self.placement))

    def _answer(self, callers: list[int], report: RebalanceReport) -> None:
        self._ledger.last_plan = f"{report.outcome}: {report.reason}"
        self._out.append(Rebalanced(tuple(callers), report))

    # ------------------------------------------------------------------------------------------------------- carrying

    @property
    def demands(self) -> bool:
        """Whether a step is to be made for what it would carry, though nobody has work."""
        run = self._run
        return run is not None and run.shuffle.wants_step and bool(run.asked.callers or self._next)

    def next(self, step: int, now: float) -> Shuffle | None:
        """What ``step``, which is planned now, carries."""
        if self._run is None:
            return None
        shuffle, committed = self._run.shuffle.next(step, now)
        if committed is not None:
            layer, row = committed
            placement = self.placement.copy()
            placement[layer] = row
            self.placement = placement
            self._window.commit(step, placement)
            self._generations[layer] += 1
        if shuffle is not None:
            self._proceed(now)
        return shuffle

    def staged(self, message: Staged, now: float) -> bool:
        """A rank has all that it gets, or has dropped it. False for a word that nobody waits for."""
        if self._run is None or not self._run.shuffle.staged(message):
            return False
        self._proceed(now)
        return True

    # ----------------------------------------------------------------------------------------------------------- time

    @property
    def due_at(self) -> float | None:
        """When :meth:`tick` wants to be called."""
        moments = [self._plan_at if self._idle else None]
        if self._asked is not None:
            moments.append(self._asked.since + self.config.plan_deadline_s)
        if self._run is not None:
            moments.append(self._run.shuffle.due_at)
        return min((moment for moment in moments if moment is not None), default=None)

    def tick(self, now: float) -> Late | None:
        """What is due at ``now``; ranks that hold up even the end of a layer are to blame."""
        asked, run = self._asked, self._run
        if asked is not None and now >= asked.since + self.config.plan_deadline_s:
            self._asked = None
            self._answer(asked.callers, untouched("failed", f"no plan within {self.config.plan_deadline_s:.0f} s"))
        if self._plan_at is not None and now >= self._plan_at and self._idle:
            self._ask(NO_MATRIX, [], now)
        due = run.shuffle.due_at if run is not None else None
        if run is None or due is None or now < due:
            return None
        cancelling, ranks = run.shuffle.late()
        names = ", ".join(f"rank {rank}" for rank in ranks)
        limit = f"{self.config.stage_deadline_s:.0f} s"
        if cancelling:
            return Late(ranks, f"{names} did not give up the experts on their way within {limit}")
        run.shuffle.cancel(f"{names} did not have all experts within {limit}", now)
        self._proceed(now)
        return None

    # ---------------------------------------------------------------------------------------------------------- facts

    def take(self) -> list[BalanceOutput]:
        """What is to be sent and told, in order, and forgets it."""
        out, self._out = self._out, []
        return out

    def status(self) -> EplbStatus:
        """As the engine's status shows it."""
        state = "moving" if self._run is not None else "planning" if self._asked is not None else "idle"
        left = self._run.shuffle.layers_left if self._run is not None else 0
        generations = [self._generations[layer] for layer in range(len(self.placement))]
        single = count_single(self.placement, self._num_experts)
        steps, tokens = self._window.rank_load()
        return eplb_status(self.config.policy, state, left, self._ledger, steps, tokens, generations, single)

    def expert_load(self, call_id: int) -> ExpertLoad:
        """The answer to ExpertLoadQuery."""
        steps, tokens = self._window.load(SNAPSHOTS)
        if not len(steps):
            return ExpertLoad(call_id, len(self.placement), steps, NO_MATRIX, self.placement)
        # A window of millions of steps may have counted more than travels.
        flat = np.minimum(np.rint(tokens.reshape(-1, self._num_experts)), np.iinfo(np.int32).max).astype(np.int32)
        return ExpertLoad(call_id, tokens.shape[1], steps, flat, self.placement)
