"""What a rank has to say, until the socket takes it."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable

from drumline.protocol.errors import EngineClosed
from drumline.protocol.messages import FromWorker, Loaded

OUTBOX_LIMIT = 64
ROOM_DEADLINE_S = 5.0
RETRY_S = 0.01
FLUSH_S = 0.2
# What ZeroMQ has taken its own thread has yet to write.
_WRITE_S = 0.02


class Outbox:
    """Messages in order. The main thread puts; the control thread puts and sends. ``send`` says whether the socket took
    a message; one that it did not take is held back, and all others behind it."""

    def __init__(self, send: Callable[[FromWorker], bool]) -> None:
        self.wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.dropped = 0
        #: The coordinator's, whom nothing of an older one is told. Before it has any a rank speaks of term -1.
        self.term = -1
        #: Terms whose Load is under way and was not answered yet.
        self.loads: set[int] = set()
        self._send = send
        # SimpleQueue is one lock in C; its bound is kept by those that put.
        self._queue: queue.SimpleQueue[FromWorker | threading.Event] = queue.SimpleQueue()
        self._held: FromWorker | None = None

    # ------------------------------------------------------------------------------------------- on the main thread

    def put(self, message: FromWorker) -> None:
        """Have ``message`` sent. Waits at most 5 s for room, of which there is plenty while the coordinator reads.

        Raises:
            EngineClosed: the queue stayed full.
        """
        if self._queue.qsize() >= OUTBOX_LIMIT:
            self._await_room()
        self._queue.put(message)
        self.wake()

    def put_and_flush(self, message: FromWorker) -> None:
        """Have ``message`` sent, and wait for at most 0.2 s until it is."""
        sent = threading.Event()
        self._queue.put(message)
        self._queue.put(sent)
        self.wake()
        sent.wait(FLUSH_S)
        time.sleep(_WRITE_S)

    def wake(self) -> None:
        """End the control thread's poll."""
        os.eventfd_write(self.wake_fd, 1)

    def _await_room(self) -> None:
        deadline = time.monotonic() + ROOM_DEADLINE_S
        while self._queue.qsize() >= OUTBOX_LIMIT:
            if time.monotonic() > deadline:
                raise EngineClosed(f"{OUTBOX_LIMIT} replies wait and the coordinator reads none")
            time.sleep(RETRY_S)

    # ---------------------------------------------------------------------------------------- on the control thread

    def __len__(self) -> int:
        return self._queue.qsize() + self.waits

    @property
    def waits(self) -> bool:
        """Whether the socket has no room."""
        return self._held is not None

    def add(self, message: FromWorker) -> None:
        """A message of the control thread, which waits for nothing, behind all others."""
        self._queue.put(message)
        self.drain()

    def drain(self) -> None:
        """Send what the socket takes. Raises EngineClosed when the peer is gone."""
        if self._held is not None and not self._transmit(self._held):
            return
        while self._held is None:
            try:
                entry = self._queue.get_nowait()
            except queue.Empty:
                return
            if isinstance(entry, threading.Event):
                entry.set()
            else:
                self._transmit(entry)

    def drain_within(self, deadline_s: float) -> None:
        """As :meth:`drain`, until all is sent or the time is over."""
        deadline = time.monotonic() + deadline_s
        while True:
            self.drain()
            if not len(self) or time.monotonic() > deadline:
                return
            time.sleep(RETRY_S)

    def flush(self, message: FromWorker) -> None:
        """Send ``message`` behind all others, if that can be done in 0.2 s."""
        self._queue.put(message)
        self.drain_within(FLUSH_S)
        time.sleep(_WRITE_S)

    def drop(self) -> None:
        """Forget everything: it was meant for a coordinator that is gone."""
        held, self._held = self._held, None
        entry: FromWorker | threading.Event | None = held
        while True:
            if isinstance(entry, threading.Event):
                entry.set()
            elif entry is not None:
                self._answered(entry)
                self.dropped += 1
            try:
                entry = self._queue.get_nowait()
            except queue.Empty:
                return

    def _transmit(self, message: FromWorker) -> bool:
        """Send, or hold the message back until the socket takes it."""
        stale = 0 <= message.term < self.term
        self._held = message  # also when the peer turns out to be gone
        if stale or self._send(message):
            self._held = None
            self._answered(message)
            self.dropped += stale
        return self._held is None

    def _answered(self, message: FromWorker) -> None:
        if isinstance(message, Loaded):
            self.loads.discard(message.term)
