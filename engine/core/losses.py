"""What follows from a fault: the rank is replaced, its group comes together anew, and all of it is told; no I/O."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import msgspec

from drumline.engine.core.decisions import Ended, FaultSeen, Output, Tell
from drumline.engine.core.epochs import Epochs
from drumline.engine.core.evidence import (
    CONSEQUENCES,
    OF_PEERS,
    Complaints,
    end_text,
    exit_error,
    from_inside,
    missed_within_steps,
    out_of_memory,
    own_words,
    second_within_steps,
)
from drumline.engine.core.members import GroupRecord, GroupStage, RankRecord, RankState
from drumline.engine.core.processes import Processes
from drumline.engine.core.silent_rank import blame_silent_rank
from drumline.protocol.errors import ErrorInfo
from drumline.protocol.messages import Event, Exited, Fault

SETTLE_S = 0.25
"""How long after a connection is gone the end of its process may be told, which says more."""

MOST_MISSED = 3
"""A rank that others miss though it is there, or that misses others, more often than this within so few steps that two
exceptions would be too many, is not to be had."""

NUMERIC = "numeric"


@dataclass(frozen=True, slots=True)
class Unexplained:
    """A rank whose connection is gone; until ``due`` its process, which had ``computed`` or not, may be told to have
    ended."""

    fault: FaultSeen
    pid: int
    due: float
    computed: bool


class Losses:
    """Faults of ranks that belong to an engine which goes on."""

    def __init__(
        self, groups: Sequence[GroupRecord], ranks: Mapping[int, RankRecord], epochs: Epochs, processes: Processes
    ) -> None:
        self._groups = groups
        self._ranks = ranks
        self._epochs = epochs
        self._processes = processes
        self._complaints = [Complaints() for _ in groups]
        self._unexplained: list[Unexplained] = []

    # ------------------------------------------------------------------------------------------------- losing a rank

    def lose(
        self, records: Sequence[RankRecord], kind: str, errors: Sequence[ErrorInfo], now: float, inside: bool = False
    ) -> list[Output]:
        """These ranks of one group are lost: its epoch is, and other processes take their places."""
        group = self._groups[records[0].group]
        belonged = any(self._epochs.belongs(record) for record in records)
        faults: list[Output] = []
        kills: list[Output] = []
        for record, error in zip(records, errors, strict=True):
            external = self._processes.is_external(record.rank)
            complaints = self._complaints[record.group]
            error = msgspec.structs.replace(error, text=error.text + complaints.quote())
            fault = self._fault(record, kind, error, inside)
            if kind == "unreachable" and record.pid and not external:
                self._unexplained.append(Unexplained(fault, record.pid, now + SETTLE_S, record.has_computed))
            else:
                faults += self._told(fault)
                if kind != "exit":
                    kills += self._processes.kill(record.rank, record.pid)
            gone = kind in ("exit", "unreachable")
            self._processes.bury(record, RankState.DEAD if gone else RankState.WEDGED, error.text)
        self._complaints[group.id].clear()
        outputs = faults + kills
        if belonged:
            outputs += self._epochs.fell(group, errors[0].text, now)
        for record in records:
            outputs += self._processes.replace(record, now)
        # Who is waited for may not come any more.
        return outputs + self._epochs.consider(group, now) + self.hopeless()

    def _fault(
        self, record: RankRecord, kind: str, error: ErrorInfo, inside: bool, rows: tuple[int, ...] = ()
    ) -> FaultSeen:
        record.last_fault = error.text
        step = error.step if error.step >= 0 else max(record.step, record.replied)
        return FaultSeen(
            record.rank, record.incarnation, record.group, record.epoch, step, kind, error.text, inside, rows, error
        )

    def _told(self, fault: FaultSeen) -> list[Output]:
        event = Event(
            "fault",
            f"rank {fault.rank}: {fault.kind}: {fault.evidence}",
            fault.rank,
            group=fault.group,
            incarnation=fault.incarnation,
            epoch=fault.epoch,
            step=fault.step,
            fault=fault.kind,
            evidence=fault.evidence,
        )
        return [fault, Tell(event)]

    def exited(self, record: RankRecord, message: Exited, now: float) -> list[Output]:
        """The process of a rank has ended."""
        if message.pid in record.lost_pids:
            return self._explained(message)
        return self.lose(
            [record],
            "exit",
            [exit_error(record, message, "request_failed")],
            now,
            record.has_computed and from_inside(message),
        )

    def _explained(self, message: Exited) -> list[Output]:
        for one in self._unexplained:
            if one.pid == message.pid and one.fault.rank == message.rank:
                self._unexplained.remove(one)
                text = end_text(message)
                error = msgspec.structs.replace(one.fault.error, text=text, traceback=message.stderr_tail)
                inside = one.computed and from_inside(message)
                return self._told(replace(one.fault, kind="exit", evidence=text, inside=inside, error=error))
        return []

    def hopeless(self) -> list[Output]:
        """The end of an engine in which no group computes and none can, because a rank ends whenever it is started."""
        culprit: RankRecord | None = None
        for group in self._groups:
            records = [self._ranks[rank] for rank in group.ranks]
            looping = [record for record in records if record.crash_looping]
            coming = any(record.coming for record in records)
            if group.stage is not GroupStage.GATHERING or coming or not looping:
                return []
            culprit = culprit or looping[0]
        if culprit is None:
            return []
        text = f"rank {culprit.rank} ends whenever it is started and nobody can compute without it: "
        text += culprit.last_fault
        return [Ended(text, ErrorInfo(kind="request_failed", text=text, rank=culprit.rank))]

    # ------------------------------------------------------------------------------------------------ faults of ranks

    def fault(self, record: RankRecord, message: Fault, now: float) -> list[Output]:
        """A rank reports a fault: it stays, unless it raises again and again, or could not load."""
        group = self._groups[record.group]
        error = own_words(record, message)
        current = message.epoch == group.epoch and self._epochs.belongs(record)
        if not record.has_weights:
            return self.lose([record], "exception", [error], now)
        if error.kind in CONSEQUENCES:
            return self._complaint(group, record, error, current, now)
        if error.kind == NUMERIC:
            outputs = self._told(self._fault(record, NUMERIC, error, False, message.rows))
        elif second_within_steps(record):
            return self.lose([record], "exception", [error], now, True)
        else:
            outputs = self._told(self._fault(record, "exception", error, out_of_memory(error)))
        self._complaints[group.id].clear()
        if current:
            outputs += self._epochs.fell(group, error.text, now)
        return outputs

    def _complaint(
        self, group: GroupRecord, record: RankRecord, error: ErrorInfo, current: bool, now: float
    ) -> list[Output]:
        record.last_fault = error.text
        complaints = self._complaints[group.id]
        computing = [self._ranks[rank] for rank in group.members] if group.is_open else []
        if not current and (not complaints or error.kind not in OF_PEERS):
            return []  # of an epoch whose end is explained
        complaints.add(error, computing)
        if not current:
            return []
        return self._epochs.fell(group, error.text, now)

    def settle(self, group: GroupRecord, now: float) -> list[Output]:
        """All ranks have come out of the epoch before: whoever missed another, none is gone."""
        complaints = self._complaints[group.id]
        if not complaints:
            return []
        error = blame_silent_rank(complaints, self._ranks)
        complaints.clear()
        record = self._ranks[error.rank]
        if missed_within_steps(record) > MOST_MISSED:
            return self.lose([record], "peer_lost", [error], now)
        return self._told(self._fault(record, "peer_lost", error, False))

    # ---------------------------------------------------------------------------------------------------------- time

    @property
    def due_at(self) -> float | None:
        """When a connection that is gone has been unexplained for long enough."""
        return min((one.due for one in self._unexplained), default=None)

    def tick(self, now: float) -> list[Output]:
        """Nothing has explained why a connection is gone: the process may still be there."""
        outputs: list[Output] = []
        for one in [one for one in self._unexplained if now >= one.due]:
            self._unexplained.remove(one)
            outputs += self._told(one.fault)
            outputs += self._processes.kill(one.fault.rank, one.pid)
        return outputs
