"""Messages between two ranks over sockets, started now and waited for later.

Gloo closes every connection of a group when the wait for one such message ends in a timeout, so the main thread cannot
wait in slices itself: a thread per peer and direction waits without end, and the main thread waits for that thread.
Messages of one peer, direction and tag arrive in the order in which they were started, so that one thread sees them all
in time. Close the connections, and the waits end.
"""

from __future__ import annotations

import threading
from collections import deque
from datetime import timedelta
from queue import SimpleQueue
from typing import Any

from torch import Tensor

from drumline.workers.groups.pending import Pending, PendingRecv, PendingSend, has_room, make_room
from drumline.workers.groups.watch import PeerLost, Watch

BARRIER_TAG = 1
_FOREVER = timedelta(days=30)


class _OverSockets(Pending):
    """A message of gloo; keeps its buffer alive until it is through."""

    def __init__(self, work: Any, data: Tensor, peer: int, watch: Watch) -> None:
        super().__init__(watch, peer)
        self._work = work
        self._data = data
        self._done = threading.Event()
        self._failure = ""

    @property
    def done(self) -> bool:
        """Whether the message is through, or has failed."""
        return self._done.is_set()

    def run(self) -> None:
        """On the peer's thread: wait for the end, whatever it is."""
        try:
            self._work.wait(_FOREVER)
        except RuntimeError as error:
            self._failure = first_line(error)
        self._work = None
        self._done.set()

    def settle(self, timeout_s: float) -> None:
        """Return when the message is through or has failed, or ``timeout_s`` have passed."""
        self._done.wait(timeout_s)

    def look(self, slice_s: float) -> bool:
        """Whether the message is through within ``slice_s``. Raises PeerLost when it has failed."""
        if not self._done.wait(slice_s):
            return False
        if self._failure:
            self._watch.check()
            raise self._watch.error(PeerLost, self._failure, [self._peer])
        return True


class SocketSend(_OverSockets, PendingSend):
    """See :class:`PendingSend`."""


class SocketRecv(_OverSockets, PendingRecv):
    """See :class:`PendingRecv`."""


class PointToPoint:
    """The messages of one group that are under way. Used by the main thread alone."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch
        self._lanes: dict[tuple[str, int, int], SimpleQueue[_OverSockets | None]] = {}
        self._sends: deque[SocketSend] = deque()

    def make_room(self) -> None:
        """See the function of that name."""
        make_room(self._sends)

    def has_room(self) -> bool:
        """See the function of that name."""
        return has_room(self._sends)

    def sent(self, work: Any, data: Tensor, peer: int, tag: int) -> SocketSend:
        """Take over a send that has been started."""
        pending = SocketSend(work, data, peer, self._watch)
        self._sends.append(pending)
        self._lane("send", peer, tag).put(pending)
        return pending

    def posted(self, work: Any, data: Tensor, peer: int, tag: int) -> SocketRecv:
        """Take over a receive that has been posted."""
        pending = SocketRecv(work, data, peer, self._watch)
        pending.result = data
        self._lane("recv", peer, tag).put(pending)
        return pending

    def close(self) -> list[SocketSend]:
        """Let the threads end when their messages have. Returns the sends that are unfinished."""
        for lane in self._lanes.values():
            lane.put(None)
        self._lanes.clear()
        sends = [send for send in self._sends if not send.done]
        self._sends.clear()
        return sends

    def _lane(self, direction: str, peer: int, tag: int) -> SimpleQueue[_OverSockets | None]:
        lane = self._lanes.get((direction, peer, tag))
        if lane is None:
            lane = self._lanes[direction, peer, tag] = SimpleQueue()
            name = f"{direction}-{self._watch.name}-{peer}"
            threading.Thread(target=_serve, args=(lane,), name=name, daemon=True).start()
        return lane


def first_line(error: RuntimeError) -> str:
    """What gloo says, without its advice and without a C++ trace."""
    return str(error).partition("\n")[0].partition(". This is typically caused")[0]


def _serve(lane: SimpleQueue[_OverSockets | None]) -> None:
    while (pending := lane.get()) is not None:
        pending.run()
        del pending
