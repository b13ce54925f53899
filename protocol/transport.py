"""What the sockets share: their options, what a send may come to, what they count, and who is connected."""

from __future__ import annotations

import enum
import logging
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import msgspec
import zmq
from zmq.utils.monitor import parse_monitor_message

from drumline.protocol.codec import MAX_FRAME_BYTES, Codec, DecodeError, Frame
from drumline.protocol.messages import Message

T = TypeVar("T")
log = logging.getLogger(__name__)

DEFAULT_HWM = 1000
# Seconds of silence before the kernel asks a TCP peer whether it is there, between the questions, and their number.
# ZeroMQ's own heartbeats stay off: libzmq 4.3.5 aborts the process (stream_engine_base.cpp, `!_io_error`) when their
# timer fires for a peer that went while a full queue kept its messages from being read. Beats are messages of ours.
KEEPALIVE_IDLE_S, KEEPALIVE_INTERVAL_S, KEEPALIVE_COUNT = 4, 2, 3
HANDSHAKE_TIMEOUT_MS = 5_000
RECONNECT_MS = 10
RECONNECT_MAX_MS = 200
LINGER_S = 0.2
MAX_LOGGED_PEERS = 100

_HANDSHAKE_FAILURES = (
    zmq.Event.HANDSHAKE_FAILED_NO_DETAIL | zmq.Event.HANDSHAKE_FAILED_PROTOCOL | zmq.Event.HANDSHAKE_FAILED_AUTH
)
_MONITORED = zmq.Event.HANDSHAKE_SUCCEEDED | zmq.Event.DISCONNECTED | _HANDSHAKE_FAILURES


class SendResult(enum.Enum):
    """What became of a send. Only SENT means that ZeroMQ has the message."""

    SENT = "sent"
    GONE = "gone"  # no such peer, or no longer
    FULL = "full"  # its bounded queue is full; nothing was queued


class SocketStatistics(msgspec.Struct, frozen=True):
    """Counts since the socket was made.

    ``dropped`` messages did not decode: ``malformed`` (not a message of the union), ``oversized`` (over the codec's
    frame limit), ``misframed`` (wrong number of frames). A frame over ZMQ_MAXMSGSIZE never arrives: ZeroMQ ends that
    connection, which shows in ``disconnected``. ``refused`` counts failed handshakes (peers that speak no ZMTP).
    """

    received: int = 0
    dropped: int = 0
    malformed: int = 0
    oversized: int = 0
    misframed: int = 0
    sent: int = 0
    gone: int = 0
    full: int = 0
    connected: int = 0
    disconnected: int = 0
    refused: int = 0


class Counter:
    """The counters behind :class:`SocketStatistics`, and the log lines about peers that send what does not decode."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.received = self.sent = self.gone = self.full = 0
        self.connected = self.disconnected = self.refused = 0
        self.drops = {"malformed": 0, "oversized": 0, "frames": 0}
        self._logged: set[bytes] = set()

    def drop(self, peer: bytes, error: DecodeError) -> None:
        """Count one message that did not decode; logged once per peer, and for a bounded number of peers."""
        self.drops[error.reason] += 1
        if peer in self._logged or len(self._logged) >= MAX_LOGGED_PEERS:
            return
        self._logged.add(peer)
        last = " (further peers are only counted)" if len(self._logged) == MAX_LOGGED_PEERS else ""
        log.warning("%s: dropped a message from peer %s: %s%s", self.name, peer.hex() or "-", error.text, last)

    def snapshot(self) -> SocketStatistics:
        return SocketStatistics(
            received=self.received,
            dropped=sum(self.drops.values()),
            malformed=self.drops["malformed"],
            oversized=self.drops["oversized"],
            misframed=self.drops["frames"],
            sent=self.sent,
            gone=self.gone,
            full=self.full,
            connected=self.connected,
            disconnected=self.disconnected,
            refused=self.refused,
        )


class Link(Generic[T]):
    """A plain ZeroMQ socket with its codec, counters and monitor; every operation returns at once.

    Close it before its context is destroyed: a context that closes the monitor first leaves ZeroMQ's own thread waiting
    for somebody to read the next event.
    """

    def __init__(
        self,
        context: zmq.Context[Any],
        kind: int,
        endpoint: str,
        codec: Codec[T],
        *,
        hwm: int = DEFAULT_HWM,
        max_frame_bytes: int = MAX_FRAME_BYTES,
    ) -> None:
        # The class is named: an asyncio context would make sockets whose send returns a future.
        self.socket: zmq.Socket[bytes] = context.socket(kind, socket_class=zmq.Socket)
        self.codec = codec
        self.count = Counter(endpoint)
        self.lost = False
        try:
            self._set_options(endpoint, hwm, max_frame_bytes)
            self.monitor: zmq.Socket[bytes] = self.socket.get_monitor_socket(_MONITORED)
        except BaseException:
            self.socket.close(linger=0)
            raise

    def _set_options(self, endpoint: str, hwm: int, max_frame_bytes: int) -> None:
        options = {
            zmq.SocketOption.SNDHWM: hwm,
            zmq.SocketOption.RCVHWM: hwm,
            zmq.SocketOption.MAXMSGSIZE: max_frame_bytes,
            zmq.SocketOption.TCP_KEEPALIVE: 1,
            zmq.SocketOption.TCP_KEEPALIVE_IDLE: KEEPALIVE_IDLE_S,
            zmq.SocketOption.TCP_KEEPALIVE_INTVL: KEEPALIVE_INTERVAL_S,
            zmq.SocketOption.TCP_KEEPALIVE_CNT: KEEPALIVE_COUNT,
            zmq.SocketOption.HANDSHAKE_IVL: HANDSHAKE_TIMEOUT_MS,
            zmq.SocketOption.RECONNECT_IVL: RECONNECT_MS,
            zmq.SocketOption.RECONNECT_IVL_MAX: RECONNECT_MAX_MS,
            zmq.SocketOption.LINGER: int(LINGER_S * 1000),
        }
        if "[" in endpoint:
            options[zmq.SocketOption.IPV6] = 1
        for option, value in options.items():
            self.socket.set(option, value)

    def receive_frames(self) -> list[bytes] | None:
        """The frames of one message, None when there is none now."""
        try:
            return self.socket.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return None

    def decode(self, peer: bytes, frames: Sequence[Frame]) -> T | None:
        """The message, None (counted) when the frames are none."""
        try:
            message = self.codec.decode(frames)
        except DecodeError as error:
            self.count.drop(peer, error)
            return None
        self.count.received += 1
        return message

    def encode(self, message: Message) -> list[Frame]:
        # The encoder takes any message; the union of the codec is that of what comes in.
        return self.codec.encode(message)  # type: ignore[arg-type]

    def send_frames(self, frames: Sequence[Frame]) -> SendResult:
        """Hand all frames to ZeroMQ (which copies them), or none."""
        if self.socket.closed:
            self.count.gone += 1
            return SendResult.GONE
        last = len(frames) - 1
        try:
            for place, frame in enumerate(frames):
                self.socket.send(frame, zmq.NOBLOCK if place == last else zmq.NOBLOCK | zmq.SNDMORE)
        except zmq.Again:
            self.count.full += 1
            return SendResult.FULL
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            self.count.gone += 1
            return SendResult.GONE
        self.count.sent += 1
        return SendResult.SENT

    def readable(self) -> bool:
        """Whether a message waits. Asking makes ZeroMQ work off its mailbox, which silences its descriptor."""
        return bool(int(self.socket.get(zmq.SocketOption.EVENTS)) & zmq.POLLIN)

    def drain_monitor(self) -> None:
        """Read what the monitor has to tell; a connection that ended sets ``lost``."""
        while not self.monitor.closed:
            try:
                frames = self.monitor.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            event = parse_monitor_message(frames)["event"]
            if event == zmq.Event.HANDSHAKE_SUCCEEDED:
                self.count.connected += 1
            elif event == zmq.Event.DISCONNECTED:
                self.count.disconnected += 1
                # An attempt that never became a connection is retried by ZeroMQ and loses nothing.
                self.lost = self.lost or self.count.connected > 0
            elif event & _HANDSHAKE_FAILURES:
                self.count.refused += 1

    def close(self, linger_s: float) -> None:
        """Close socket and monitor; what is queued is still sent for up to ``linger_s``. Idempotent."""
        if self.socket.closed:
            return
        self.drain_monitor()
        self.socket.disable_monitor()
        self.monitor.close(linger=0)
        self.socket.close(linger=int(linger_s * 1000))
