"""Connections between processes: ordered, with random delays, and what an injected fault does to messages."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from drumline.protocol.messages import MessageFault
from tests.simulation.cluster.clock import Clock


@dataclass(slots=True)
class ActiveFault:
    """A message fault from when it was ordered on."""

    fault: MessageFault
    ends_at: float
    random: random.Random
    left: int


class MessageFaults:
    """What is done to messages between the coordinator and its ranks now."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._active: list[ActiveFault] = []

    def add(self, fault: MessageFault) -> None:
        """From now on, for as long as it says."""
        lasting = fault.lasting_s or 1e9
        self._active.append(
            ActiveFault(fault, self._clock.now + lasting, random.Random(fault.seed), fault.times or 1 << 30)
        )

    def clear(self) -> None:
        """No more of them."""
        self._active.clear()

    def strikes(self, direction: str, rank: int, message: object) -> MessageFault | None:
        """The fault that befalls a message, if one does."""
        if not self._active:
            return None
        name = type(message).__name__
        for active in self._active:
            fault = active.fault
            if self._clock.now >= active.ends_at or active.left <= 0:
                continue
            if fault.direction not in (direction, "both") or (fault.ranks and rank not in fault.ranks):
                continue
            if (fault.messages and name not in fault.messages) or active.random.random() >= fault.probability:
                continue
            active.left -= 1
            return fault
        return None


@dataclass(slots=True)
class Wire:
    """One direction of a connection. What is under way when it is cut is lost. ``tampered``: a fault has befallen one
    of its messages, so that what comes out need not be what the protocol says."""

    clock: Clock
    delay: float
    deliver: Callable[[Any], None]
    direction: str = ""
    rank: int = -1
    faults: MessageFaults | None = None
    is_open: bool = True
    tampered: bool = False
    held_until: float = 0.0
    arrives: float = 0.0

    def send(self, message: Any) -> None:
        """Deliver ``message`` after those that were sent before."""
        if not self.is_open:
            return
        clock = self.clock
        fault = self.faults.strikes(self.direction, self.rank, message) if self.faults is not None else None
        if fault is not None:
            self.tampered = True
            clock.seen["message_" + fault.kind] += 1
            clock.note(f"{fault.kind} {type(message).__name__} {self.direction} rank {self.rank}")
            if fault.kind in ("drop", "corrupt"):
                return
            # What is late comes whenever it comes, and so does the second copy of what is double.
            clock.after(fault.seconds + self._latency(), partial(self._arrive, message))
            if fault.kind == "delay":
                return
        self._in_order(message)

    def _latency(self) -> float:
        return self.clock.random.expovariate(1.0) * self.delay

    def _in_order(self, message: Any) -> None:
        at = max(self.arrives, self.held_until, self.clock.now + self._latency())
        self.arrives = at
        self.clock.at(at, partial(self._arrive, message))

    def _arrive(self, message: Any) -> None:
        if not self.is_open:
            return
        if self.held_until > self.clock.now:
            self._in_order(message)
            return
        self.deliver(message)

    def cut(self) -> None:
        """The connection is gone."""
        self.is_open = False

    def hold(self, until: float) -> None:
        """A partition: nothing arrives before ``until``; nothing is lost either, the sender sends again."""
        self.held_until = max(self.held_until, until)


@dataclass(slots=True)
class Line:
    """Both directions of one connection, named by the identity of the process that made it."""

    identity: bytes
    up: Wire
    down: Wire
    closed: list[Callable[[], None]] = field(default_factory=list)

    @property
    def tampered(self) -> bool:
        """Whether a fault has befallen any of its messages."""
        return self.up.tampered or self.down.tampered

    def cut(self) -> None:
        """End both directions."""
        self.up.cut()
        self.down.cut()

    def hold(self, until: float) -> None:
        """Nothing passes before ``until``."""
        self.up.hold(until)
        self.down.hold(until)
