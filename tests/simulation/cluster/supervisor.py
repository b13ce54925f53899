"""The supervisor: starts processes, kills them, tells of their ends, and starts another coordinator when one dies."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from drumline.protocol.messages import (
    PROTOCOL_VERSION,
    Beat,
    Exited,
    HelloSupervisor,
    Kill,
    Spawn,
    Spawned,
    Started,
    Stopping,
    ToSupervisor,
)
from tests.simulation.cluster.process import SIGKILL
from tests.simulation.cluster.rank import SimRank
from tests.simulation.cluster.shape import SUPERVISOR_TOKEN
from tests.simulation.worker import RuleBrokenError

if TYPE_CHECKING:
    from tests.simulation.cluster.cluster import Cluster
    from tests.simulation.cluster.wires import Line

PID = 1
FIRST_PID = 100


class SimSupervisor:
    """``processes``: all that live, by pid. ``starts``: when each rank was started, by rank."""

    def __init__(self, cluster: Cluster, pids: int = FIRST_PID) -> None:
        self.cluster = cluster
        self.clock = cluster.clock
        self.processes: dict[int, SimRank] = {}
        self.starts: dict[int, list[float]] = {}
        self.line: Line | None = None
        self.stopping = False
        self.pids = pids
        self._beats = False

    def connected(self, line: Line) -> None:
        """A coordinator listens: say hello, with the processes that live."""
        self.line = line
        members = tuple(Started(one.rank, one.pid, one.token) for one in self.processes.values())
        line.up.send(HelloSupervisor(PROTOCOL_VERSION, SUPERVISOR_TOKEN, PID, members))
        if not self._beats:
            self._beats = True
            self._beat()

    def _beat(self) -> None:
        if self.stopping:
            return
        self._send(Beat(PID))
        self.clock.after(self.cluster.shape.beat_s, self._beat)

    def _send(self, message: object) -> None:
        if self.line is not None:
            self.line.up.send(message)

    def receive(self, message: ToSupervisor) -> None:
        """What the coordinator wants done."""
        if isinstance(message, Spawn):
            self.clock.soon(0.02, partial(self._spawn, message))
        elif isinstance(message, Kill):
            self.clock.soon(self.cluster.shape.kill_s, partial(self._kill, message))
        elif isinstance(message, Stopping):
            self.stop_all()

    def _spawn(self, message: Spawn) -> None:
        if self.stopping:
            return
        self.pids += 1
        process = SimRank(self.cluster, message.rank, message.token, self.pids)
        self.processes[process.pid] = process
        self.clock.seen["spawned"] += 1
        self.clock.note(f"{process} is started")
        self.starts.setdefault(message.rank, []).append(self.clock.now)
        self.cluster.rules.started(message.rank, self.starts[message.rank])
        self._send(Spawned(message.rank, process.pid))
        process.soon(0.05, process.start)

    def _kill(self, message: Kill) -> None:
        process = self.processes.get(message.pid)
        if process is None:
            return
        if process.rank != message.rank:
            raise RuleBrokenError(f"{process} is to be killed as rank {message.rank}")
        self.clock.seen["killed"] += 1
        process.end(signal=SIGKILL)

    def ended(self, process: SimRank, code: int, signal: int) -> None:
        """A process has ended; mostly that is told."""
        self.processes.pop(process.pid, None)
        if self.clock.random.random() < self.cluster.shape.silent_deaths:
            self.clock.seen["silent_deaths"] += 1
            return
        self.clock.soon(0.01, partial(self._send, Exited(process.rank, process.pid, code, signal)))

    def coordinator_lost(self) -> None:
        """Start the next one."""
        self.line = None
        if not self.stopping and self.cluster.supervisor is self:
            self.clock.soon(0.2, self.cluster.start_coordinator)

    def stop_all(self) -> None:
        """The engine ends."""
        self.stopping = True
        for process in list(self.processes.values()):
            process.end(signal=SIGKILL)
