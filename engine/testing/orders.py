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
from drumline.protocol.messages import Event, FaultsInjected, InjectFaults, Injection, MessageFault

KEPT_EVENTS = 4096
RESEND_S = 0.2


@dataclass(slots=True)
class Events:
    """The last events of an engine, and those who wait for one."""

    seen: deque[Event] = field(default_factory=lambda: deque(maxlen=KEPT_EVENTS))
    _waiting: list[tuple[Callable[[Event], bool], asyncio.Future[Event]]] = field(default_factory=list)

    def add(self, event: Event) -> None:
        """One has come."""
        self.seen.append(event)
        for wanted, future in list(self._waiting):
            if not future.done() and wanted(event):
                future.set_result(event)

    async def next(self, wanted: Callable[[Event], bool], seconds: float, what: str) -> Event:
        """The first event from now on that is ``wanted``. Raises InjectionFailed with ``what`` when there is none."""
        waiting = (wanted, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        try:
            async with asyncio.timeout(seconds):
                return await waiting[1]
        except TimeoutError:
            raise InjectionFailed(f"{what} within {seconds:g} s") from None
        finally:
            self._waiting.remove(waiting)


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
        """Give an order. Raises InjectionFailed when the engine does not take it."""
        connection, _ = self._engine._require_ready()
        try:
            answer: FaultsInjected = await connection.call(
                lambda call_id: InjectFaults(call_id, injections, messages, full_disk=full_disk), "inject faults"
            )
        except DrumlineError as error:
            raise InjectionFailed(f"the engine did not take the order: {error.text}", None) from error
        if answer.error is not None:
            raise InjectionFailed(f"the engine refused the order: {answer.error.text}")

    async def injected(self, injection: Injection) -> Event:
        """Have a rank do ``injection``; returns the event that says that it does."""
        what = f"rank {injection.rank} did not come to {injection.point!r} for {injection.kind!r}"
        if injection.step >= 0:
            what += f" in or after step {injection.step}"
        self._pending[injection.number] = injection
        waiting = asyncio.ensure_future(
            self._events.next(
                lambda event: event.kind == "injected" and event.done == injection.number, self._timeout_s, what
            )
        )
        try:
            await self.send((injection,))
            return await waiting
        finally:
            waiting.cancel()
            self._pending.pop(injection.number, None)

    async def repeat(self) -> None:
        """Another coordinator has taken over."""
        pending = tuple(self._pending.values())
        if pending:
            await self.send(pending)
