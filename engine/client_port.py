"""The coordinator's side towards clients: their ROUTER, and what each of their messages asks of the engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import zmq

from drumline.engine.balance_desk import BalanceDesk
from drumline.engine.client_connections import MAX_UNREAD, ClientConnection, Connections
from drumline.engine.core.engine_core import EngineCore
from drumline.engine.core.outputs import ConnectionOutput
from drumline.engine.keeping import Keeping
from drumline.protocol.codec import Codec
from drumline.protocol.errors import ErrorInfo
from drumline.protocol.messages import (
    PROTOCOL_VERSION,
    Accepted,
    Ack,
    BeatClient,
    CallRanks,
    Cancel,
    ExpertLoadQuery,
    Failed,
    FromClient,
    Goodbye,
    HelloClient,
    InjectFaults,
    LayoutFacts,
    LayoutQuery,
    RebalanceExperts,
    Rejected,
    Resume,
    Resumed,
    StatusQuery,
    StatusReport,
    Stop,
    Submit,
    ToClient,
)
from drumline.protocol.sockets import Router, SendResult

HWM = 4096
MAX_FRAME_BYTES = 64 << 20
MAX_HEAD_BYTES = 4 << 20
"""Arrays travel in frames of their own; what is decoded from the first one may take many times its size in memory."""


class ServingEngine(Protocol):
    """What the port asks of the coordinator."""

    @property
    def core(self) -> EngineCore | None:
        """None until every group is ready."""

    def refusal(self) -> ErrorInfo | None:
        """Why nothing is admitted now, None while the engine serves."""

    def status_json(self, now: float) -> bytes:
        """The engine's status."""

    @property
    def keeping(self) -> Keeping:
        """Through which everything about requests goes to clients."""

    @property
    def experts(self) -> BalanceDesk:
        """What is asked of the balance of experts."""

    def layout_facts(self, call_id: int) -> LayoutFacts:
        """Which rank holds what, now."""

    def inject(self, connection: ClientConnection, message: InjectFaults, now: float) -> None:
        """Bring faults about and answer the connection."""

    def call_ranks(self, connection: ClientConnection, message: CallRanks, now: float) -> None:
        """Run a control call on every rank and answer the connection."""

    def greet(self, connection: ClientConnection) -> None:
        """Tell a client how far the engine is."""

    def client_left(self, connection: ClientConnection, now: float) -> None:
        """A client is gone: its requests are to be cancelled, or to go on without it for a while."""

    def changed(self, now: float) -> None:
        """Work arrived or was taken away: plan and send what there is."""


class ClientPort:
    """The clients of one engine."""

    def __init__(
        self, context: zmq.Context[Any], endpoint: str, engine: ServingEngine, read_clock: Callable[[], float]
    ) -> None:
        self._engine = engine
        self._now = read_clock
        self.router: Router[FromClient] = Router(
            context,
            endpoint,
            Codec(FromClient, max_head_bytes=MAX_HEAD_BYTES),
            hwm=HWM,
            max_frame_bytes=MAX_FRAME_BYTES,
        )
        self.connections = Connections(self._send)
        self.unknown_peers = 0
        self.refused_hellos = 0
        self._disconnected = 0

    def _send(self, identity: bytes, message: ToClient) -> SendResult:
        return self.router.send(identity, message)

    async def serve(self) -> None:
        """Receive until cancelled."""
        while True:
            identity, message = await self.router.recv()
            now = self._now()
            if isinstance(message, HelloClient):
                self._hello(identity, message, now)
                continue
            connection = self.connections.of(identity)
            if connection is None:
                self.unknown_peers += 1
                continue
            connection.heard_at = now
            self._handle(connection, message, now)

    def _hello(self, identity: bytes, message: HelloClient, now: float) -> None:
        refusal: ErrorInfo | None = None
        if message.version != PROTOCOL_VERSION:
            text = f"the client speaks protocol version {message.version}, the coordinator speaks {PROTOCOL_VERSION}"
            refusal = ErrorInfo(kind="protocol", text=text)
        elif self.connections.full and self.connections.of(identity) is None:
            text = f"{len(self.connections)} clients are connected, the most there may be"
            refusal = ErrorInfo(kind="queue_full", text=text, retryable=True)
        if refusal is not None:
            self.refused_hellos += 1
            self.router.send(identity, Failed("", refusal))
            return
        self._engine.greet(self.connections.open(identity, message.client_id[:200], now))

    def _handle(self, connection: ClientConnection, message: FromClient, now: float) -> None:
        if isinstance(message, Submit):
            self._submit(connection, message, now)
        elif isinstance(message, Ack):
            for request_id in self.connections.ack(connection, message.frame):
                self._forget(request_id)
        elif isinstance(message, BeatClient):
            connection.beats = True
        elif isinstance(message, Stop | Cancel | Resume):
            self._about_request(connection, message, now)
        elif isinstance(message, Goodbye):
            self.connections.remove(connection)
            self._engine.client_left(connection, now)
        else:
            self._about_engine(connection, message, now)

    def _about_engine(self, connection: ClientConnection, message: FromClient, now: float) -> None:
        engine, reply = self._engine, self.connections.reply
        if isinstance(message, StatusQuery):
            reply(connection, StatusReport(message.call_id, engine.status_json(now)))
        elif isinstance(message, LayoutQuery):
            reply(connection, engine.layout_facts(message.call_id))
        elif isinstance(message, CallRanks):
            engine.call_ranks(connection, message, now)
        elif isinstance(message, RebalanceExperts):
            engine.experts.rebalance(connection, message, now)
        elif isinstance(message, ExpertLoadQuery):
            engine.experts.expert_load(connection, message)
        elif isinstance(message, InjectFaults):
            engine.inject(connection, message, now)

    def _submit(self, connection: ClientConnection, message: Submit, now: float) -> None:
        core, refusal = self._engine.core, self._engine.refusal()
        if refusal is None and connection.unread > MAX_UNREAD:
            text = (
                f"{connection.unread} requests have ended unread; the next one waits until their ends are acknowledged"
            )
            refusal = ErrorInfo(kind="queue_full", text=text, retryable=True)
        if core is None or refusal is not None:
            refusal = refusal or ErrorInfo(kind="engine_closed", text="the engine has no core")
            self.connections.reply(connection, Rejected(message.call_id, message.request_id, refusal))
            return
        # What was told before keeps its place.
        self.deliver(core)
        answer = core.submit(connection.number, message, now)
        self._push(core, lambda: self._answer_submit(connection, answer))
        self._engine.changed(now)

    def _answer_submit(self, connection: ClientConnection, answer: Accepted | Rejected) -> None:
        if isinstance(answer, Accepted):
            self.connections.accepted(connection, answer.request_id, len(answer.handles))
        self.connections.reply(connection, answer)

    def _about_request(self, connection: ClientConnection, message: Stop | Cancel | Resume, now: float) -> None:
        core = self._engine.core
        if core is None:
            if not isinstance(message, Stop):
                error = self._engine.refusal() or ErrorInfo(kind="engine_closed", text="the engine has no core")
                self.connections.reply(connection, Rejected(message.call_id, message.request_id, error))
            return
        if isinstance(message, Stop):
            core.stop(connection.number, message)
        elif isinstance(message, Cancel):
            core.cancel(connection.number, message, now)
        else:
            self._resume(core, connection, message, now)
        self._engine.changed(now)

    def _resume(self, core: EngineCore, connection: ClientConnection, message: Resume, now: float) -> None:
        # What was told before the handles changed goes out under the old ones, and first.
        self.deliver(core)
        before = core.connection_of(message.request_id)
        answer = core.resume(connection.number, message) if message.submit is None else None
        if answer is None:
            answer = core.adopt(connection.number, message, now)

        def send() -> None:
            if not isinstance(answer, Resumed):
                self.connections.reply(connection, answer)
                return
            reader = self.connections.numbered(before) if before != connection.number else None
            if reader is not None:
                self.connections.moved(reader, message.request_id)
            if self.connections.resumed(connection, answer):
                self._forget(message.request_id)

        self._push(core, send)

    def _forget(self, request_id: str) -> None:
        core = self._engine.core
        if core is not None:
            core.forget(request_id)

    def deliver(self, core: EngineCore) -> None:
        """Send what the core has for clients, once it is kept."""
        outputs = core.outputs()
        notes = core.take_notes()
        if outputs or notes is not None:
            self._engine.keeping.push(notes, outputs, lambda: self._send_outputs(outputs))

    def _push(self, core: EngineCore, send: Callable[[], None]) -> None:
        self._engine.keeping.push(core.take_notes(), [], send)

    def _send_outputs(self, outputs: list[ConnectionOutput]) -> None:
        for output in outputs:
            for request_id in self.connections.deliver(output):
                self._forget(request_id)
            connection = self.connections.numbered(output.connection)
            if connection is None:
                continue
            for request_id, error in output.failed:
                connection.close_request(request_id)
                self.connections.reply(connection, Failed(request_id, error))

    def fail_requests(self, error: ErrorInfo) -> None:
        """End every request with ``error``: the engine cannot go on."""
        core = self._engine.core
        if core is None:
            return
        failed = core.fail_all()
        self.deliver(core)

        def send() -> None:
            for number, request_id in failed:
                connection = self.connections.numbered(number)
                if connection is not None:
                    self.connections.reply(connection, Failed(request_id, error))

        self._push(core, send)

    def tick(self, now: float) -> None:
        """Clients that fell silent or went away, and replies that wait for room."""
        self.connections.flush()
        disconnected = self.router.statistics().disconnected
        if disconnected != self._disconnected:
            # Somebody's connection ended, and the socket does not say whose; a send does.
            self._disconnected = disconnected
            self.connections.probe()
        for connection in [*self.connections.silent(now), *self.connections.take_gone()]:
            self._engine.client_left(connection, now)

    def close(self) -> None:
        """Close the socket. What was sent is still delivered for as long as its linger says."""
        self.router.close()
