"""What is done to messages on purpose: to which, how often, for how long, and what the receiver sees of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from drumline.engine.message_faults import MAX_RULES, FaultRules, MessageFaults
from drumline.protocol.codec import Codec
from drumline.protocol.messages import BeatWorker, FromWorkerSide, Leave, MessageFault, ToWorker
from drumline.protocol.sockets import Dealer, Router, SendResult

BEAT = BeatWorker(1, 1, 0, 1, 1, False)


def rules(*faults: MessageFault) -> FaultRules:
    made = FaultRules()
    made.add(faults, 0.0)
    return made


def met(made: FaultRules, direction: str = "to_worker", name: str = "Step", rank: int = 0, now: float = 1.0) -> str:
    fault = made.decide(direction, name, rank, now)
    return fault.kind if fault is not None else ""


@pytest.mark.parametrize(
    ("fault", "struck", "spared"),
    [
        (MessageFault("drop"), {"rank": 7}, None),
        (MessageFault("drop", direction="from_worker"), {"direction": "from_worker"}, {"direction": "to_worker"}),
        (MessageFault("drop", messages=("Leave",)), {"name": "Leave"}, {"name": "Step"}),
        (MessageFault("drop", ranks=(1, 2)), {"rank": 2}, {"rank": 0}),
        (MessageFault("drop", lasting_s=5.0), {"now": 5.0}, {"now": 5.1}),
    ],
)
def test_a_fault_befalls_what_it_is_about_and_nothing_else(
    fault: MessageFault, struck: dict[str, Any], spared: dict[str, Any] | None
) -> None:
    made = rules(fault)
    assert met(made, **struck) == "drop"
    if spared is not None:
        assert met(made, **spared) == ""
    assert made.counts["drop"] == 1


def test_a_fault_befalls_as_many_messages_as_it_says() -> None:
    made = rules(MessageFault("drop", times=2))
    assert [met(made) for _ in range(4)] == ["drop", "drop", "", ""]


def test_the_first_fault_that_meets_a_message_has_it() -> None:
    made = rules(MessageFault("drop", times=1), MessageFault("duplicate"))
    assert [met(made), met(made)] == ["drop", "duplicate"]


def test_the_same_seed_strikes_the_same_messages() -> None:
    first, second = (rules(MessageFault("drop", probability=0.3, seed=4)) for _ in range(2))
    struck = [met(first) for _ in range(400)]
    assert struck == [met(second) for _ in range(400)]
    assert 80 < struck.count("drop") < 160


def test_messages_are_counted_under_the_number_of_their_fault() -> None:
    made = rules(MessageFault("drop", ranks=(0,), number=5), MessageFault("drop", ranks=(1,), number=6))
    met(made, rank=1)
    assert made.met == {5: 0, 6: 1}


def test_rules_and_their_counts_are_bounded() -> None:
    made = rules()
    for number in range(1, 2 * MAX_RULES):
        made.add((MessageFault("drop", number=number, ranks=(number,)),), 0.0)
    assert len(made.rules) == len(made.met) == MAX_RULES
    assert met(made, rank=2 * MAX_RULES - 1) == "drop"


# ------------------------------------------------------------------------------------- between a router and a dealer


class Link:
    """A worker port's router with faults, and the dealer of rank 0."""

    def __init__(self, context: zmq.Context[Any], endpoint: str) -> None:
        self.taken: list[FromWorkerSide] = []
        self.peer = b""
        self.router: Router[FromWorkerSide] = Router(context, endpoint, Codec(FromWorkerSide))
        self.faults = MessageFaults(
            self.router, lambda _, message: self.taken.append(message), lambda _: 0, asyncio.get_running_loop().time
        )
        self.dealer: Dealer[ToWorker] = Dealer(context, endpoint, Codec(ToWorker))

    def order(self, fault: MessageFault) -> None:
        self.faults.add((fault,), asyncio.get_running_loop().time())

    async def up(self) -> list[FromWorkerSide]:
        """What is taken of one beat."""
        self.taken.clear()
        assert self.dealer.send(BEAT) is SendResult.SENT
        async with asyncio.timeout(5.0):
            self.peer, message = await self.router.recv()
        self.faults.received(self.peer, message)
        return list(self.taken)

    async def down(self, seconds: float = 0.1) -> list[ToWorker]:
        """What arrives of one Leave within ``seconds``."""
        assert self.faults.send(self.peer, Leave(1, 1)) is SendResult.SENT
        arrived: list[ToWorker] = []
        try:
            async with asyncio.timeout(seconds):
                while True:
                    arrived.append(await self.dealer.recv())
        except TimeoutError:
            return arrived


@pytest.fixture
async def link(tmp_path: Path) -> AsyncIterator[Link]:
    context: zmq.Context[Any] = zmq.Context()
    made = Link(context, f"ipc://{tmp_path}/w.sock")
    await made.up()
    yield made
    made.faults.close()
    made.dealer.close(0.0)
    made.router.close(0.0)
    context.term()


@pytest.mark.parametrize(("kind", "copies"), [("drop", 0), ("duplicate", 2), ("corrupt", 0)])
async def test_messages_are_lost_doubled_or_damaged_in_both_directions(link: Link, kind: str, copies: int) -> None:
    link.order(MessageFault(kind))
    assert await link.up() == [BEAT] * copies
    assert await link.down() == [Leave(1, 1)] * copies
    damaged = (link.router.statistics().malformed, link.dealer.statistics().malformed)
    assert damaged == ((1, 1) if kind == "corrupt" else (0, 0))
    link.faults.clear()
    assert await link.up() == [BEAT]
    assert await link.down() == [Leave(1, 1)]


async def test_a_late_message_comes_late_and_only_once(link: Link) -> None:
    link.order(MessageFault("delay", seconds=0.2))
    assert await link.up() == []
    assert await link.down(0.05) == []
    await asyncio.sleep(0.3)
    assert link.taken == [BEAT]
    async with asyncio.timeout(5.0):
        assert await link.dealer.recv() == Leave(1, 1)


async def test_what_is_late_when_the_port_closes_never_comes(link: Link) -> None:
    link.order(MessageFault("delay", seconds=0.1))
    await link.up()
    link.faults.close()
    await asyncio.sleep(0.2)
    assert link.taken == []
