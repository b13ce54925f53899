"""How long after a fault each stream had its next token; no clock."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from drumline.engine.testing.recovery import Spread


@dataclass(slots=True)
class _Fault:
    kind: str
    at: float
    known: bool
    waiting: set[int]


@dataclass(slots=True)
class Gaps:
    """``times``: by kind of fault, from the fault to the next token of each of ``streams``.

    Tokens that were under way when it happened do not count: only those after the engine has told of the fault do.
    """

    streams: int
    times: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    _open: list[_Fault] = field(default_factory=list)

    def fault(self, kind: str, at: float, known: bool) -> None:
        """One happens. ``known``: there is nothing that will be told of it."""
        self._open.append(_Fault(kind, at, known, set(range(self.streams))))

    def told(self) -> None:
        """The engine has told of what has happened by now."""
        for fault in self._open:
            fault.known = True

    def token(self, stream: int, at: float) -> None:
        """A stream has moved on."""
        for fault in self._open:
            if fault.known and stream in fault.waiting:
                fault.waiting.discard(stream)
                self.times[fault.kind].append(at - fault.at)
        self._open = [fault for fault in self._open if fault.waiting]

    def spreads(self) -> dict[str, Spread]:
        """By kind of fault."""
        return {kind: Spread.of(times) for kind, times in sorted(self.times.items())}
