"""How long streams stood still after faults; no clock, no I/O."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

import msgspec

WINDOW_S = 1.0


class Spread(msgspec.Struct, frozen=True):
    """Of a number of times, in seconds."""

    count: int
    p50_s: float
    p99_s: float
    max_s: float

    @classmethod
    def of(cls, times: Iterable[float]) -> Spread:
        """The nearest of the times themselves; all 0.0 where there is none."""
        ordered = sorted(times)
        if not ordered:
            return cls(0, 0.0, 0.0, 0.0)
        last = len(ordered) - 1
        return cls(len(ordered), ordered[round(0.5 * last)], ordered[round(0.99 * last)], ordered[-1])


@dataclass(slots=True)
class _Window:
    kind: str
    since: float
    last: float
    longest: float = 0.0
    resumed: float = 0.0


@dataclass(slots=True)
class Recoveries:
    """Of every stream, for each fault: how long after it the token came that ended the longest silence.

    Tokens that were on their way when the fault happened come at once; what counts is when they flow again. The longest
    silence is looked for in the first second after the fault, and goes on for as long as it lasts.
    """

    streams: int
    times: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    _open: list[list[_Window]] = field(init=False)

    def __post_init__(self) -> None:
        self._open = [[] for _ in range(self.streams)]

    def fault(self, kind: str, at: float) -> None:
        """A fault has happened."""
        for windows in self._open:
            windows.append(_Window(kind, at, at))

    def token(self, stream: int, at: float) -> None:
        """A stream has moved on."""
        windows = self._open[stream]
        if not windows:
            return
        still_open: list[_Window] = []
        for window in windows:
            if at - window.last > window.longest:
                window.longest, window.resumed = at - window.last, at - window.since
            window.last = at
            if at - window.since < WINDOW_S:
                still_open.append(window)
            else:
                self.times[window.kind].append(window.resumed)
        self._open[stream] = still_open

    def spreads(self) -> dict[str, Spread]:
        """By kind of fault."""
        return {kind: Spread.of(times) for kind, times in sorted(self.times.items())}
