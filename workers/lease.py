"""A rank's time without a coordinator: how long it lasts, and when to connect again. Opens nothing, reads no clock."""

from __future__ import annotations

import random
from collections.abc import Callable

FIRST_RETRY_S = 0.05
LAST_RETRY_S = 1.0


class Lease:
    """Runs from the loss of a coordinator that had welcomed the rank until the next one does. ``draw``: 0.0 to 1.0."""

    def __init__(self, draw: Callable[[], float] = random.random) -> None:
        self.ends_at: float | None = None
        self.retry_at = 0.0
        self._draw = draw
        self._delay_s = FIRST_RETRY_S

    @property
    def runs(self) -> bool:
        """Whether there is no coordinator, and the next one is waited for."""
        return self.ends_at is not None

    def lost(self, now: float, lease_s: float) -> None:
        """A connection ended; one that ends again before a Welcome makes the wait no longer."""
        if self.ends_at is None:
            self.ends_at = now + lease_s
            self._delay_s = FIRST_RETRY_S
        # Ranks that lost the same coordinator must not come back in step.
        self.retry_at = now + self._delay_s * (0.5 + 0.5 * self._draw())
        self._delay_s = min(LAST_RETRY_S, 2 * self._delay_s)

    def over(self, now: float) -> bool:
        """Whether nobody has come in time."""
        return self.ends_at is not None and now >= self.ends_at

    def welcomed(self) -> None:
        """Somebody has."""
        self.ends_at = None
