"""Faults that a schedule brings about, when their moment or their point has come."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from drumline.protocol.messages import Step
from tests.simulation.cluster.clock import Clock
from tests.simulation.cluster.process import SIGKILL, SIGSEGV
from tests.simulation.cluster.rank import SimRank

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

RANK_KINDS = ("kill", "stop", "exit", "segv", "raise", "nan", "hang", "slow", "coordinator")
"""The last one kills the coordinator when the rank comes to the point."""
MOVING_POINTS = ("staging", "staged", "commit", "home", "planning")
"""A part has been started, all is staged, a layer has its new experts, some are in their rows, a plan is made."""
POINTS = ("now", "loading", "leave", "regroup", "joining", "step", "prefill", "decode")


@dataclass(slots=True)
class RankFault:
    """A fault of ``rank``, from ``at`` on at the first time that it comes to ``point``."""

    kind: str
    rank: int
    at: float
    point: str = "now"
    seconds: float = 0.0
    factor: float = 1.0


class Faults:
    """``poison`` and ``not_finite``: seeds of requests that kill ranks, or whose numbers are not finite.
    ``from_inside``: faults that look as if a request had caused them, those that tampered messages cause too."""

    def __init__(self, clock: Clock, kill_coordinator: Callable[[], None]) -> None:
        self._clock = clock
        self._kill_coordinator = kill_coordinator
        self._armed: list[RankFault] = []
        self._not_finite_next: set[int] = set()
        self.poison: set[int] = set()
        self.not_finite: set[int] = set()
        self.caused = 0
        self.from_inside = 0

    def arm(self, fault: RankFault) -> None:
        """It happens at the next occasion."""
        self._armed.append(fault)

    def disarm(self) -> None:
        """What has not happened will not."""
        self._armed.clear()
        self._not_finite_next.clear()

    def point(self, process: SimRank, point: str) -> None:
        """``process`` has come to ``point``."""
        for fault in [one for one in self._armed if one.rank == process.rank and one.point == point]:
            if process.alive and not process.stopped:
                self._armed.remove(fault)
                self.strike(process, fault)

    def in_step(self, process: SimRank, step: Step, what: str) -> None:
        """``process`` begins a step, which is a ``what``: prefill or decode."""
        if self._armed:
            self.point(process, "step")
            self.point(process, what)

    def strike(self, process: SimRank, fault: RankFault) -> None:
        """Bring it about."""
        self.caused += 1
        self.from_inside += fault.kind in ("segv", "exit", "raise")
        self._clock.seen[f"fault_{fault.kind}_{fault.point}"] += 1
        self._clock.seen["fault_" + fault.kind] += 1
        self._clock.note(f"fault: {fault.kind} {process} at {fault.point}")
        if fault.kind == "kill":
            process.end(signal=SIGKILL)
        elif fault.kind == "stop":
            process.stop(fault.seconds)
        elif fault.kind == "exit":
            process.end(code=1)
        elif fault.kind == "segv":
            process.end(signal=SIGSEGV)
        elif fault.kind == "coordinator":
            self._kill_coordinator()
        elif fault.kind == "raise":
            process.fault("internal", "RuntimeError: injected")
        elif fault.kind == "nan":
            self._not_finite_next.add(process.rank)
        elif fault.kind == "hang":
            process.hang()
        elif fault.kind == "slow":
            process.factor = fault.factor
            process.later(fault.seconds, lambda: setattr(process, "factor", 1.0))
        else:
            raise ValueError(f"a fault of kind {fault.kind!r}; valid: {', '.join(RANK_KINDS)}")

    def next_not_finite(self, process: SimRank, computing: Sequence[tuple[int, int]]) -> bool:
        """Whether the logits that ``process`` computes now were to be made NaN."""
        if process.rank in self._not_finite_next and computing:
            self._not_finite_next.discard(process.rank)
            return True
        return False
