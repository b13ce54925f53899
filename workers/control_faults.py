"""Injected faults as far as the control thread has to do with them: orders, and what befalls the process."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from drumline.protocol.messages import Injected, Injection, WorkerConfig
from drumline.workers.inbox import Trigger
from drumline.workers.injection import EXIT_INJECTED, IDLE_S, PROCESS_KINDS, Injections, strike, text_of

if TYPE_CHECKING:
    from drumline.workers.control import Control

_LOOK_S = 0.05


class ControlFaults:
    """Kills the process, or has the main thread fail, at the points ``now`` and ``idle``; the others are the main
    thread's. ``waiting`` is for both."""

    def __init__(self, control: Control) -> None:
        self.waiting = Injections(control.identity.rank)
        self._control = control
        self._unwanted = 0

    @property
    def refused(self) -> int:
        """How many orders were not obeyed."""
        return self._unwanted + self.waiting.refused

    def order(self, injections: Sequence[Injection], config: WorkerConfig | None) -> None:
        """Take an order, unless the engine was not made for that, which is counted."""
        if config is None or not config.fault_injection:
            self._unwanted += 1
            return
        self.waiting.replace(injections)
        self._reach("now")

    def due_at(self, now: float) -> float:
        """When to call :meth:`keep_time`."""
        return now + _LOOK_S if self.waiting.awaits("idle") else math.inf

    def keep_time(self, now: float) -> None:
        """Look whether the epoch is idle, for who waits for that."""
        if self.waiting.awaits("idle"):
            since = self._control.progress.idle_since
            if since is not None and now - since >= IDLE_S and not len(self._control.inbox):
                self._reach("idle")

    def injected(self, one: Injection) -> Injected:
        """What is told of ``one`` before it takes effect."""
        me = self._control.identity
        return Injected(self._control.term, me.rank, me.incarnation, one.number, text_of(one))

    def _reach(self, point: str) -> None:
        while self.waiting.armed and (one := self.waiting.take((point,))) is not None:
            if one.kind not in PROCESS_KINDS:
                self._control.inbox.put(Trigger(one))
                continue
            self._control.outbox.flush(self.injected(one))
            if one.kind == "exit":
                self._control.leave(EXIT_INJECTED)
            strike(one.kind)
