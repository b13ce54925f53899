"""Control calls of clients to ranks: from the connection that asks to the socket that answers, and back."""

from __future__ import annotations

from drumline.engine.calls import RankCalls
from drumline.engine.client_connections import ClientConnection, Connections
from drumline.engine.worker_port import WorkerPort
from drumline.protocol.errors import ErrorInfo
from drumline.protocol.messages import CallRanks, CallRanksResult, CallResult, Rejected


class CallDesk:
    """Decisions are :class:`~drumline.engine.calls.RankCalls`'; this sends what they come to."""

    def __init__(self, term: int, workers: WorkerPort, connections: Connections) -> None:
        self._calls = RankCalls(term)
        self._workers = workers
        self._connections = connections

    @property
    def late_replies(self) -> int:
        """Replies that nobody waited for any more."""
        return self._calls.late_replies

    @property
    def next_deadline(self) -> float | None:
        """The earliest deadline of the calls in flight, None without any."""
        return self._calls.next_deadline

    def open(self, connection: ClientConnection, message: CallRanks, now: float) -> None:
        """Call every rank that computes, or tell the connection why not."""
        opened = self._calls.open(connection.number, message, self._workers.epochs(), now)
        if isinstance(opened, ErrorInfo):
            self._connections.reply(connection, Rejected(message.call_id, "", opened))
            return
        call, sends = opened
        if not sends:
            self._connections.reply(connection, call.result())
        for rank, one in sends:
            if not self._workers.send_call(rank, one, message.timeout_s, now):
                for done in self._calls.unreachable(rank, f"rank {rank} cannot be reached"):
                    self._answer(done.connection, done.result())

    def answered(self, message: CallResult) -> None:
        """A rank has answered."""
        done = self._calls.answer(message)
        if done is not None:
            self._answer(done.connection, done.result())

    def void(self, rank: int) -> None:
        """The rank leaves the epoch that it was called in, and answers nothing of it any more."""
        for done in self._calls.unreachable(rank, f"rank {rank} was called in an epoch that has ended", retryable=True):
            self._answer(done.connection, done.result())

    def expire(self, now: float) -> None:
        """Answer the calls whose time is over with what there is."""
        for call in self._calls.expire(now):
            self._answer(call.connection, call.result())

    def drop_connection(self, number: int) -> None:
        """The client is gone: what still comes for it counts as late."""
        self._calls.drop_connection(number)

    def _answer(self, number: int, result: CallRanksResult) -> None:
        connection = self._connections.numbered(number)
        if connection is not None:
            self._connections.reply(connection, result)
