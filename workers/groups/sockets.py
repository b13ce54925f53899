"""A process group of gloo: connected when it is first needed, waited for in slices, buried on another thread.

The last reference to a group with a pending operation blocks until the peer is gone, so what a failed or aborted
collective leaves behind, group and buffers, is dropped on a thread of its own, after all its connections have been
closed.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch

from drumline.protocol.errors import DrumlineError
from drumline.protocol.stateless import StoreError
from drumline.workers.groups.forming import Formed
from drumline.workers.groups.point_to_point import BARRIER_TAG, PointToPoint, SocketRecv, SocketSend, first_line
from drumline.workers.groups.watch import FORM_DEADLINE_S, SLICE_S, GroupTimeout, PeerLost, Watch

T = TypeVar("T")

_SLICE = timedelta(seconds=SLICE_S)
_LAST_TAG = 7
_GRACE_S = 2.0


class Sockets:
    """The connections among the ranks of one group. Used by the main thread alone.

    From the first use on, gloo's thread wakes a hundred times a second, in an idle engine too.
    """

    def __init__(self, formed: Formed, watch: Watch) -> None:
        self._group = formed.gloo
        self._connect = formed.connect
        self._meet = formed.meet
        self._closed = formed.closed
        self._watch = watch
        self._pending: Any = None
        self._pairs = PointToPoint(watch)

    def group(self) -> Any:
        """The process group. Connects where that has not been done, which waits for all ranks."""
        if self._group is None:
            self._group = run_aside(self._connect, self._watch, FORM_DEADLINE_S)
        return self._group

    def run(self, work: Any) -> None:
        """Return when a collective of the group has ended. Errors: EpochAborted, PeerLost, GroupTimeout."""
        self._pending = work
        del work
        waited = 0.0
        while (failure := self._wait_slice()) is not None:
            if failure:
                raise self._watch.error(PeerLost, failure, self._watch.others())
            self._watch.check()
            waited += SLICE_S
            self._watch.check_deadline(waited, self._watch.others())
        self._pending = None

    def _wait_slice(self) -> str | None:
        """None when the pending operation is done, "" when it is still pending, else why it failed.

        No frame of an exception may hold on to the operation: the last reference to it must be the burying thread's.
        """
        work = self._pending
        try:
            work.wait(_SLICE)
        except RuntimeError as error:
            if not work.is_completed():
                return ""
            text = first_line(error)
        else:
            return None
        # It ended between the two lines above, well or badly; the wait no longer blocks and says which.
        try:
            work.wait()
        except RuntimeError as error:
            return first_line(error) or text
        return None

    def isend(self, data: torch.Tensor, dst: int, tag: int = 0) -> SocketSend:
        """Start to send flat bytes to position ``dst``."""
        self._pairs.make_room()
        try:
            return self._pairs.sent(self.group().send([data], dst, tag), data, dst, tag)
        except RuntimeError as error:  # the connection is known to be gone
            raise self._watch.error(PeerLost, first_line(error), [dst]) from None

    def has_room(self, dst: int) -> bool:
        """Whether :meth:`isend` waits for nobody."""
        return self._pairs.has_room()

    def irecv(self, data: torch.Tensor, src: int, tag: int = 0) -> SocketRecv:
        """Start to receive flat bytes from position ``src``."""
        try:
            return self._pairs.posted(self.group().recv([data], src, tag), data, src, tag)
        except RuntimeError as error:
            raise self._watch.error(PeerLost, first_line(error), [src]) from None

    def barrier(self, timeout_s: float) -> None:
        """Return when all ranks have called this. The GroupTimeout after ``timeout_s`` names those that have not."""
        if self._group is None:
            try:
                run_aside(lambda: self._meet(timeout_s), self._watch, timeout_s)
            except StoreError as error:
                raise self._watch.error(GroupTimeout, error.text) from None
            return
        others = self._watch.others()
        bytes_in = {position: torch.empty(1, dtype=torch.uint8) for position in others}
        waits = {position: self.irecv(data, position, BARRIER_TAG) for position, data in bytes_in.items()}
        for position in others:
            self.isend(torch.zeros(1, dtype=torch.uint8), position, BARRIER_TAG)
        left = timeout_s
        for position, wait in waits.items():
            while not wait.look(min(SLICE_S, max(left, 0.0))):
                self._watch.check()
                left -= SLICE_S
                if left <= 0:
                    missing = [late for late in others if late >= position and not waits[late].done]
                    raise self._watch.error(GroupTimeout, f"nothing within {timeout_s:g} s", missing)

    def close(self) -> None:
        """Give the connections up; never blocks. What has been sent still goes out, unless a collective failed."""
        self._closed.set()
        sends = self._pairs.close()
        if self._pending is not None or self._watch.failed:
            sends = []
        remains = [self._pending, self._group]
        self._pending = self._group = None
        if remains[1] is None:
            return
        arguments = (remains, sends, self._watch.others())
        threading.Thread(target=_bury, args=arguments, name=f"drop-{self._watch.name}", daemon=True).start()


def _bury(remains: list[Any], sends: list[SocketSend], others: list[int]) -> None:
    end = time.monotonic() + _GRACE_S
    for send in sends:
        send.settle(max(0.0, end - time.monotonic()))
    sends.clear()
    # A wait for a single message that ends in a timeout closes all connections of its group, which ends everything that
    # is pending here or at a peer, also when that peer is only stopped.
    for position in others:
        with contextlib.suppress(RuntimeError):
            remains[1].recv([torch.empty(1, dtype=torch.uint8)], position, _LAST_TAG).wait(timedelta(milliseconds=1))
    remains.clear()


def run_aside(work: Callable[[], T], watch: Watch, deadline_s: float) -> T:
    """What ``work`` returns, run on a thread that is left behind when the epoch ends or the deadline passes."""
    results: list[T] = []
    errors: list[Exception] = []
    done = threading.Event()

    def run() -> None:
        try:
            results.append(work())
        except Exception as error:  # carried to the main thread, which raises it
            errors.append(error)
        done.set()

    what = f"group {watch.name} of epoch {watch.place.epoch}, rank {watch.place.rank}"
    threading.Thread(target=run, name=f"form-{watch.name}", daemon=True).start()
    deadline = time.monotonic() + deadline_s + _GRACE_S
    while not done.wait(SLICE_S):
        watch.check()
        if time.monotonic() > deadline:
            raise GroupTimeout(f"{what}: not formed within {deadline_s:g} s")
    if results:
        return results[0]
    if isinstance(errors[0], DrumlineError):
        raise errors[0]
    raise PeerLost(f"{what}: could not be formed: {errors[0]}") from errors[0]
