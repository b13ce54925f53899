"""Virtual time, and what happened in it."""

from __future__ import annotations

import heapq
import random
from collections import Counter, deque
from collections.abc import Callable

REMEMBERED = 80


class Clock:
    """Events in order of their moments; those of one moment in the order in which they were set. ``random`` decides
    every delay. ``verbose``: everything is printed. ``seen`` counts what happened, ``past`` keeps the last of it for a
    failure's text."""

    def __init__(self, seed: int, verbose: bool = False) -> None:
        self.now = 0.0
        self.random = random.Random(seed)
        self.handled = 0
        self.seen: Counter[str] = Counter()
        self.past: deque[str] = deque(maxlen=REMEMBERED)
        self.verbose = verbose
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = 0

    def at(self, moment: float, handle: Callable[[], None]) -> None:
        """Call ``handle`` at ``moment``, or now if that has passed."""
        self._order += 1
        heapq.heappush(self._events, (max(moment, self.now), self._order, handle))

    def after(self, seconds: float, handle: Callable[[], None]) -> None:
        """Call ``handle`` in so many seconds."""
        self.at(self.now + seconds, handle)

    def soon(self, mean: float, handle: Callable[[], None]) -> None:
        """Call ``handle`` after a random time."""
        self.at(self.now + self.random.expovariate(1.0) * mean, handle)

    def step(self) -> bool:
        """Handle the next event; False when there is none."""
        if not self._events:
            return False
        self.now, _, handle = heapq.heappop(self._events)
        self.handled += 1
        handle()
        return True

    def note(self, text: str) -> None:
        """Remember that something happened."""
        line = f"{self.now:9.4f} {text}"
        self.past.append(line)
        if self.verbose:
            print(line)
