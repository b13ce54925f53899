"""What happens on purpose to messages between coordinator and ranks: some are lost, late, doubled or damaged."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from drumline.protocol.fault_names import MESSAGE_KINDS
from drumline.protocol.messages import FromWorkerSide, MessageFault, ToWorker
from drumline.protocol.sockets import Router, SendResult

DAMAGED = b"\xc1" * 16
"""A byte that msgpack never uses: no decoder takes it."""
MAX_RULES = 256
MAX_LATE = 4096


@dataclass(slots=True)
class Rule:
    """A fault from ``since`` on. ``times``: how many messages it has met."""

    fault: MessageFault
    since: float
    random: random.Random
    times: int = 0

    def meets(self, direction: str, name: str, rank: int, now: float) -> bool:
        """Whether it befalls this message; the dice are thrown only for messages that it is about."""
        fault = self.fault
        if (fault.lasting_s and now > self.since + fault.lasting_s) or (fault.times and self.times >= fault.times):
            return False
        if fault.direction not in ("both", direction) or (fault.messages and name not in fault.messages):
            return False
        if fault.ranks and rank not in fault.ranks:
            return False
        if fault.probability < 1.0 and self.random.random() >= fault.probability:
            return False
        self.times += 1
        return True


@dataclass(slots=True)
class FaultRules:
    """The rules in force; decides and does nothing. The first one that meets a message has it. ``met``: how many
    messages each of the last numbered ones has met."""

    rules: list[Rule] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(MESSAGE_KINDS, 0))
    met: dict[int, int] = field(default_factory=dict)

    def add(self, faults: tuple[MessageFault, ...], now: float) -> None:
        """More rules. Those whose time is over make room."""
        alive = [one for one in self.rules if not one.fault.lasting_s or now <= one.since + one.fault.lasting_s]
        self.rules = [*alive, *(Rule(fault, now, random.Random(fault.seed)) for fault in faults)][-MAX_RULES:]
        self.met.update(dict.fromkeys((fault.number for fault in faults if fault.number), 0))
        while len(self.met) > MAX_RULES:
            del self.met[next(iter(self.met))]

    def decide(self, direction: str, name: str, rank: int, now: float) -> MessageFault | None:
        """What befalls a message: ``direction`` is to_worker or from_worker, ``name`` that of its class."""
        for rule in self.rules:
            if rule.meets(direction, name, rank, now):
                self.counts[rule.fault.kind] += 1
                if rule.fault.number in self.met:
                    self.met[rule.fault.number] += 1
                return rule.fault
        return None


class MessageFaults:
    """Between the worker port and its ``router``. ``take`` is given what arrives, when it does; ``rank_of`` says which
    rank a socket identity belongs to, -1 for none."""

    def __init__(
        self,
        router: Router[FromWorkerSide],
        take: Callable[[bytes, FromWorkerSide], None],
        rank_of: Callable[[bytes], int],
        read_clock: Callable[[], float],
    ) -> None:
        self.rules = FaultRules()
        self._router = router
        self._take = take
        self._rank_of = rank_of
        self._now = read_clock
        self._loop = asyncio.get_running_loop()
        self._late: set[asyncio.TimerHandle] = set()

    @property
    def counts(self) -> dict[str, int]:
        """How many messages were dropped, delayed, duplicated and corrupted, and met by each fault with a number."""
        return self.rules.counts | {f"fault_{number}": times for number, times in self.rules.met.items()}

    def add(self, faults: tuple[MessageFault, ...], now: float) -> None:
        """From now on these happen, too."""
        self.rules.add(faults, now)

    def clear(self) -> None:
        """From now on nothing happens; what is late still comes."""
        self.rules.rules.clear()

    def received(self, peer: bytes, message: FromWorkerSide) -> None:
        """A message has come. Of one that is damaged on the way come bytes that do not decode."""
        rank = self._rank_of(peer)
        fault = self.rules.decide("from_worker", type(message).__name__, rank, self._now()) if rank >= 0 else None
        if fault is None:
            self._take(peer, message)
        elif fault.kind == "delay":
            self._later(fault.seconds, lambda: self._take(peer, message))
        elif fault.kind == "duplicate":
            self._take(peer, message)
            self._take(peer, message)
        elif fault.kind == "corrupt":
            self._router.take_encoded(peer, [DAMAGED])

    def send(self, peer: bytes, message: ToWorker) -> SendResult:
        """Send a message, or do to it what is to be done. One that is lost or late counts as sent."""
        fault = self.rules.decide("to_worker", type(message).__name__, self._rank_of(peer), self._now())
        if fault is None:
            return self._router.send(peer, message)
        if fault.kind == "duplicate":
            self._router.send(peer, message)
            return self._router.send(peer, message)
        if fault.kind == "corrupt":
            return self._router.send_encoded(peer, [DAMAGED])
        if fault.kind == "delay":
            self._later(fault.seconds, lambda: self._router.send(peer, message))
        return SendResult.SENT

    def _later(self, seconds: float, act: Callable[[], object]) -> None:
        if len(self._late) >= MAX_LATE:
            return  # lost instead: that may happen to a message too

        def due() -> None:
            self._late.discard(handle)
            act()

        handle = self._loop.call_later(seconds, due)
        self._late.add(handle)

    def close(self) -> None:
        """What is late never comes."""
        for handle in self._late:
            handle.cancel()
        self._late.clear()
