"""The coordinator's side towards workers and supervisor: their ROUTER, and what decisions come to as messages."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import zmq

from drumline.engine.core.coordination import Coordination
from drumline.engine.core.members import RankState, ToOwner, ToPeer, ToReplica
from drumline.engine.injections import Injections
from drumline.engine.launch.external import ExternalLaunch
from drumline.engine.message_faults import MessageFaults
from drumline.protocol.codec import Codec
from drumline.protocol.errors import ErrorInfo
from drumline.protocol.messages import (
    CONTROL_METHODS,
    Beat,
    Call,
    FromWorkerSide,
    HelloWorker,
    Injected,
    Notice,
    Shutdown,
    Stopping,
    ToSupervisor,
    ToWorker,
)
from drumline.protocol.sockets import Router, SendResult

BEAT_S = 0.9
HWM = 1024
MAX_FRAME_BYTES = 64 << 20
MAX_HEAD_BYTES = 9 << 20
"""Room for the result of a control call. Arrays travel in frames of their own; what is decoded from the first one may
take many times its size in memory."""


class WorkerPort:
    """Workers and supervisor of one engine. ``read_clock`` gives the time of the coordinator's running clock.
    ``changed(now, serve)`` is called after every message that was received; ``serve``: clients should be served.
    ``launch`` is how ranks are started that are not started here."""

    def __init__(
        self,
        context: zmq.Context[Any],
        endpoint: str,
        coordination: Coordination,
        read_clock: Callable[[], float],
        changed: Callable[[float, bool], None],
        launch: ExternalLaunch | None,
        fault_injection: bool,
    ) -> None:
        self.coordination = coordination
        self.membership = coordination.membership
        self.launch = launch
        self.injections = Injections()
        self._now = read_clock
        self._changed = changed
        self._beat_at = read_clock()
        self._disconnected = 0
        self._to_workers: Codec[ToWorker] = Codec(ToWorker)
        self.router: Router[FromWorkerSide] = Router(
            context,
            endpoint,
            Codec(FromWorkerSide, max_head_bytes=MAX_HEAD_BYTES),
            hwm=HWM,
            max_frame_bytes=MAX_FRAME_BYTES,
        )
        #: What is done to messages on purpose; None unless the engine was made for it.
        self.faults: MessageFaults | None = None
        if fault_injection:
            self.faults = MessageFaults(self.router, self._take, self.membership.rank_of_peer, read_clock)

    async def serve(self) -> None:
        """Receive until cancelled."""
        while True:
            peer, message = await self.router.recv()
            if self.faults is not None:
                self.faults.received(peer, message)
            else:
                self._take(peer, message)

    def _take(self, peer: bytes, message: FromWorkerSide) -> None:
        now = self._now()
        if isinstance(message, Injected) and peer in self.membership.peers:
            self.injections.seen(message)
        if isinstance(message, HelloWorker) and self.launch is not None:
            # Whoever starts a rank again at once must not find the place of the old process taken.
            self._probe_external_ranks(now)
        serve = self.coordination.from_workers(peer, message, now)
        self._changed(now, serve)

    def tick(self, now: float) -> None:
        """Deadlines, and the beat that the supervisor waits for."""
        disconnected = self.router.statistics().disconnected
        if disconnected != self._disconnected:
            self._disconnected = disconnected
            self._probe_external_ranks(now)
        self.coordination.tick(now)
        if now - self._beat_at >= BEAT_S:
            self._beat_at = now
            self._to_owner(Beat(os.getpid()))

    def _probe_external_ranks(self, now: float) -> None:
        """Find out which ranks that no supervisor watches are gone: a connection ended.

        The socket does not say whose connection ended; a send does. What is sent is of no term, and dropped there.
        """
        for rank in self.launch.ranks if self.launch is not None else ():
            record = self.membership.ranks[rank]
            if record.peer is not None and record.state not in (RankState.DEAD, RankState.WEDGED):
                self._sent(rank, record.peer, self._send(record.peer, Call(0, 0, 0, "ping")), now)

    # ------------------------------------------------------------------------------------------------- sending

    def carry_out(self, output: ToPeer | ToReplica | ToOwner, now: float) -> None:
        """Send one of the decisions. A rank that cannot be reached or does not read is lost."""
        if isinstance(output, ToReplica):
            frames = None
            for rank in output.ranks:
                peer = self.membership.ranks[rank].peer
                if peer is None:
                    continue
                if self.faults is not None:
                    self._sent(rank, peer, self.faults.send(peer, output.step), now)
                    continue
                if frames is None:
                    frames = self._to_workers.encode(output.step)
                self._sent(rank, peer, self.router.send_encoded(peer, frames), now)
        elif isinstance(output, ToPeer):
            message = self.injections.into(output.rank, output.message)
            self._sent(output.rank, output.peer, self._send(output.peer, message), now)
        else:
            self._to_owner(output.message)

    def _send(self, peer: bytes, message: ToWorker) -> SendResult:
        return self.router.send(peer, message) if self.faults is None else self.faults.send(peer, message)

    def _sent(self, rank: int, peer: bytes, result: SendResult, now: float) -> None:
        record = self.membership.ranks.get(rank)
        if result is SendResult.SENT or record is None or record.peer != peer:
            return
        why = "its connection is gone" if result is SendResult.GONE else f"it leaves {HWM} messages unread"
        self.coordination.unreachable(rank, f"rank {rank} (pid {record.pid}) cannot be reached: {why}", now)

    def send_call(self, rank: int, call: Call, timeout_s: float, now: float) -> bool:
        """Send a control call, whose time is no step's. Returns whether it was sent."""
        record = self.membership.ranks[rank]
        if record.peer is None:
            return False
        if call.method not in CONTROL_METHODS:
            self.coordination.clocks[record.group].called(rank, call.call_id, timeout_s, now)
        result = self._send(record.peer, call)
        self._sent(rank, record.peer, result, now)
        return result is SendResult.SENT

    def send_injections(self, now: float) -> None:
        """Tell every rank what it is to bring upon itself."""
        for rank, record in self.membership.ranks.items():
            if record.peer is not None:
                order = self.injections.order(rank, self.coordination.term)
                self._sent(rank, record.peer, self._send(record.peer, order), now)

    def notice(self, kind: str, text: str) -> None:
        """Have the supervisor log something."""
        self._to_owner(Notice(kind, text))

    def _to_owner(self, message: ToSupervisor) -> None:
        owner = self.membership.owner
        if owner is not None:
            # A supervisor that is gone shows in the lifeline and in its silence.
            self.router.send(owner, message)

    def epochs(self) -> dict[int, int]:
        """The epoch of each rank that can be called."""
        membership = self.membership
        return {
            rank: membership.groups[record.group].epoch
            for rank, record in membership.ranks.items()
            if record.peer is not None and record.state is RankState.READY
        }

    def shut_down(self, reason: str, error: ErrorInfo | None) -> None:
        """Tell every worker to end, and the supervisor to see to it."""
        for peer in self.membership.peers:
            self.router.send(peer, Shutdown(self.coordination.term, reason))
        self._to_owner(Stopping(reason, error))

    def close(self) -> None:
        """Close the socket. What was sent is still delivered for as long as its linger says."""
        if self.faults is not None:
            self.faults.close()
        self.router.close()
