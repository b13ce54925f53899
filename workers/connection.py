"""The control thread's connection to its coordinator, which may be followed by one to the next coordinator."""

from __future__ import annotations

import select
import threading
from collections.abc import Sequence
from typing import Any

import zmq

from drumline.protocol.codec import Codec
from drumline.protocol.errors import EngineClosed
from drumline.protocol.messages import Message, ToWorker
from drumline.protocol.sockets import SendResult, SocketStatistics, ThreadDealer


class Connection:
    """One at a time. Only the control thread uses it."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self._context: zmq.Context[Any] = zmq.Context()
        self._codec: Codec[ToWorker] = Codec(ToWorker)
        self._dealer: ThreadDealer[ToWorker] | None = None

    @property
    def is_open(self) -> bool:
        """Whether there is a socket, be it that nobody listens yet."""
        return self._dealer is not None

    def open(self) -> None:
        """Connect, with a new socket. Raises InvalidConfig for an endpoint that is none."""
        self.drop()
        self._dealer = ThreadDealer(self._context, self.endpoint, self._codec)

    def drop(self) -> None:
        """Close the socket; what it has not sent yet is gone."""
        if self._dealer is not None:
            self._dealer.close(linger_s=0.0)
            self._dealer = None

    def poll(self, others: Sequence[int], timeout_s: float) -> set[int]:
        """As :meth:`ThreadDealer.poll`."""
        if self._dealer is not None:
            return self._dealer.poll(others, timeout_s)
        poller = select.poll()
        for fd in others:
            poller.register(fd, select.POLLIN)
        return {fd for fd, _ in poller.poll(round(1000 * timeout_s))}

    def recv_nowait(self) -> ToWorker | None:
        """The next message, None when there is none now. Raises EngineClosed when the connection is lost."""
        return None if self._dealer is None else self._dealer.recv_nowait()

    def send(self, message: Message) -> bool:
        """Whether the socket took the message. Raises EngineClosed when the connection is lost."""
        result = SendResult.GONE if self._dealer is None else self._dealer.send(message)
        if result is SendResult.GONE:
            raise EngineClosed(f"the connection to {self.endpoint} is lost")
        return result is SendResult.SENT

    def statistics(self) -> SocketStatistics:
        return SocketStatistics() if self._dealer is None else self._dealer.statistics()

    def close(self, linger_s: float) -> None:
        """Let out what has been sent, for up to ``linger_s``; nothing can be opened afterwards."""
        if self._dealer is not None:
            self._dealer.close(linger_s=linger_s)
        # Terminating the context is what waits for the linger; on its own thread, so that the deadline is ours.
        ended = threading.Thread(target=self._context.term, daemon=True)
        ended.start()
        ended.join(linger_s)
