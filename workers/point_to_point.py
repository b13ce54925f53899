"""Messages between two ranks that are started now and waited for later.

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

from drumline.workers.watch import SLICE_S, PeerLost, Watch

MAX_UNFINISHED_SENDS = 64
BARRIER_TAG = 1
_FOREVER = timedelta(days=30)


class Pending:
    """A message under way; keeps its buffer alive until it is through."""

    def __init__(self, work: Any, data: Tensor, peer: int, watch: Watch) -> None:
        self._work = work
        self._data: Tensor | None = data
        self._peer = peer
        self._watch = watch
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

    def _finish(self) -> None:
        waited = 0.0
        while not self.look(SLICE_S):
            self._watch.check()
            waited += SLICE_S
            self._watch.check_deadline(waited, [self._peer])


class PendingSend(Pending):
    """A message that is being sent. Its tensor must not be written to before :meth:`wait` has returned."""

    def wait(self) -> None:
        """Return when the tensor may be used again. Errors: EpochAborted, PeerLost, GroupTimeout."""
        if not self.done or self._failure:
            with self._watch:
                self._finish()
        self._data = None


class PendingRecv(Pending):
    """A message that is expected."""

    result: Tensor

    def wait(self) -> Tensor:
        """The tensor, when it is there. Errors: EpochAborted, PeerLost, GroupTimeout."""
        with self._watch:
            self._finish()
        return self.result


class PointToPoint:
    """The messages of one group that are under way. Used by the main thread alone."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch
        self._lanes: dict[tuple[str, int, int], SimpleQueue[Pending | None]] = {}
        self._sends: deque[PendingSend] = deque()

    def make_room(self) -> None:
        """See the function of that name."""
        make_room(self._sends)

    def sent(self, work: Any, data: Tensor, peer: int, tag: int) -> PendingSend:
        """Take over a send that has been started."""
        pending = PendingSend(work, data, peer, self._watch)
        self._sends.append(pending)
        self._lane("send", peer, tag).put(pending)
        return pending

    def posted(self, work: Any, data: Tensor, peer: int, tag: int) -> PendingRecv:
        """Take over a receive that has been posted."""
        pending = PendingRecv(work, data, peer, self._watch)
        self._lane("recv", peer, tag).put(pending)
        return pending

    def close(self) -> list[PendingSend]:
        """Let the threads end when their messages have. Returns the sends that are unfinished."""
        for lane in self._lanes.values():
            lane.put(None)
        self._lanes.clear()
        sends = [send for send in self._sends if not send.done]
        self._sends.clear()
        return sends

    def _lane(self, direction: str, peer: int, tag: int) -> SimpleQueue[Pending | None]:
        lane = self._lanes.get((direction, peer, tag))
        if lane is None:
            lane = self._lanes[direction, peer, tag] = SimpleQueue()
            name = f"{direction}-{self._watch.name}-{peer}"
            threading.Thread(target=_serve, args=(lane,), name=name, daemon=True).start()
        return lane


def make_room(sends: deque[PendingSend]) -> None:
    """Wait for the oldest send while ``MAX_UNFINISHED_SENDS`` are unfinished. Errors: those of its wait."""
    while sends and (sends[0].done or len(sends) >= MAX_UNFINISHED_SENDS):
        sends.popleft().wait()


def first_line(error: RuntimeError) -> str:
    """What gloo says, without its advice and without a C++ trace."""
    return str(error).partition("\n")[0].partition(". This is typically caused")[0]


def _serve(lane: SimpleQueue[Pending | None]) -> None:
    while (pending := lane.get()) is not None:
        pending.run()
        del pending
