"""Whether there is a coordinator, as a client knows it: for how long it has been silent, and for how long there was
none. No I/O; reads no clock."""

from __future__ import annotations

import enum

import msgspec


class Timing(msgspec.Struct, frozen=True):
    """Seconds. ``tick_s``: between looks at the clock. ``silence_s``: a coordinator that was not heard for so long is
    given up for the next one; it is probed from ``probe_s`` on. ``start_silence_s``: the same before it is ready.
    ``lease_s``: how long there may be no coordinator. ``answer_s``: how long a call waits, not counting the time in
    which there was none. ``repeat_s``: a submission that is not answered after so long is sent again."""

    tick_s: float = 1.0
    probe_s: float = 4.0
    silence_s: float = 15.0
    start_silence_s: float = 150.0
    lease_s: float = 60.0
    answer_s: float = 30.0
    repeat_s: float = 5.0


class Verdict(enum.Enum):
    """What is to be done about the coordinator."""

    NOTHING = "nothing"
    PROBE = "probe"
    DROP = "drop"
    """It is mute: another may have taken its place."""
    END = "end"
    """Nobody is there, and nobody comes any more."""


class Presence:
    """``silent_s``: time since something was heard in which this process ran itself."""

    def __init__(self, timing: Timing) -> None:
        self._timing = timing
        self.silent_s = 0.0
        self._last: float | None = None
        self._lost_at: float | None = None
        self._outages_s = 0.0

    def heard(self) -> None:
        """The coordinator has said something."""
        self.silent_s = 0.0

    def lost(self, now: float) -> bool:
        """The connection to a coordinator that had said welcome is lost. Whether that is news."""
        if self._lost_at is not None:
            return False
        self._lost_at = now
        self.silent_s = 0.0
        return True

    def back(self, now: float) -> float:
        """A coordinator is there again. For how long there was none."""
        outage = now - self._lost_at if self._lost_at is not None else 0.0
        self._outages_s += outage
        self._lost_at = None
        return outage

    def outages_s(self, now: float) -> float:
        """For how long there has been no coordinator, in all."""
        return self._outages_s + (now - self._lost_at if self._lost_at is not None else 0.0)

    def judge(self, now: float, *, up: bool, starting: bool) -> Verdict:
        """To be asked every ``tick_s``. ``up``: it has said welcome; ``starting``: it has not, but is expected to."""
        timing = self._timing
        # Time in which the app kept this loop from running does not count against the coordinator.
        if self._last is not None:
            self.silent_s += min(now - self._last, 2 * timing.tick_s)
        self._last = now
        if up and self.silent_s > timing.silence_s:
            return Verdict.DROP
        if not up and self.silent_s > (timing.start_silence_s if starting else timing.lease_s):
            return Verdict.END
        return Verdict.PROBE if self.silent_s >= timing.probe_s and (up or starting) else Verdict.NOTHING
