"""A clock of the time in which this process really ran, for deadlines on other processes."""

from __future__ import annotations

import time
from collections.abc import Callable

TICK_S = 1.0
LONGEST_GAP_S = 2.5 * TICK_S


class RunningClock:
    """Seconds, monotonic, less the time in which nobody read the clock.

    The owner reads it at least every ``TICK_S`` seconds. A longer gap means that the owner itself was stopped or
    starved: what its peers failed to do in that time is no fault of theirs, so it counts as ``LONGEST_GAP_S``.
    """

    def __init__(self, source: Callable[[], float] = time.monotonic) -> None:
        self._source = source
        self._last = source()
        self.stalled_s = 0.0

    def now(self) -> float:
        """Seconds. A gap of more than ``LONGEST_GAP_S`` since the last reading counts as that long."""
        read = self._source()
        gap = read - self._last
        if gap > LONGEST_GAP_S:
            self.stalled_s += gap - LONGEST_GAP_S
        self._last = read
        return read - self.stalled_s
