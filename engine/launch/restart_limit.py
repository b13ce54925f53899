"""How soon, and how often, a process of the engine's own is started again; no I/O."""

from __future__ import annotations

from collections import deque

WINDOW_S = 600.0
SHORT_LIFE_S = 1.0
FIRST_PAUSE_S = 0.25
LONGEST_PAUSE_S = 8.0


class RestartLimit:
    """At most ``limit`` restarts within 10 minutes. The next one is at once, unless its predecessors, two or more, did
    not live for a second: then it waits 0.25 s, doubling up to 8 s. Ranks wait for it with their weights."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._at: deque[float] = deque()
        self._short = 0

    def pause(self, now: float, *, lived_s: float) -> float | None:
        """How long to wait before the next start, None when there is to be none; ``lived_s``: how long the process
        was in order before it ended. Counts as a restart."""
        while self._at and self._at[0] + WINDOW_S <= now:
            self._at.popleft()
        if len(self._at) >= self._limit:
            return None
        self._at.append(now)
        self._short = self._short + 1 if lived_s < SHORT_LIFE_S else 0
        if self._short < 2:
            return 0.0
        return min(FIRST_PAUSE_S * 2.0 ** min(self._short - 2, 10), LONGEST_PAUSE_S)
