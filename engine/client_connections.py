"""The coordinator's client connections: replies, numbered frames, and what happens to a reader that falls behind.

Token frames of a connection are numbered and acknowledged. With ``WINDOW`` of them unacknowledged none is sent; once
they are acknowledged one ``Behind`` is, which the client answers with Resume per live request. So a slow reader costs
its own frames and nobody else's time. A request that ended is forgotten when its end has been acknowledged, or stood in
a Resumed, or when its cancel has been confirmed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field

from drumline.engine.core.outputs import ConnectionOutput
from drumline.protocol.errors import ErrorInfo
from drumline.protocol.messages import (
    Behind,
    Cancelled,
    Failed,
    Finished,
    Resumed,
    StatusReport,
    StreamEnd,
    ToClient,
    Tokens,
)
from drumline.protocol.sockets import SendResult

WINDOW = 64
CAUGHT_UP = 16
"""With fewer frames unacknowledged a reader counts as caught up: clients acknowledge at least every 16 frames."""
MAX_CONNECTIONS = 4096
MAX_PENDING = 8192
"""Replies that wait for room in a connection's socket; a client that lets more pile up is disconnected."""
MAX_UNREAD = 8192
"""Requests whose end a client has not acknowledged; with more of them it may submit nothing."""
SILENCE_S = 10.0
"""A client that has sent heartbeats and sends nothing for so long is gone."""


@dataclass(slots=True)
class ClientConnection:
    """One client. ``frame`` was sent last, ``acked`` read last. ``open``: the indices still to end, per live request;
    none of one whose last end was left out, of which there are ``left_out``. ``ended``: (frame, request id) of ends
    that were sent and not yet acknowledged."""

    number: int
    identity: bytes
    client_id: str
    heard_at: float
    beats: bool = False
    frame: int = 0
    acked: int = 0
    behind: bool = False
    gone: bool = False
    open: dict[str, set[int]] = field(default_factory=dict)
    left_out: int = 0
    ended: deque[tuple[int, str]] = field(default_factory=deque)
    pending: deque[ToClient] = field(default_factory=deque)

    @property
    def unread(self) -> int:
        """Requests that have ended and are kept until the client has read so."""
        return len(self.ended) + self.left_out

    def close_request(self, request_id: str) -> None:
        """All that there was to say of the request has been said."""
        if self.open.pop(request_id, None) == set():
            self.left_out -= 1


@dataclass(slots=True)
class ConnectionCounts:
    """``frames_left_out``: token frames not sent to readers that were behind. ``clients_overrun``: disconnected for
    letting replies pile up. ``acks_refused``: acknowledgements of frames that were never sent."""

    clients_gone: int = 0
    clients_silent: int = 0
    clients_overrun: int = 0
    frames_left_out: int = 0
    behind: int = 0
    acks_refused: int = 0

    def as_dict(self) -> dict[str, int]:
        """The counts by field name, as the status shows them."""
        return asdict(self)


class Connections:
    """All client connections. ``send`` hands one message to the socket of an identity and never blocks."""

    def __init__(self, send: Callable[[bytes, ToClient], SendResult]) -> None:
        self._send = send
        self._by_identity: dict[bytes, ClientConnection] = {}
        self._by_number: dict[int, ClientConnection] = {}
        self._next = 1
        self._gone: list[ClientConnection] = []
        self._waiting: set[int] = set()
        self.counts = ConnectionCounts()

    def __len__(self) -> int:
        return len(self._by_identity)

    def __iter__(self) -> Iterator[ClientConnection]:
        return iter(list(self._by_identity.values()))

    @property
    def full(self) -> bool:
        """Whether there are ``MAX_CONNECTIONS``. :meth:`open` does not ask: its caller refuses newcomers."""
        return len(self._by_identity) >= MAX_CONNECTIONS

    @property
    def has_pending(self) -> bool:
        """Whether replies, or the news that frames were left out, wait for room in a socket."""
        return bool(self._waiting)

    def open(self, identity: bytes, client_id: str, now: float) -> ClientConnection:
        """The connection of ``identity``, made at its first hello."""
        connection = self._by_identity.get(identity)
        if connection is None:
            connection = ClientConnection(self._next, identity, client_id, now)
            self._next += 1
            self._by_identity[identity] = connection
            self._by_number[connection.number] = connection
        connection.heard_at = now
        return connection

    def of(self, identity: bytes) -> ClientConnection | None:
        """The connection of ``identity``, None before its hello and once it is removed."""
        return self._by_identity.get(identity)

    def numbered(self, number: int) -> ClientConnection | None:
        """The connection with this number, None once it is removed. Numbers are not used again."""
        return self._by_number.get(number)

    def remove(self, connection: ClientConnection) -> None:
        """The client has left; nothing is sent to it from here on."""
        connection.gone = True
        self._by_identity.pop(connection.identity, None)
        self._by_number.pop(connection.number, None)
        self._waiting.discard(connection.number)

    def take_gone(self) -> list[ClientConnection]:
        """Connections found gone while sending, removed already, each told once."""
        gone, self._gone = self._gone, []
        return gone

    def silent(self, now: float) -> list[ClientConnection]:
        """Clients that beat once and have not been heard for ``SILENCE_S`` seconds; they are removed."""
        silent = [one for one in self if one.beats and now - one.heard_at > SILENCE_S]
        for connection in silent:
            self.counts.clients_silent += 1
            self.remove(connection)
        return silent

    # ------------------------------------------------------------------------------------------------ sending

    def reply(self, connection: ClientConnection, message: ToClient) -> None:
        """Send ``message``, or keep it until the socket has room, in order."""
        if connection.gone:
            return
        if connection.pending or not self._put(connection, message):
            if connection.gone:
                return
            if len(connection.pending) >= MAX_PENDING:
                self.counts.clients_overrun += 1
                self._lose(connection)
                return
            connection.pending.append(message)
            self._waiting.add(connection.number)

    def broadcast(self, message: ToClient) -> None:
        """Send ``message`` to every connection, as :meth:`reply` does."""
        for connection in self:
            self.reply(connection, message)

    def probe(self) -> None:
        """Send every client an answer to no question, which it drops: what finds out who is gone."""
        self.broadcast(StatusReport(0, b""))

    def flush(self) -> None:
        """Send what waits, as far as there is room."""
        for number in list(self._waiting):
            connection = self._by_number[number]
            while connection.pending and self._put(connection, connection.pending[0]):
                connection.pending.popleft()
            if connection.gone or connection.pending:
                continue
            self._waiting.discard(number)
            self._catch_up(connection)

    def _put(self, connection: ClientConnection, message: ToClient) -> bool:
        result = self._send(connection.identity, message)
        if result is SendResult.SENT:
            return True
        if result is SendResult.GONE:
            self.counts.clients_gone += 1
            self._lose(connection)
        return False

    def _lose(self, connection: ClientConnection) -> None:
        self.remove(connection)
        self._gone.append(connection)

    # ------------------------------------------------------------------------------------------ token frames

    def accepted(self, connection: ClientConnection, request_id: str, n: int) -> None:
        """``request_id`` is live on this connection and has ``n`` ends to come."""
        connection.open[request_id] = set(range(n))

    def deliver(self, output: ConnectionOutput) -> list[str]:
        """Send one step's tokens and ends to their connection; cancels that are complete are always sent.

        Returns the requests whose end was left out and will not be asked for, because their cancel is confirmed.
        """
        connection = self._by_number.get(output.connection)
        if connection is None:
            return []
        if len(output.handles):
            self._frame(
                connection,
                Tokens(
                    connection.frame + 1,
                    output.handles,
                    output.positions,
                    output.tokens,
                    output.logprob_index,
                    tuple(output.logprobs),
                ),
            )
        if output.ends:
            sent = self._frame(connection, Finished(connection.frame + 1, tuple(output.ends)))
            for end in output.ends:
                self._count_end(connection, end, sent)
        over: list[str] = []
        for call_id, request_id in output.cancelled:
            # One that has ends to come is another, that was given the id when the end of the cancelled one was read.
            if connection.open.get(request_id) == set():
                connection.close_request(request_id)
                over.append(request_id)
            self.reply(connection, Cancelled(call_id, request_id))
        return over

    def _frame(self, connection: ClientConnection, frame: Tokens | Finished) -> bool:
        if connection.gone:
            return False
        full = connection.frame - connection.acked >= WINDOW
        if connection.behind or full or connection.pending or not self._put(connection, frame):
            if not connection.behind and not full and not connection.gone:
                # The socket had no room. A reader with nothing to acknowledge would never ask for more by itself.
                self._waiting.add(connection.number)
            connection.behind = True
            self.counts.frames_left_out += 1
            return False
        connection.frame = frame.frame
        return True

    def _count_end(self, connection: ClientConnection, end: StreamEnd, sent: bool) -> None:
        """By index, because an end may stand in a Resumed already when it comes in a frame."""
        left = connection.open.get(end.request_id)
        if not left:
            return
        left.discard(end.index)
        if left:
            return
        if sent:
            del connection.open[end.request_id]
            connection.ended.append((connection.frame, end.request_id))
        else:
            connection.left_out += 1

    def ack(self, connection: ClientConnection, frame: int) -> list[str]:
        """Frames up to ``frame`` have been read. Returns the requests whose end has thereby been read."""
        if not 0 <= frame <= connection.frame:
            self.counts.acks_refused += 1
            return []
        connection.acked = max(connection.acked, frame)
        read: list[str] = []
        while connection.ended and connection.ended[0][0] <= connection.acked:
            read.append(connection.ended.popleft()[1])
        self._catch_up(connection)
        return read

    def _catch_up(self, connection: ClientConnection) -> None:
        """Tell a reader that has read all it was sent that there is more to ask for."""
        if connection.behind and connection.frame - connection.acked < CAUGHT_UP and not connection.pending:
            connection.behind = False
            self.counts.behind += 1
            self.reply(connection, Behind(connection.frame))

    def moved(self, connection: ClientConnection, request_id: str) -> None:
        """The request goes on with another connection's reader: the one that it had is told."""
        connection.close_request(request_id)
        text = f"request {request_id!r} has a newer reader"
        self.reply(connection, Failed(request_id, ErrorInfo(kind="request_failed", text=text)))

    def resumed(self, connection: ClientConnection, message: Resumed) -> bool:
        """Send ``message``. Whether the request may be forgotten at once: all of its ends stand there, and there is no
        frame to acknowledge that they have been read."""
        left = set(range(len(message.tokens))) - {end.index for end in message.ends}
        connection.close_request(message.request_id)
        if left:
            connection.open[message.request_id] = left
        self.reply(connection, message)
        # A Resumed is not acknowledged; a frame behind it is, and until then another coordinator may be asked again.
        if left or not self._frame(connection, Finished(connection.frame + 1, ())):
            return not left
        connection.ended.append((connection.frame, message.request_id))
        return False
