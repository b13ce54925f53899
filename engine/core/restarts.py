"""When a process that was lost may be started again; no I/O."""

from __future__ import annotations

from collections import deque

WINDOW_S = 600.0
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0
PROVEN_STEPS = 100


class Restarts:
    """The restarts of one rank: at most ``limit`` within ``window_s``. The first within the window, or after a process
    that has proved itself, comes at once, the second after 0.5 s, then pauses double, up to ``longest_pause_s``."""

    def __init__(self, limit: int, window_s: float = WINDOW_S, longest_pause_s: float = LONGEST_PAUSE_S) -> None:
        self._limit = limit
        self._window_s = window_s
        self._longest_pause_s = longest_pause_s
        self._at: deque[float] = deque(maxlen=max(limit, 1))
        self._unproved = 0

    def _recent(self, now: float) -> int:
        return sum(at + self._window_s > now for at in self._at)

    def next_start(self, now: float) -> float | None:
        """When the next process may be started, None while the limit is reached."""
        recent = self._recent(now)
        if recent >= self._limit:
            return None
        in_vain = min(recent, self._unproved)
        if in_vain == 0:
            return now
        # A power of two that no float holds is never needed.
        return now + min(FIRST_PAUSE_S * 2.0 ** min(in_vain - 1, 30), self._longest_pause_s)

    def allowed_at(self, now: float) -> float | None:
        """When the limit is no longer reached; None: never, because there are to be no restarts."""
        if self._limit == 0:
            return None
        if self._recent(now) < self._limit:
            return now
        return self._at[-self._limit] + self._window_s

    def started(self, now: float) -> None:
        """A process was started in place of a lost one."""
        self._at.append(now)
        self._unproved += 1

    def proved(self) -> None:
        """The process that was started last has computed ``PROVEN_STEPS`` steps: what it dies of is no crash loop."""
        self._unproved = 0

    def forgive(self) -> None:
        """The last loss was not the rank's doing: its restart does not count."""
        if self._at:
            self._at.pop()
            self._unproved = max(self._unproved - 1, 0)
