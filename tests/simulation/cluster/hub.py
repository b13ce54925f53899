"""Where the coordinator listens, while there is one; who comes meanwhile waits for the next."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from drumline.protocol.codec import Codec
from drumline.protocol.messages import FromClient, FromWorkerSide, ToClient, ToSupervisor, ToWorker
from tests.simulation.cluster.rank_connection import RankConnection
from tests.simulation.cluster.wires import Line, MessageFaults, Wire

if TYPE_CHECKING:
    from tests.simulation.cluster.clients import SimClient
    from tests.simulation.cluster.cluster import Cluster
    from tests.simulation.cluster.host import Host

_CODECS: dict[str, Codec[Any]] = {
    "to_worker": Codec(ToWorker),
    "to_supervisor": Codec(ToSupervisor),
    "from_worker": Codec(FromWorkerSide),
    "to_client": Codec(ToClient),
    "from_client": Codec(FromClient),
}

OWNER = b"supervisor"


def through_codec(name: str, deliver: Callable[[Any], None]) -> Callable[[Any], None]:
    """Deliver what comes out when a message is encoded and decoded."""
    codec = _CODECS[name]

    def decoded(message: Any) -> None:
        deliver(codec.decode([bytes(frame) for frame in codec.encode(message)]))

    return decoded


class Hub:
    """The endpoints. ``lines``: connections to the present coordinator, by identity."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.clock = cluster.clock
        self.host: Host | None = None
        self.faults = MessageFaults(self.clock)
        self.lines: dict[bytes, Line] = {}
        self._waiting: list[Callable[[], None]] = []
        self._numbers = 0

    def listen(self, host: Host) -> None:
        """A coordinator is there."""
        self.host = host
        self.connect_supervisor()
        waiting, self._waiting = self._waiting, []
        for connect in waiting:
            self.clock.soon(0.01, connect)

    def close(self) -> None:
        """It is gone, and so are all connections; everybody finds out in time."""
        self.host = None
        for line in self.lines.values():
            line.cut()
            for closed in line.closed:
                self.clock.soon(0.02, closed)
        self.lines.clear()

    def connect_supervisor(self) -> None:
        """The supervisor's own connection."""
        host = self.host
        if host is None:
            return
        supervisor = self.cluster.supervisor
        line = self._line(OWNER, host.from_ranks, supervisor.receive, ("from_worker", "to_supervisor"))
        line.closed.append(supervisor.coordinator_lost)
        supervisor.connected(line)

    def connect_rank(self, process: RankConnection) -> None:
        """A rank comes, or waits for the next coordinator."""
        host = self.host
        if host is None:
            self._waiting.append(process.connect)
            return
        self._numbers += 1
        identity = f"{process.incarnation}/{self._numbers}".encode()
        line = self._line(identity, host.from_ranks, process.receive, ("from_worker", "to_worker"), process.rank)
        line.closed.append(process.coordinator_lost)
        process.connected(line)

    def connect_client(self, client: SimClient) -> None:
        """A client comes, or waits for the next coordinator."""
        host = self.host
        if host is None:
            self._waiting.append(client.connect)
            return
        self._numbers += 1
        identity = f"client {client.number}/{self._numbers}".encode()
        line = self._line(identity, host.from_client, client.receive, ("from_client", "to_client"))
        line.closed.append(client.coordinator_lost)
        client.connected(line)

    def _line(
        self,
        identity: bytes,
        up: Callable[[bytes, Any], None],
        down: Callable[[Any], None],
        names: tuple[str, str],
        rank: int = -1,
    ) -> Line:
        clock, delay = self.clock, self.cluster.shape.delay_s
        heard: Callable[[Any], None] = partial(up, identity)
        if self.cluster.shape.through_codec:
            heard, down = through_codec(names[0], heard), through_codec(names[1], down)
        faults = self.faults if rank >= 0 else None
        line = Line(
            identity,
            Wire(clock, delay, heard, names[0], rank, faults),
            Wire(clock, delay, down, names[1], rank, faults),
        )
        self.lines[identity] = line
        return line

    def lost(self, line: Line) -> None:
        """One connection is gone."""
        line.cut()
        self.lines.pop(line.identity, None)
