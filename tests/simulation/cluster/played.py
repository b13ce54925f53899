"""A scenario of :mod:`drumline.engine.testing` as a simulated day."""

from __future__ import annotations

from drumline.engine.testing.scenario import MESSAGE_KINDS, RANK_KINDS, Scenario, ScheduledFault
from drumline.protocol.messages import MessageFault
from tests.simulation.cluster.faults import RankFault
from tests.simulation.cluster.schedule import OtherFault, Schedule, TimedMessageFault
from tests.simulation.cluster.shape import Shape
from tests.simulation.cluster.streams import Wanted


def day_of(scenario: Scenario, shape: Shape, wanted: list[Wanted], begins: float) -> Schedule:
    """``scenario``, from ``begins`` on. Nothing simulated starts processes for a forkserver: its death is left out,
    and so is the planner's."""
    schedule = Schedule(scenario.seed, shape, wanted)
    for number, fault in enumerate(scenario.faults):
        at = begins + fault.at_s
        if fault.kind in RANK_KINDS:
            point = "step" if fault.step >= 0 else fault.point
            if fault.kind in ("raise", "nan", "slow", "hang") and point == "now":
                point = "step"
            schedule.rank_faults.append(RankFault(fault.kind, fault.rank, at, point, fault.seconds, fault.factor))
        elif fault.kind in MESSAGE_KINDS:
            schedule.message_faults.append(TimedMessageFault(at, _of_messages(fault, scenario.seed + number)))
        elif fault.kind not in ("forkserver", "planner"):
            schedule.other_faults.append(OtherFault(fault.kind, at, max(fault.rank, 0), fault.seconds))
    return schedule


def _of_messages(fault: ScheduledFault, seed: int) -> MessageFault:
    late = fault.kind == "delay"
    return MessageFault(
        kind=fault.kind,
        direction=fault.direction,
        messages=fault.messages,
        ranks=(fault.rank,) if fault.rank >= 0 else (),
        probability=fault.probability,
        seed=seed,
        seconds=fault.seconds if late else 0.0,
        lasting_s=0.0 if late else fault.seconds,
        times=fault.times,
    )
