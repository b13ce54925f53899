"""Faults that the engine brings about itself: orders to the coordinator, and what is heard of them."""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from drumline.engine.client import AsyncEngine
from drumline.engine.testing.records import InjectionFailed
from drumline.protocol.errors import DrumlineError
from drumline.protocol.fault_names import TAKEN_BACK
from drumline.protocol.messages import Event, Injection, MessageFault

KEPT_EVENTS = 4096
ATTEMPTS = 5


@dataclass(slots=True)
class _Waiter:
    wanted: Callable[[Event], bool]
    event: asyncio.Future[Event]


@dataclass(slots=True)
class Events:
    """The last events of an engine, and those who wait for one. ``count``: how many there have been."""

    count: int = 0
    seen: deque[Event] = field(default_factory=lambda: deque(maxlen=KEPT_EVENTS))
    _waiters: list[_Waiter] = field(default_factory=list)

    def add(self, event: Event) -> None:
        """One has come."""
        self.count += 1
        self.seen.append(event)
        for waiter in self._waiters:
            if not waiter.event.done() and waiter.wanted(event):
                waiter.event.set_result(event)

    async def since(self, count: int, wanted: Callable[[Event], bool], seconds: float, what: str) -> Event:
        """The first event after the first ``count`` that is ``wanted``. Raises InjectionFailed, saying ``what``, when
        there is none within ``seconds``."""
        late = min(self.count - count, len(self.seen))
        for event in list(self.seen)[len(self.seen) - late :]:
            if wanted(event):
                return event
        waiter = _Waiter(wanted, asyncio.get_running_loop().create_future())
        self._waiters.append(waiter)
        try:
            async with asyncio.timeout(seconds):
                return await waiter.event
        except TimeoutError:
            raise InjectionFailed(f"{what} within {seconds:g} s") from None
        finally:
            self._waiters.remove(waiter)


class Orders:
    """Orders to the coordinator of ``engine``. Those to ranks that have not come to pass are given again to the next
    coordinator, which knows nothing of them."""

    def __init__(self, engine: AsyncEngine, events: Events, timeout_s: float) -> None:
        self._engine = engine
        self._events = events
        self._timeout_s = timeout_s
        self._numbers = itertools.count(1)
        self._pending: dict[int, Injection] = {}

    def next_number(self) -> int:
        """One that no order has had."""
        return next(self._numbers)

    async def send(
        self, injections: tuple[Injection, ...] = (), messages: tuple[MessageFault, ...] = (), full_disk: int = -1
    ) -> None:
        """Give an order, again if the coordinator is lost before it has answered: orders have numbers, and what was
        done to the messages of a coordinator ended with it. Raises InjectionFailed when the engine does not take it."""
        for attempt in range(ATTEMPTS):
            try:
                connection, _ = self._engine._require_ready()
                await connection.inject_faults(injections, messages, full_disk=full_disk)
            except DrumlineError as error:
                if not error.retryable or attempt == ATTEMPTS - 1:
                    raise InjectionFailed(f"the engine did not take the order: {error.text}") from error
            else:
                return

    async def injected(self, injection: Injection) -> Event:
        """Have a rank do ``injection``; returns the event in which it says that it does. An order that is given up is
        taken back."""
        what = f"rank {injection.rank} did not come to {injection.point!r} for {injection.kind!r}"
        if injection.step >= 0:
            what += f" from step {injection.step} on"
        before = self._events.count
        self._pending[injection.number] = injection
        happened = False
        try:
            await self.send((injection,))
            event = await self._events.since(
                before, lambda one: one.kind == "injected" and one.done == injection.number, self._timeout_s, what
            )
            happened = True
            return event
        finally:
            del self._pending[injection.number]
            if not happened:
                await self._take_back(injection)

    async def _take_back(self, injection: Injection) -> None:
        try:
            await self.send((Injection(injection.number, injection.rank, TAKEN_BACK),))
        except DrumlineError:
            return  # the engine is at its end, or cannot be reached: nothing to take back from

    async def repeat(self) -> None:
        """Another coordinator has taken over."""
        pending = tuple(self._pending.values())
        if pending:
            await self.send(pending)
