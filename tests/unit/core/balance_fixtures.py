"""Two ranks, two MoE layers of four experts, six slots: what tests of the balance of experts start from."""

from __future__ import annotations

import numpy as np

from drumline.engine.core.balance.balancer import Balancer
from drumline.engine.core.balance.config import BalanceConfig
from drumline.engine.core.balance.places import ExpertPlaces
from drumline.engine.core.balance.plan import PlacementPlan, PlanRequest
from drumline.engine.core.balance.shuffle import ToRank
from drumline.engine.core.decisions import PlanWanted, Rebalanced
from drumline.protocol.messages import (
    NO_FETCHES,
    NO_NUMBERS,
    CancelStage,
    I32Matrix,
    RebalanceReport,
    Shuffle,
    Staged,
    StageExperts,
    StepDone,
)

TERM, EPOCH = 3, 7
RANKS = (0, 1)
PLACES = ExpertPlaces(
    stages=(RANKS,), slots=np.array([3, 3], np.int32), nodes=np.array([0, 0], np.int32), layer_stage=(0, 0)
)
START = np.array([[0, 1, 2, 3, 0, 1], [0, 1, 2, 3, 0, 1]], dtype=np.int32)
OTHER = np.array([[0, 1, 2, 3, 2, 1], [3, 1, 2, 3, 0, 1]], dtype=np.int32)
"""From START: expert 2 comes to slot 4 of layer 0, expert 3 to slot 0 of layer 1."""
MOVES = np.array([[0, 4, 0, 2], [1, 0, 1, 3]], dtype=np.int32)


def config(**changes: object) -> BalanceConfig:
    """Parts of half an expert, one a step."""
    fields: dict[str, object] = {"expert_bytes": 100, "bytes_per_step": 50, "step_interval": 40, "window_size": 100}
    return BalanceConfig(**(fields | changes))  # type: ignore[arg-type]


def answer(request: PlanRequest, placement: I32Matrix = OTHER, moves: I32Matrix = MOVES) -> PlacementPlan:
    return PlacementPlan(request.number, placement, moves, 0.5, 0.9, len(moves), 100 * len(moves), reason="planned")


class Driven:
    """A balancer whose ranks answer when a test says so."""

    def __init__(self, **changes: object) -> None:
        self.balancer = Balancer(config(**changes), 4, TERM)
        self.balancer.opened(EPOCH, PLACES, START, frozenset({"a", "b"}), 0.0)
        self.step = 0
        self.sent: list[ToRank] = []
        self.requests: list[PlanRequest] = []
        self.answers: list[tuple[tuple[int, ...], RebalanceReport]] = []
        self.collect()

    def collect(self) -> None:
        for output in self.balancer.take():
            if isinstance(output, ToRank):
                self.sent.append(output)
            elif isinstance(output, PlanWanted):
                self.requests.append(output.request)
            elif isinstance(output, Rebalanced):
                self.answers.append((output.callers, output.report))

    def asked(self, caller: int = 9, now: float = 0.0) -> PlanRequest:
        self.balancer.rebalance(caller, None, now)
        self.collect()
        return self.requests[-1]

    def planned(self, plan: PlacementPlan, now: float = 0.0) -> None:
        self.balancer.planned(plan, now)
        self.collect()

    def plan_step(self, now: float = 0.0) -> Shuffle | None:
        shuffle = self.balancer.next(self.step, now)
        self.step += 1
        self.collect()
        return shuffle

    def done(self, step: int, *ranks: int, load: list[list[int]] | None = None, steps: int = 0) -> None:
        for rank in ranks or RANKS:
            reply = StepDone(TERM, EPOCH, rank, step, NO_NUMBERS, NO_NUMBERS)
            if load is not None:
                own = np.asarray(load, dtype=np.int32)[:, 3 * rank : 3 * rank + 3]
                reply = StepDone(TERM, EPOCH, rank, step, NO_NUMBERS, NO_NUMBERS, (), own, steps)
            self.balancer.step_done(rank, reply, 0.0)
        self.collect()

    def staged(self, *ranks: int, generation: int | None = None, dropped: bool = False) -> list[bool]:
        number = self.stage.generation if generation is None else generation
        heard = [
            self.balancer.staged(Staged(TERM, EPOCH, rank, number, 100, dropped=dropped), 0.0)
            for rank in ranks or RANKS
        ]
        self.collect()
        return heard

    @property
    def stage(self) -> StageExperts:
        """The last layer that was told."""
        return next(one.message for one in reversed(self.sent) if isinstance(one.message, StageExperts))

    @property
    def cancels(self) -> list[int]:
        return [one.rank for one in self.sent if isinstance(one.message, CancelStage)]


__all__ = ["EPOCH", "MOVES", "NO_FETCHES", "OTHER", "PLACES", "RANKS", "START", "TERM", "Driven", "answer", "config"]
