"""A process on the virtual clock: it acts after a while, unless it has ended; stopped, it acts once it goes on."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from tests.simulation.cluster.clock import Clock

SIGABRT, SIGKILL, SIGSEGV = 6, 9, 11


class SimProcess:
    """``hung``: the main thread stands still for good. ``factor``: how much slower than usual it computes."""

    def __init__(self, clock: Clock, pid: int) -> None:
        self.clock = clock
        self.pid = pid
        self.alive = True
        self.stopped = False
        self.hung = False
        self.factor = 1.0
        self._asleep: list[Callable[[], None]] = []

    def later(self, seconds: float, act: Callable[[], None]) -> None:
        """Do something in so many seconds, unless the process has ended; while it is stopped it waits."""
        self.clock.after(seconds, partial(self._wake, act))

    def when_running(self, act: Callable[[], None]) -> None:
        """Do something now, or while the process is stopped, once it goes on; never once it has ended."""
        self._wake(act)

    def soon(self, mean: float, act: Callable[[], None]) -> None:
        """The same after a random time."""
        self.later(self.clock.random.expovariate(1.0) * mean, act)

    def _wake(self, act: Callable[[], None]) -> None:
        if not self.alive:
            return
        if self.stopped:
            self._asleep.append(act)
        else:
            act()

    def stop(self, seconds: float) -> None:
        """SIGSTOP, and SIGCONT in ``seconds`` (0: never)."""
        if not self.alive or self.stopped:
            return
        self.stopped = True
        self.clock.note(f"{self} is stopped for {seconds:.2f} s")
        if seconds > 0:
            self.clock.after(seconds, self.go_on)

    def go_on(self) -> None:
        """SIGCONT: everything that waited comes to pass now."""
        if not self.alive or not self.stopped:
            return
        self.stopped = False
        self.clock.note(f"{self} goes on")
        asleep, self._asleep = self._asleep, []
        for act in asleep:
            self._wake(act)
        self.went_on()

    def end(self, code: int = 0, signal: int = 0) -> None:
        """The process ends."""
        if not self.alive:
            return
        self.alive = False
        self.clock.note(f"{self} ends, code {code} signal {signal}")
        self.ended(code, signal)

    def ended(self, code: int, signal: int) -> None:
        """What follows from the end."""

    def went_on(self) -> None:
        """What follows from going on."""

    def hang(self) -> None:
        """The main thread stands still for good, the control thread goes on."""
        if self.alive:
            self.hung = True
            self.clock.note(f"{self} hangs")
