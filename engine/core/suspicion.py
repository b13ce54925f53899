"""Requests that faults are laid at: those that kill ranks, and those whose numbers are not finite; no I/O."""

from __future__ import annotations

from drumline.engine.core.engine_core import EngineCore
from drumline.engine.core.losses import NUMERIC
from drumline.engine.core.members import FaultSeen, Tell
from drumline.engine.core.quarantine import MAX_COUNTED, Quarantine
from drumline.protocol.errors import ErrorInfo
from drumline.protocol.messages import Event

POISONED = "poisoned"


class Suspicion:
    """What is known against requests. True while some are confined."""

    def __init__(self) -> None:
        self.quarantine = Quarantine()
        #: Where the confined run, counted over all groups.
        self.replica: int | None = None
        self._numeric: dict[str, int] = {}
        self._suspects: dict[int, tuple[int, tuple[str, ...]]] = {}
        self._told: list[Tell] = []

    def __bool__(self) -> bool:
        return bool(self.quarantine)

    def closed(self, group: int, epoch: int, suspects: tuple[str, ...]) -> None:
        """The group's ``epoch`` has ended with ``suspects`` in unacknowledged steps. One that only formed had none and
        changes nothing: a death that is told late was in the one before."""
        known, _ = self._suspects.get(group, (-1, ()))
        if suspects and known != epoch:
            self._suspects[group] = (epoch, suspects)

    def take(self) -> list[Tell]:
        """What there is to tell, and forgets it."""
        told, self._told = self._told, []
        return told

    def fault(self, fault: FaultSeen, core: EngineCore, replica: int) -> None:
        """A rank of attention replica ``replica`` (of its group) has failed. Fails the request that is to blame, if
        that is known by now, and confines suspects."""
        if fault.rows:
            self._count_numeric(fault, core, replica)
        elif fault.inside:
            self._died(fault, core, replica)

    def _count_numeric(self, fault: FaultSeen, core: EngineCore, replica: int) -> None:
        for request_id in core.requests_in_rows(fault.group, replica, fault.rows):
            times = self._numeric.pop(request_id, 0) + 1
            if times == 1:
                self._numeric[request_id] = times
                continue
            text = f"request {request_id!r} made NaN or infinite numbers a second time"
            self._fail(core, request_id, NUMERIC, text, fault)
        while len(self._numeric) > MAX_COUNTED:
            del self._numeric[next(iter(self._numeric))]

    def _died(self, fault: FaultSeen, core: EngineCore, replica: int) -> None:
        epoch, suspects = self._suspects.get(fault.group, (-1, ()))
        if epoch != fault.epoch:
            suspects = core.suspects(fault.group)
        # One death is counted once, however many ranks it takes along and however it is told.
        self._suspects[fault.group] = (fault.epoch, ())
        before = self.quarantine.confinement
        apart = self.replica in (None, fault.group * core.config.replicas_per_group + replica)
        found = self.quarantine.died(suspects, core.told_tokens(suspects), apart)
        if found is not None:
            text = f"request {found!r} kills the ranks that compute it: {fault.error.text}"
            self._fail(core, found, POISONED, text, fault)
        if self.quarantine.confinement != before:
            self._confine(core)

    def _fail(self, core: EngineCore, request_id: str, kind: str, text: str, fault: FaultSeen) -> None:
        error = ErrorInfo(
            kind=kind,
            text=text,
            rank=fault.rank,
            incarnation=fault.incarnation,
            epoch=fault.epoch,
            step=fault.step,
        )
        core.fail(request_id, error)
        self._tell(kind, text, (request_id,))

    def look(self, core: EngineCore) -> None:
        """Release who has come past the place where it would have killed. Due while somebody is confined."""
        confined = self.quarantine.confinement
        if self.quarantine.progressed(core.told_tokens((*confined.active, *confined.held))):
            self._confine(core)

    def move(self, core: EngineCore) -> None:
        """The replica of the confined will not serve again: another one takes them, where any serves."""
        if core.serving:
            self._confine(core)

    def _confine(self, core: EngineCore) -> None:
        now = self.quarantine.confinement
        self.replica = max(core.serving, default=0) if now.active else None
        core.confine(now.active, now.held, self.replica)
        text = "the quarantine is over"
        if now.active:
            text = f"{len(now.active)} requests are suspected to kill ranks and run apart; {len(now.held)} wait"
        self._tell("quarantine", text, now.active)

    def _tell(self, kind: str, text: str, request_ids: tuple[str, ...]) -> None:
        self._told.append(Tell(Event(kind, text, request_ids=request_ids[:64])))
