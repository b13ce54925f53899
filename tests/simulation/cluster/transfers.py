"""The communicator of an epoch that experts travel by: messages of a pair of ranks arrive in the order of their
sending, and meet the receives in the order in which those were posted."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from tests.simulation.worker import RuleBrokenError

if TYPE_CHECKING:
    from tests.simulation.cluster.clock import Clock
    from tests.simulation.cluster.rank import SimRank


@dataclass(frozen=True, slots=True, eq=False)
class Post:
    """A send or a receive that ``process`` has posted. ``key``: (generation, part), the same on both sides."""

    process: SimRank
    key: tuple[int, int]
    through: Callable[[int], None]
    content: int = -1


@dataclass(slots=True)
class Pair:
    """What is posted from one rank to another and has not met yet."""

    sends: deque[Post] = field(default_factory=deque)
    receives: deque[Post] = field(default_factory=deque)
    arrives: float = 0.0


class Transfers:
    """``mean_s``: how long one takes once both sides have posted it; ``stuck``: by rank, until when none gets through
    from or to it."""

    def __init__(self, clock: Clock, mean_s: float, stuck: Mapping[int, float]) -> None:
        self._clock = clock
        self._mean_s = mean_s
        self._stuck = stuck
        self._pairs: dict[tuple[int, int], Pair] = {}

    def send(self, to: int, post: Post) -> None:
        """Post a send of ``post.content`` to rank ``to``."""
        pair = self._pairs.setdefault((post.process.rank, to), Pair())
        pair.sends.append(post)
        self._meet(pair)

    def receive(self, source: int, post: Post) -> None:
        """Post a receive from rank ``source``."""
        pair = self._pairs.setdefault((source, post.process.rank), Pair())
        pair.receives.append(post)
        self._meet(pair)

    def _meet(self, pair: Pair) -> None:
        while pair.sends and pair.receives:
            sent, received = pair.sends.popleft(), pair.receives.popleft()
            if sent.key != received.key:
                text = f"{sent.process} sends (generation, part) {sent.key}"
                raise RuleBrokenError(f"{text}, {received.process} waits for {received.key}")
            clock = self._clock
            mean_s = self._mean_s * max(sent.process.factor, received.process.factor)
            stuck = max(self._stuck.get(one.process.rank, 0.0) for one in (sent, received))
            pair.arrives = max(pair.arrives, stuck, clock.now + clock.random.expovariate(1.0) * mean_s)
            clock.at(pair.arrives, partial(_carry, sent, received))


def _carry(sent: Post, received: Post) -> None:
    """Nothing moves while one of the two is stopped, nor when one has ended."""
    through = partial(_through, sent, received)
    sent.process.when_running(partial(received.process.when_running, through))


def _through(sent: Post, received: Post) -> None:
    if sent.process.alive and not sent.process.stopped:
        sent.through(sent.content)
        received.through(sent.content)
    elif sent.process.alive:
        _carry(sent, received)
