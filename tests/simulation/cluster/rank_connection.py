"""A rank's connection to the coordinator that listens: its control thread, which always answers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from drumline.protocol.messages import PROTOCOL_VERSION, BeatWorker, FromWorker, HelloWorker, ToWorker
from tests.simulation.cluster.process import SimProcess
from tests.simulation.cluster.shape import DIGEST
from tests.simulation.worker import RuleBrokenError

if TYPE_CHECKING:
    from tests.simulation.cluster.cluster import Cluster
    from tests.simulation.cluster.wires import Line


class RankConnection(SimProcess):
    """``left`` is the newest (term, epoch) that the rank has been told to come out for, ``position`` its progress as
    its beats tell it, ``fenced``: it was told to end. ``stale`` counts messages that came too late."""

    def __init__(self, cluster: Cluster, rank: int, token: str, pid: int) -> None:
        super().__init__(cluster.clock, pid)
        self.cluster = cluster
        self.rank = rank
        self.token = token
        self.incarnation = f"{rank}-{pid}"
        self.term = 0
        self.left = (0, 0)
        self.loaded = False
        self.position = (0, 0, False)
        self.line: Line | None = None
        self.fenced = False
        self.stale = 0
        self._welcomed = False
        self._told_to_load = False
        self._handlers: dict[type, Callable[..., None]] = {}

    def __str__(self) -> str:
        return f"rank {self.rank} (pid {self.pid})"

    def start(self) -> None:
        """Connect for the first time, and beat."""
        self.connect()
        self._beat()

    def connect(self) -> None:
        """Say Hello to the coordinator that listens, or to the next one."""
        if self.alive and not self.fenced:
            self.cluster.hub.connect_rank(self)

    def connected(self, line: Line) -> None:
        """The connection is there."""
        self.line = line
        self._told_to_load = False
        term, epoch = max((self.term, 0), self.left)
        self.send(
            HelloWorker(
                PROTOCOL_VERSION,
                self.token,
                self.rank,
                self.incarnation,
                self.pid,
                "host",
                term=term,
                epoch=epoch if self.left[0] == term else 0,
                loaded=self.loaded,
                digest=DIGEST if self._welcomed else "",
            )
        )

    def coordinator_lost(self) -> None:
        """The connection ended: keep the weights and wait for the next coordinator."""
        self.line = None
        self.soon(0.05, self.connect)

    def send(self, message: FromWorker) -> None:
        """To the coordinator, if there is one."""
        if self.line is not None:
            self.line.up.send(message)

    def _beat(self) -> None:
        step, collective, inside = self.position
        self.send(BeatWorker(self.term, self.left[1], self.rank, step, collective, inside))
        self.later(self.cluster.shape.beat_s, self._beat)

    def receive(self, message: ToWorker) -> None:
        """Anything that the coordinator sent."""
        self._wake(partial(self._handle, message))

    def _handle(self, message: ToWorker) -> None:
        handler = self._handlers.get(type(message))
        if handler is None:
            return
        if message.term < self.term:
            self.stale += 1
            self.clock.seen["stale_at_rank"] += 1
            return
        handler(message)

    @property
    def tampered(self) -> bool:
        """Whether messages of this connection were dropped, changed, delayed or doubled."""
        return self.line is None or self.line.tampered

    def broken(self, what: str) -> None:
        """A rule is broken at this rank."""
        raise RuleBrokenError(f"{self} {what}")
