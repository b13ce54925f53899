"""Runs a schedule on a cluster."""

from __future__ import annotations

from collections import Counter
from functools import partial

from tests.simulation.cluster.cluster import Cluster
from tests.simulation.cluster.faults import RankFault
from tests.simulation.cluster.schedule import CLIENTS, OtherFault, Schedule, TimedMessageFault
from tests.simulation.worker import RuleBrokenError


class Day:
    """One schedule from its start to rest."""

    def __init__(self, schedule: Schedule, verbose: bool = False) -> None:
        self.schedule = schedule
        self.cluster = Cluster(schedule.shape, schedule.seed, CLIENTS, verbose)
        self.cluster.may_end, self.cluster.crash_loop = schedule.may_end, schedule.crash_loop

    def run(self) -> Counter[str]:
        """Returns what was seen. Raises :class:`RuleBrokenError` at the first broken rule."""
        schedule, clock = self.schedule, self.cluster.clock
        self.cluster.start()
        for wanted in schedule.wanted:
            clock.at(wanted.at, partial(self.cluster.clients[wanted.client].ask, wanted))
        for fault in schedule.rank_faults:
            clock.at(fault.at, partial(self._rank_fault, fault))
        for other in schedule.other_faults:
            clock.at(other.at, partial(self._other_fault, other))
        for timed in schedule.message_faults:
            clock.at(timed.at, partial(self._message_fault, timed))
        # What has not met its point by then never will.
        clock.at(schedule.last_at + 10.0, self.cluster.faults.disarm)
        self.cluster.run(schedule.last_at)
        return clock.seen

    def _rank_fault(self, fault: RankFault) -> None:
        faults = self.cluster.faults
        if fault.point != "now":
            faults.arm(fault)
            return
        for process in list(self.cluster.supervisor.processes.values()):
            if process.rank == fault.rank:
                faults.strike(process, fault)

    def _message_fault(self, timed: TimedMessageFault) -> None:
        self.cluster.faults.caused += 1
        self.cluster.hub.faults.add(timed.fault)

    def _other_fault(self, fault: OtherFault) -> None:
        cluster = self.cluster
        cluster.clock.note(f"fault: {fault.kind} {fault.who} for {fault.seconds:.2f} s")
        if fault.kind == "coordinator":
            cluster.kill_coordinator()
        elif fault.kind == "stopped_coordinator":
            if cluster.hub.host is not None:
                cluster.hub.host.stop(fault.seconds)
        elif fault.kind == "everything":
            cluster.kill_everything()
        elif fault.kind == "connection":
            cluster.clients[fault.who].lose_connection()
        elif fault.kind == "client":
            cluster.clients[fault.who].restart()
        elif fault.kind == "slow_client":
            cluster.clients[fault.who].pause(fault.seconds)
        elif fault.kind == "full_disk":
            cluster.disk.full = cluster.was_degraded = True
            cluster.clock.after(fault.seconds, self._room_again)
        elif fault.kind == "partition":
            self._partition(fault)
        else:
            self._to_experts(fault)

    def _to_experts(self, fault: OtherFault) -> None:
        """Who asks for a rebalance is no fault, but befalls whatever is under way."""
        cluster = self.cluster
        if fault.kind == "stuck_link":
            cluster.clock.seen["stuck_link"] += 1
            cluster.stuck[fault.who] = cluster.clock.now + fault.seconds
        elif fault.kind not in ("rebalance", "given_rebalance"):
            raise ValueError(f"a fault of kind {fault.kind!r}")
        elif cluster.hub.host is not None:
            cluster.hub.host.planner.rebalance(fault.kind == "given_rebalance")

    def _room_again(self) -> None:
        self.cluster.disk.full = False

    def _partition(self, fault: OtherFault) -> None:
        self.cluster.clock.seen["partition"] += 1
        self.cluster.faults.caused += 1
        until = self.cluster.clock.now + fault.seconds
        for process in self.cluster.supervisor.processes.values():
            if process.rank == fault.who and process.line is not None:
                process.line.hold(until)


def run_schedule(schedule: Schedule, verbose: bool = False) -> Counter[str]:
    """Runs to the end. A :class:`RuleBrokenError`, or whatever the code raised, names the seed that replays it and what
    happened last."""
    day = Day(schedule, verbose)
    try:
        return day.run()
    except Exception as error:
        clock = day.cluster.clock
        replay = f"python -m tests.simulation.cluster {schedule.generator}--seed {schedule.seed} -v"
        past = "\n".join(clock.past)
        text = f"seed {schedule.seed} at {clock.now:.4f} s: {error!r}\n{past}\nreplay: {replay}"
        raise RuleBrokenError(text) from error
