"""The coordinator's own parts that talk to clients and decide, on simulated sockets."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from drumline.engine.client_connections import Connections
from drumline.engine.client_port import ClientPort
from drumline.engine.core.balance.places import ExpertPlaces
from drumline.engine.core.balance.window import Snapshot, _Gathering
from drumline.engine.core.coordination import Coordination
from drumline.engine.core.engine_core import EngineCore
from drumline.protocol.messages import FromClient, HelloClient, ToClient
from drumline.protocol.transport import SendResult, SocketStatistics

if TYPE_CHECKING:
    from tests.simulation.cluster.host import Host


class SimRouter:
    """A client ROUTER: ``put`` hands a message to an identity's connection."""

    def __init__(self, put: Callable[[bytes, ToClient], SendResult]) -> None:
        self._put = put
        self.disconnected = 0

    def send(self, identity: bytes, message: ToClient) -> SendResult:
        return self._put(identity, message)

    def statistics(self) -> SocketStatistics:
        return SocketStatistics(disconnected=self.disconnected)


class SimClientPort(ClientPort):
    """The real port, whose messages come from simulated connections."""

    def __init__(self, host: Host) -> None:
        self._engine = host  # type: ignore[assignment]  # it serves no layout and no status
        self._now = lambda: host.now
        self.router = SimRouter(host.to_client)  # type: ignore[assignment]
        self.connections = Connections(self._send)
        self.unknown_peers = 0
        self.refused_hellos = 0
        self._disconnected = 0

    def receive(self, identity: bytes, message: FromClient, now: float) -> None:
        """As :meth:`serve` does."""
        if isinstance(message, HelloClient):
            self._hello(identity, message, now)
            return
        connection = self.connections.of(identity)
        if connection is None:
            self.unknown_peers += 1
            return
        connection.heard_at = now
        self._handle(connection, message, now)

    def lost(self, identity: bytes, now: float) -> None:
        """The socket says that a connection has ended."""
        connection = self.connections.of(identity)
        if connection is not None:
            self.connections.remove(connection)
            self._engine.client_left(connection, now)


class WatchedCoordination(Coordination):
    """The real decisions. ``on_plan`` sees the core before anything is planned."""

    on_plan: Callable[[EngineCore], None] = staticmethod(lambda core: None)

    def watch_load(self, see: Callable[[int, Snapshot], None]) -> None:
        """``see`` every step whose expert loads have all come, and what they add up to."""
        if self.balance is None:
            return
        window = self.balance.balancer._window
        take = window._take

        def watched(step: int, gathering: _Gathering, places: ExpertPlaces) -> Snapshot:
            snapshot = take(step, gathering, places)
            see(step, snapshot)
            return snapshot

        window._take = watched  # type: ignore[method-assign]  # all of them come through here

    def plan(self, now: float) -> None:
        if self.core is not None:
            self.on_plan(self.core)
        super().plan(now)
