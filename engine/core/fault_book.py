"""The faults that an engine has seen, as its status tells them; no I/O."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass

from drumline.engine.core.members import FaultSeen
from drumline.protocol.status import FaultStatus

KEPT = 64


@dataclass(slots=True)
class SeenFault:
    """``seen_at`` and ``recovered_at`` (-1.0: not yet) are in the seconds of the coordinator's clock."""

    fault: FaultSeen
    seen_at: float
    recovered_at: float = -1.0


class FaultBook:
    """The last ``KEPT`` faults, oldest first. ``counts``: all of them by kind."""

    def __init__(self) -> None:
        self._seen: deque[SeenFault] = deque(maxlen=KEPT)
        self.counts: Counter[str] = Counter()

    def add(self, fault: FaultSeen, now: float) -> None:
        """A fault was found at ``now``."""
        self._seen.append(SeenFault(fault, now))
        self.counts[fault.kind] += 1

    def recovered(self, group: int, now: float) -> None:
        """The ranks of ``group`` compute again."""
        for seen in self._seen:
            if seen.fault.group == group and seen.recovered_at < 0:
                seen.recovered_at = now

    def status(self, now: float, wall: float) -> tuple[FaultStatus, ...]:
        """As the status shows them. ``wall``: seconds since 1970 at ``now``."""
        return tuple(
            FaultStatus(
                rank=seen.fault.rank,
                incarnation=seen.fault.incarnation,
                group=seen.fault.group,
                epoch=seen.fault.epoch,
                step=seen.fault.step,
                kind=seen.fault.kind,
                evidence=seen.fault.evidence,
                at=wall - (now - seen.seen_at),
                recovered_s=seen.recovered_at - seen.seen_at if seen.recovered_at >= 0 else -1.0,
            )
            for seen in self._seen
        )
