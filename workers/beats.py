"""When a beat is due: once an interval, and at once when the coordinator must know. Opens nothing, reads no clock."""

from __future__ import annotations

from drumline.workers.progress import Position, Progress

LOOK_S = 0.1
WAITED_S = 0.5
"""How long a rank stands still, in a collective or before it, until it says so out of turn."""


class Beats:
    """Told what work comes and asked when to look; at most one beat out of turn for each place where a rank stands."""

    def __init__(self) -> None:
        self.interval_s = 1.0
        self._next = 0.0
        self._look_at: float | None = None
        self._seen = Position()
        self._seen_at = 0.0
        self._told: Position | None = None
        self._told_lease_s = 0.0

    def start(self, interval_s: float) -> None:
        """A coordinator listens from now on and knows nothing yet: the next beat is due."""
        self.interval_s = interval_s
        self._next = 0.0
        self._told_lease_s = 0.0

    def work_comes(self, now: float) -> None:
        """The main thread is given something in which it may wait for other ranks."""
        if self._look_at is None:
            self._look_at = now + LOOK_S
            self._seen = Position()

    @property
    def due_at(self) -> float:
        """When to ask :meth:`due`."""
        return self._next if self._look_at is None else min(self._next, self._look_at)

    def due(self, now: float, progress: Progress, works: bool) -> bool:
        """Whether to send a beat now. ``works``: the main thread has something to do."""
        stands = self._looks(now, progress.position, works)
        if not stands and progress.lease_s == self._told_lease_s and now < self._next:
            return False
        self._told_lease_s = progress.lease_s
        self._next = now + self.interval_s
        return True

    def _looks(self, now: float, position: Position, works: bool) -> bool:
        """Whether the main thread is seen to stand still, for the first time in this place."""
        if self._look_at is None or now < self._look_at:
            return False
        self._look_at = now + LOOK_S if works else None
        if position != self._seen or not works:
            self._seen, self._seen_at = position, now
            return False
        if now - self._seen_at < WAITED_S or position == self._told:
            return False
        self._told = position
        return True
