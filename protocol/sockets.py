"""The sockets that processes talk over: ``Router`` and ``Dealer`` for asyncio, ``ThreadDealer`` for a thread.

All three are plain ZeroMQ sockets that never block. The asyncio ones watch ZeroMQ's descriptor themselves, because a
send must tell at once what became of it, and because it is cheaper than a future per operation. The bounded queues are
ZeroMQ's own (the high-water marks); nothing is queued here.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import zmq

from drumline.protocol.codec import MAX_FRAME_BYTES, Codec, Frame
from drumline.protocol.endpoints import check_endpoint, clear_stale_path
from drumline.protocol.errors import EngineClosed, InvalidConfig
from drumline.protocol.messages import Message
from drumline.protocol.transport import DEFAULT_HWM, LINGER_S, Link, SendResult, SocketStatistics

__all__ = ["Dealer", "Router", "SendResult", "SocketStatistics", "ThreadDealer", "check_endpoint"]

T = TypeVar("T")

# A receiver that always finds a message would never give the loop a turn.
_TURNS_BEFORE_YIELD = 32


class _AsyncLink(Generic[T]):
    """A :class:`Link` in a running event loop. One task receives; anyone in the loop sends."""

    def __init__(self, link: Link[T]) -> None:
        self._link = link
        self._loop = asyncio.get_running_loop()
        self._waiter: asyncio.Future[None] | None = None
        self._turns = 0
        self._closed = False
        self._descriptors = (link.socket.FD, link.monitor.FD)
        self._loop.add_reader(self._descriptors[0], self._wake_if_readable)
        self._loop.add_reader(self._descriptors[1], self._on_monitor)
        # A descriptor announces only what comes after a read that found nothing.
        link.drain_monitor()

    def statistics(self) -> SocketStatistics:
        if not self._closed:
            self._link.drain_monitor()
        return self._link.count.snapshot()

    def close(self, linger_s: float = LINGER_S) -> None:
        """Close at once; messages already sent are still delivered for up to ``linger_s``. Idempotent.

        A task that waits in ``recv`` gets EngineClosed.
        """
        if self._closed:
            return
        self._closed = True
        for descriptor in self._descriptors:
            self._loop.remove_reader(descriptor)
        self._link.close(linger_s)
        self._wake()

    def _send(self, frames: Sequence[Frame]) -> SendResult:
        result = self._link.send_frames(frames)
        # The send may have worked off the mailbox that announces input, and then the descriptor stays silent.
        if self._waiter is not None:
            self._wake_if_readable()
        return result

    async def _receive(self) -> list[bytes]:
        if self._waiter is not None:
            raise RuntimeError("another task receives from this socket already")
        self._turns += 1
        if self._turns >= _TURNS_BEFORE_YIELD:
            self._turns = 0
            await asyncio.sleep(0)
        while not self._closed:
            frames = self._link.receive_frames()
            if frames is not None:
                return frames
            if self._ended():
                break
            self._turns = 0
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        raise EngineClosed(self._end_reason())

    def _ended(self) -> bool:
        """Whether nothing can come any more."""
        return False

    def _end_reason(self) -> str:
        return f"the socket {self._link.count.name} is closed"

    def _on_monitor(self) -> None:
        self._link.drain_monitor()
        if self._ended():
            self._wake()

    def _wake_if_readable(self) -> None:
        if self._link.readable():
            self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Router(_AsyncLink[T]):
    """Binds, and talks to many peers by their identity. Make it inside a running event loop.

    ``codec_in`` is for the messages that come in; any message can be sent. ``hwm`` bounds the messages queued per
    peer. Raises InvalidConfig for an endpoint that is not allowed or in use.
    """

    def __init__(
        self,
        context: zmq.Context[Any],
        endpoint: str,
        codec_in: Codec[T],
        *,
        hwm: int = DEFAULT_HWM,
        max_frame_bytes: int = MAX_FRAME_BYTES,
    ) -> None:
        check_endpoint(endpoint)
        clear_stale_path(endpoint)
        link = Link(context, zmq.ROUTER, endpoint, codec_in, hwm=hwm, max_frame_bytes=max_frame_bytes)
        try:
            link.socket.set(zmq.SocketOption.ROUTER_MANDATORY, 1)
            link.socket.bind(endpoint)
            if endpoint.startswith("ipc://"):
                Path(endpoint.removeprefix("ipc://")).chmod(0o600)
        except (zmq.ZMQError, OSError) as error:
            link.close(0.0)
            raise InvalidConfig("endpoint", f"{endpoint} ({error})", "an address that can be bound") from error
        #: Where it is really bound; differs from the endpoint asked for when that had port 0.
        self.endpoint: str = link.socket.get_string(zmq.SocketOption.LAST_ENDPOINT)
        super().__init__(link)

    def close(self, linger_s: float = LINGER_S) -> None:
        if not self._closed and self.endpoint.startswith("ipc://"):
            # ZeroMQ leaves the file behind.
            Path(self.endpoint.removeprefix("ipc://")).unlink(missing_ok=True)
        super().close(linger_s)

    async def recv(self) -> tuple[bytes, T]:
        """The next message and the identity of its sender.

        What does not decode is counted, logged once per peer and passed over. Raises EngineClosed after ``close``.
        """
        while True:
            frames = await self._receive()
            message = self._link.decode(frames[0], frames[1:])
            if message is not None:
                return frames[0], message

    def take_encoded(self, identity: bytes, frames: Sequence[bytes]) -> T | None:
        """The message in ``frames``, as if they had come from ``identity`` now; None, and counted, if they do not
        decode."""
        return self._link.decode(identity, list(frames))

    def send(self, identity: bytes, message: Message) -> SendResult:
        """Encode and send; never blocks. GONE: no such peer. FULL: ``hwm`` messages wait for it."""
        return self._send([identity, *self._link.encode(message)])

    def send_encoded(self, identity: bytes, frames: Sequence[Frame]) -> SendResult:
        """Send frames that a codec made, for a message that goes to several peers."""
        return self._send([identity, *frames])


class Dealer(_AsyncLink[T]):
    """Connects to one Router. Make it inside a running event loop.

    Messages sent before the other side has bound wait for it, ``hwm`` of them at most. Once connected, the loss of
    the connection is final: ``lost`` becomes true, ``recv`` gives what had arrived and then raises EngineClosed.
    """

    def __init__(
        self,
        context: zmq.Context[Any],
        endpoint: str,
        codec_in: Codec[T],
        *,
        hwm: int = DEFAULT_HWM,
        max_frame_bytes: int = MAX_FRAME_BYTES,
    ) -> None:
        super().__init__(_connect(context, endpoint, codec_in, hwm, max_frame_bytes))
        self.endpoint = endpoint

    @property
    def lost(self) -> bool:
        """Whether a connection that stood has ended."""
        return self._link.lost

    async def recv(self) -> T:
        """The next message. Raises EngineClosed when the connection is lost or the socket closed."""
        while True:
            message = self._link.decode(b"", await self._receive())
            if message is not None:
                return message

    def send(self, message: Message) -> SendResult:
        """Encode and send; never blocks. GONE: the connection is lost. FULL: ``hwm`` messages wait."""
        return self.send_encoded(self._link.encode(message))

    def send_encoded(self, frames: Sequence[Frame]) -> SendResult:
        if self._link.lost:
            self._link.count.gone += 1
            return SendResult.GONE
        return self._send(frames)

    def _ended(self) -> bool:
        return self._link.lost

    def _end_reason(self) -> str:
        if self._closed:
            return super()._end_reason()
        return f"the connection to {self.endpoint} is lost"


class ThreadDealer(Generic[T]):
    """Connects to one Router from a thread that waits in :meth:`poll`. Only that thread may use it.

    The loss of the connection is final, as with :class:`Dealer`.
    """

    def __init__(
        self,
        context: zmq.Context[Any],
        endpoint: str,
        codec_in: Codec[T],
        *,
        hwm: int = DEFAULT_HWM,
        max_frame_bytes: int = MAX_FRAME_BYTES,
    ) -> None:
        self._link = _connect(context, endpoint, codec_in, hwm, max_frame_bytes)
        self.endpoint = endpoint
        self._poller = zmq.Poller()
        self._poller.register(self._link.socket, zmq.POLLIN)
        self._poller.register(self._link.monitor, zmq.POLLIN)
        self._others: tuple[int, ...] = ()

    @property
    def lost(self) -> bool:
        """Whether a connection that stood has ended."""
        return self._link.lost

    def poll(self, others: Sequence[int] = (), timeout_s: float = 0.0) -> set[int]:
        """Wait until a message is here, the connection is lost, one of ``others`` is readable, or the time is over.

        Returns those of ``others`` (file descriptors) that are readable or at their end. Call ``recv_nowait`` until it
        gives None afterwards.
        """
        self._watch(tuple(others))
        deadline = time.monotonic() + timeout_s
        while True:
            ready = dict(self._poller.poll(max(0, round((deadline - time.monotonic()) * 1000))))
            if self._link.monitor in ready:
                self._link.drain_monitor()
            found = {fd for fd in self._others if fd in ready}
            if found or self._link.socket in ready or self._link.lost or time.monotonic() >= deadline:
                return found

    def recv_nowait(self) -> T | None:
        """The next message, None when there is none now. Raises EngineClosed when none can come any more."""
        while not self._link.socket.closed:
            frames = self._link.receive_frames()
            if frames is not None:
                message = self._link.decode(b"", frames)
                if message is not None:
                    return message
                continue
            self._link.drain_monitor()
            if not self._link.lost:
                return None
            raise EngineClosed(f"the connection to {self.endpoint} is lost")
        raise EngineClosed(f"the socket {self.endpoint} is closed")

    def send(self, message: Message) -> SendResult:
        """Encode and send; never blocks. GONE: the connection is lost. FULL: ``hwm`` messages wait."""
        if self._link.lost:
            self._link.count.gone += 1
            return SendResult.GONE
        return self._link.send_frames(self._link.encode(message))

    def statistics(self) -> SocketStatistics:
        return self._link.count.snapshot()

    def close(self, linger_s: float = LINGER_S) -> None:
        """Close at once; messages already sent are still delivered for up to ``linger_s``. Idempotent."""
        self._link.close(linger_s)

    def _watch(self, others: tuple[int, ...]) -> None:
        if others == self._others:
            return
        for fd in self._others:
            self._poller.unregister(fd)
        for fd in others:
            self._poller.register(fd, zmq.POLLIN | zmq.POLLERR)
        self._others = others


def _connect(context: zmq.Context[Any], endpoint: str, codec: Codec[T], hwm: int, max_frame_bytes: int) -> Link[T]:
    check_endpoint(endpoint)
    link = Link(context, zmq.DEALER, endpoint, codec, hwm=hwm, max_frame_bytes=max_frame_bytes)
    try:
        link.socket.connect(endpoint)
    except zmq.ZMQError as error:
        link.close(0.0)
        raise InvalidConfig("endpoint", f"{endpoint} ({error})", "an address that can be connected to") from error
    return link
