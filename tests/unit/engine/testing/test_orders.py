"""Events are found whether they come before or after somebody waits for them; orders outlive a coordinator."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, cast

import pytest

from drumline.engine.client import AsyncEngine
from drumline.engine.testing.orders import Events, Orders
from drumline.engine.testing.records import InjectionFailed
from drumline.protocol.errors import InvalidRequest, RequestFailed
from drumline.protocol.messages import Event, Injection


def named(kind: str) -> Any:
    return lambda event: event.kind == kind


class Engine:
    """Takes orders, and has them happen when told to."""

    def __init__(self, refusal: Exception | None = None, refusals: int = 1 << 30) -> None:
        self.orders: list[tuple[Injection, ...]] = []
        self.ordered = asyncio.Event()
        self._refusal = refusal
        self._refusals = refusals

    def _require_ready(self) -> tuple[Engine, None]:
        return self, None

    async def inject_faults(
        self, injections: Sequence[Injection], messages: Sequence[object], *, full_disk: int
    ) -> None:
        if self._refusal is not None and self._refusals > 0:
            self._refusals -= 1
            raise self._refusal
        self.orders.append(tuple(injections))
        self.ordered.set()


def orders(engine: Engine, events: Events, timeout_s: float = 5.0) -> Orders:
    return Orders(cast(AsyncEngine, engine), events, timeout_s)


async def test_an_event_from_before_the_wait_is_found_and_an_older_one_is_not() -> None:
    events = Events()
    events.add(Event("fault", "old"))
    since = events.count
    events.add(Event("fault", "new"))
    assert (await events.since(since, named("fault"), 0.1, "nothing")).text == "new"
    with pytest.raises(InjectionFailed, match=r"nothing came within 0\.05 s"):
        await events.since(events.count, named("fault"), 0.05, "nothing came")


async def test_an_event_that_comes_later_is_waited_for() -> None:
    events = Events()
    waiting = asyncio.create_task(events.since(0, named("fault"), 5.0, "nothing"))
    await asyncio.sleep(0)
    events.add(Event("regroup", "other"))
    events.add(Event("fault", "it"))
    assert (await waiting).text == "it"


async def test_the_next_coordinator_is_told_what_has_not_happened() -> None:
    engine, events = Engine(), Events()
    given = orders(engine, events)
    one = Injection(given.next_number(), 1, "kill", "decode")
    waiting = asyncio.create_task(given.injected(one))
    await engine.ordered.wait()
    await given.repeat()
    events.add(Event("injected", "now", 1, done=one.number))
    assert (await waiting).text == "now"
    await given.repeat()
    assert engine.orders == [(one,), (one,)]


async def test_an_order_that_is_given_up_is_taken_back() -> None:
    engine = Engine()
    one = Injection(1, 1, "kill", "decode", 9)
    with pytest.raises(InjectionFailed, match=r"rank 1 did not come to 'decode' for 'kill' from step 9 on within"):
        await orders(engine, Events(), 0.05).injected(one)
    (first, last) = engine.orders
    assert first == (one,)
    assert [(given.number, given.rank, given.kind) for given in last] == [(1, 1, "none")]


async def test_a_refused_order_is_a_fault_that_did_not_happen() -> None:
    engine = Engine(InvalidRequest("fault_injection", False, "an engine made with fault_injection=True"))
    with pytest.raises(InjectionFailed, match="did not take the order: fault_injection"):
        await orders(engine, Events()).injected(Injection(1, 1, "kill"))


async def test_an_order_whose_coordinator_was_lost_is_given_to_the_next() -> None:
    engine = Engine(RequestFailed("the coordinator was lost before it answered"), refusals=2)
    await orders(engine, Events()).send((Injection(1, 1, "kill"),))
    assert engine.orders == [(Injection(1, 1, "kill"),)]
    engine = Engine(RequestFailed("the coordinator was lost before it answered"))
    with pytest.raises(InjectionFailed, match="was lost before it answered"):
        await orders(engine, Events()).send((Injection(1, 1, "kill"),))
