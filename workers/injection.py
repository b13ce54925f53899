"""Faults that a rank brings upon itself because a test orders them.

Nothing is ordered unless the engine was made with ``fault_injection``. Before a fault takes effect the coordinator
is told so with Injected: the control thread sends it, and the main thread waits until it has.
"""

from __future__ import annotations

import logging
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Sequence

import msgspec

from drumline.protocol.fault_names import POINTS, RANK_KINDS
from drumline.protocol.messages import Injection, Step

log = logging.getLogger(__name__)

IDLE_S = 0.2
"""How long an open epoch has had no step at the point ``idle``."""
PROCESS_KINDS = ("kill", "stop", "exit", "segv")
"""What can befall the process while the main thread is anywhere."""
EXIT_INJECTED = 1
_SLICE_S = 0.02


class InjectedError(RuntimeError):
    """What ``raise`` raises."""


class Injections:
    """Those that have not come yet, by number. Both threads use it; ``armed`` costs nothing to look at."""

    def __init__(self, rank: int) -> None:
        self.armed = False
        self.refused = 0
        self._rank = rank
        self._lock = threading.Lock()
        self._waiting: tuple[Injection, ...] = ()
        self._done: set[int] = set()

    def replace(self, injections: Sequence[Injection]) -> None:
        """``injections`` of this rank take the place of those that have not come yet. One that has come never comes
        again: the order may have crossed with the news."""
        with self._lock:
            fresh = [one for one in injections if one.rank == self._rank and one.number not in self._done]
            known = [one for one in fresh if one.kind in RANK_KINDS and one.point in POINTS]
            self.refused += len(fresh) - len(known)
            self._waiting = tuple(_placed(one) for one in known)
            self.armed = bool(known)

    def take(self, points: Sequence[str], step: int | None = None) -> Injection | None:
        """The first of those that wait for one of ``points``; in a step, with its number. It is done with then."""
        with self._lock:
            for one in self._waiting:
                if one.point in points and (step is None or one.step <= step):
                    self._waiting = tuple(other for other in self._waiting if other is not one)
                    self._done.add(one.number)
                    self.armed = bool(self._waiting)
                    return one
        return None

    def awaits(self, point: str) -> bool:
        """Whether one waits for ``point``."""
        return self.armed and any(one.point == point for one in self._waiting)


def _placed(one: Injection) -> Injection:
    """Logits are made in steps alone."""
    if one.kind == "nan" and one.point in ("now", "loading"):
        return msgspec.structs.replace(one, point="step")
    return one


def text_of(one: Injection) -> str:
    """What is told of it."""
    return f"{one.kind} at {one.point}" + (f" from step {one.step} on" if one.step >= 0 else "")


def strike(kind: str) -> None:
    """``kill``, ``stop`` or ``segv`` on this process. Comes back from ``stop`` alone, once somebody lets it go on."""
    if kind == "segv":
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    number = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "segv": signal.SIGSEGV}[kind]
    os.kill(os.getpid(), number)


def points_of(step: Step, computes: bool) -> tuple[str, ...]:
    """The points that ``step`` is. ``computes``: this replica has tokens in it."""
    if not computes:
        return ("step",)
    if len(step.prefill_counts) and int(step.prefill_counts.max()) > 1:
        return ("step", "prefill")
    return ("step",) if len(step.prefill_counts) else ("step", "decode")


class Slowness:
    """Makes steps take ``factor`` times as long, for ``seconds`` or, at 0, for good."""

    def __init__(self, factor: float, seconds: float) -> None:
        self._factor = factor
        self._ends_at = time.monotonic() + seconds if seconds > 0 else None

    @property
    def over(self) -> bool:
        return self._ends_at is not None and time.monotonic() >= self._ends_at

    def stretch(self, took_s: float, check: Callable[[], None]) -> None:
        """Sleep for as much longer as a step of ``took_s`` has to be. ``check`` raises when its epoch is over."""
        end = time.monotonic() + (self._factor - 1.0) * took_s
        while (left := end - time.monotonic()) > 0:
            time.sleep(min(left, _SLICE_S))
            check()


class FaultInjector:
    """What the main thread does at the points that it comes to. ``tell`` sends Injected and returns once it is sent;
    ``finish`` ends the process with a status; ``spoil`` makes the next logits NaN."""

    def __init__(
        self,
        waiting: Injections,
        tell: Callable[[Injection], None],
        finish: Callable[[int], None],
        spoil: Callable[[], None],
    ) -> None:
        self.waiting = waiting
        self._tell = tell
        self._finish = finish
        self._spoil = spoil
        self._slowness: Slowness | None = None

    def reach(self, *points: str, step: int | None = None) -> None:
        """Bring about what waits for one of ``points``. Raises InjectedError when that is to raise."""
        while self.waiting.armed and (one := self.waiting.take(points, step)) is not None:
            self.bring(one)

    def bring(self, one: Injection) -> None:
        """Tell of ``one``, and have it happen."""
        self._tell(one)
        log.warning("injected fault %d: %s", one.number, text_of(one))
        if one.kind == "exit":
            self._finish(EXIT_INJECTED)
        elif one.kind in PROCESS_KINDS:
            strike(one.kind)
        elif one.kind == "raise":
            raise InjectedError(f"injected fault {one.number}")
        elif one.kind == "nan":
            self._spoil()
        elif one.kind == "slow":
            self._slowness = Slowness(one.factor, one.seconds)
        else:
            while True:  # hang: no flag is looked at, so that nothing but the end of the process helps
                time.sleep(1.0)

    def stretch(self, took_s: float, check: Callable[[], None]) -> None:
        """After a step that took ``took_s``: sleep, if steps are to be slow."""
        slow = self._slowness
        if slow is None:
            return
        if slow.over:
            self._slowness = None
        else:
            slow.stretch(took_s, check)
