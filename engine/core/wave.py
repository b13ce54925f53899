"""The wave of one lockstep group: ``PAUSED(n) -> RUNNING(n) -> PAUSED(n + 1)``.

One owner holds it, so it needs no agreement between ranks: the coordinator knows every replica's work and every step in
flight. Its number survives epochs.
"""

from __future__ import annotations

import enum


class WaveState(enum.Enum):
    """RUNNING from the first step with work until nothing is unfinished and no step is in flight."""

    PAUSED = "paused"
    RUNNING = "running"


class Wave:
    """Opens with work and closes when nothing is unfinished and no step is in flight."""

    def __init__(self) -> None:
        self.number = 0
        self.state = WaveState.PAUSED
        self._spent = False

    def step(self) -> int:
        """A step with work is being planned. Returns the number of the wave that it belongs to.

        Work that arrives after a wave's last token while its last steps are still in flight opens the next wave at
        once, without draining them.
        """
        if self.state is WaveState.RUNNING and self._spent:
            self.number += 1
        self.state = WaveState.RUNNING
        self._spent = False
        return self.number

    def settle(self, unfinished: int, in_flight: int) -> None:
        """What stands after results, ends and arrivals: sequences unfinished, steps in flight."""
        if self.state is not WaveState.RUNNING:
            return
        if unfinished == 0:
            self._spent = True
            if in_flight == 0:
                self.state = WaveState.PAUSED
                self.number += 1
                self._spent = False
