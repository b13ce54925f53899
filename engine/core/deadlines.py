"""Who has not done in time what is waited for: the supervisor, ranks that start, ranks of an epoch; no I/O."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from drumline.engine.core.members import GroupRecord, GroupStage, MembershipConfig, RankRecord, Refusals
from drumline.engine.core.processes import Processes
from drumline.engine.core.start_deadlines import overdue_rank, start_due_at, waiting_for
from drumline.protocol.errors import ErrorInfo

SILENCE_S = 10.0
"""A rank that has said Hello and is not heard for so long is lost; it beats every second. So is the supervisor."""

UNHEARD_S = 3.0
"""Of ranks that an epoch waits for, those not heard for so long are to blame, the others wait for them."""

WEDGED = "wedged"


@dataclass(frozen=True, slots=True)
class Late:
    """``records``, of one group, are lost by ``errors``. ``of_start``: a start would fail
    again."""

    records: list[RankRecord]
    errors: list[ErrorInfo]
    kind: str = WEDGED
    of_start: bool = False


class Deadlines:
    """``gathers_until``: how long ranks that lived already are waited for. ``starting``: the engine was never ready, so
    that no stream stands still while an epoch forms."""

    def __init__(
        self,
        config: MembershipConfig,
        groups: Sequence[GroupRecord],
        ranks: Mapping[int, RankRecord],
        processes: Processes,
        refusals: Refusals,
        now: float,
    ) -> None:
        self._config = config
        self._groups = groups
        self._ranks = ranks
        self._processes = processes
        self._refusals = refusals
        self._started_at = now
        self.owner_heard_at = now
        self.gathers_until = float("inf")
        self.starting = True
        self._gathered = False

    @property
    def due_at(self) -> float:
        """The first moment at which somebody is late, or a process is to be started."""
        moments = [self._owner_due_at]
        moments += [record.heard_at + SILENCE_S for record in self._ranks.values() if record.peer is not None]
        moments += [self._stage_due_at(group) for group in self._groups if self._is_waiting(group)]
        if not self._gathered:
            moments.append(self.gathers_until)
        if self._processes.owner is not None:
            moments += [record.start_at for record in self._ranks.values() if record.start_at is not None]
            due = start_due_at(self._config, self._ranks)
            if due is not None:
                moments.append(due)
        return min(moments)

    @property
    def _owner_due_at(self) -> float:
        if self._processes.owner is None:
            return self._started_at + self._config.start_deadline_s
        return self.owner_heard_at + SILENCE_S

    def failed(self, now: float) -> ErrorInfo | None:
        """Why the engine cannot go on: there is no supervisor."""
        if now < self._owner_due_at:
            return None
        if self._processes.owner is None:
            text = f"no supervisor said hello within {self._config.start_deadline_s:g} s{self._wrong_tokens()}"
            return ErrorInfo(kind="start_failed", text=text)
        return ErrorInfo(kind="engine_closed", text=f"the supervisor has not been heard for {SILENCE_S:g} s")

    def gathered(self, now: float) -> bool:
        """Whether ranks that lived already have had their time, once."""
        if self._gathered or now < self.gathers_until:
            return False
        self._gathered = True
        return True

    def _wrong_tokens(self) -> str:
        count = self._refusals.wrong_token
        return f"; {count} Hellos came with a wrong launch token or for no rank of this world" if count else ""

    def overdue(self, now: float) -> list[Late]:
        """The ranks that are late, in lists of those that are lost together."""
        found = self._silent(now)
        found += [late for group in self._groups if (late := self._stage(group, now)) is not None]
        if self._processes.owner is not None:
            record = overdue_rank(self._config, self._ranks, now)
            if record is not None:
                doing = waiting_for(self._config, record) + self._wrong_tokens()
                text = f"made no progress for {self._config.start_deadline_s:g} s {doing}"
                found.append(self._late([record], text, of_start=True))
        named: set[int] = set()
        once: list[Late] = []
        for late in found:
            if named.isdisjoint(record.rank for record in late.records):
                named.update(record.rank for record in late.records)
                once.append(late)
        return once

    def _silent(self, now: float) -> list[Late]:
        found: list[Late] = []
        for record in self._ranks.values():
            if record.peer is not None and now >= record.heard_at + SILENCE_S:
                external = self._processes.is_external(record.rank)
                text = f"has not been heard for {SILENCE_S:g} s"
                found.append(self._late([record], text, "unreachable" if external else WEDGED))
        return found

    def _late(self, records: list[RankRecord], text: str, kind: str = WEDGED, of_start: bool = False) -> Late:
        errors = [
            ErrorInfo(
                kind="request_failed",
                text=f"rank {record.rank} (pid {record.pid}) {text}",
                retryable=True,
                rank=record.rank,
                incarnation=record.incarnation,
                epoch=record.epoch,
            )
            for record in records
        ]
        return Late(records, errors, kind, of_start)

    # ------------------------------------------------------------------------------------------ stages of an epoch

    def _is_waiting(self, group: GroupRecord) -> bool:
        return group.stage in (GroupStage.LEAVING, GroupStage.OPENING_STORE, GroupStage.FORMING)

    def _stage_due_at(self, group: GroupRecord) -> float:
        if group.stage is not GroupStage.FORMING:
            return group.since + group.limit_s
        records = [self._ranks[rank] for rank in group.waiting]
        # Experts are read while it forms; who makes progress is not late.
        due = max([group.since, *(record.progress_at for record in records)]) + group.limit_s
        if self.starting:
            return due
        # Who does not even beat will not come, and the others and their streams stand still for it.
        return min([due, *(max(group.since, record.heard_at) + UNHEARD_S for record in records)])

    def _stage(self, group: GroupRecord, now: float) -> Late | None:
        if not self._is_waiting(group) or now < self._stage_due_at(group):
            return None
        waited = f"{group.limit_s:.1f} s"
        if group.stage is GroupStage.LEAVING:
            records = [self._ranks[rank] for rank in sorted(group.waiting)]
            return self._late(records, f"has not come out of its epoch for epoch {group.epoch} within {waited}")
        if group.stage is GroupStage.OPENING_STORE:
            host = self._ranks[group.members[0]]
            return self._late([host], f"has not opened the store of epoch {group.epoch} within {waited}")
        text = f"has not met the others for epoch {group.epoch} within {min(now - group.since, group.limit_s):.1f} s"
        return self._late(self._to_blame(group, now), text, of_start=True)

    def _to_blame(self, group: GroupRecord, now: float) -> list[RankRecord]:
        """Of the ranks that an epoch waits for, those that the others wait for."""
        records = [self._ranks[rank] for rank in sorted(group.waiting)]
        unheard = [record for record in records if now - record.heard_at >= UNHEARD_S]
        return unheard or [min(records, key=lambda record: (record.progress_at, record.heard_at, record.rank))]
