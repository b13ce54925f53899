"""Memory that the ranks of one host share: every rank writes into its own mailbox, and all read it.

A collective over it costs microseconds where sockets cost hundreds: nothing is copied through the kernel and, while the
ranks keep step, nobody sleeps. The memory is anonymous (memfd), so it leaves no file behind and ends with the last
process that maps it; a page of it is there only once it has been written.

Every operation has a number, the same on all ranks. A rank fills the half of its mailbox that belongs to the number's
parity and then raises its counter; readers wait for the counter. A counter at k says, too, that its rank has read all
it wanted of the operations before k. So two halves are enough: a half is written for operation k only when all counters
have reached k - 1, which means that nobody reads what it held for k - 2.

Counter and content need no fence on x86-64, where stores become visible in order; elsewhere the sockets do.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import select
from collections.abc import Sequence

import torch
from torch import Tensor

from drumline.workers.watch import SLICE_S, GroupTimeout, PeerLost, Watch

HALF_BYTES = 4 << 20
SPINS = 200
NONCE_AT, NONCE_BYTES = 16, 16
_COUNTER, _LEFT, _HEADER = 0, 8, 64
_SYS_FUTEX, _FUTEX_WAIT, _FUTEX_WAKE = 202, 0, 1
_ALL_WAITERS = 0x7FFFFFFF
_libc = ctypes.CDLL(None, use_errno=True)


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class Mailbox:
    """One rank's mapped memory: counter, a flag for having left, a nonce, and per half the bounds and the content."""

    def __init__(self, fd: int, size: int, pid: int) -> None:
        self._memory = mmap.mmap(fd, mailbox_bytes(size))
        self.words = memoryview(self._memory)[:_HEADER].cast("q")
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self.pidfd = os.pidfd_open(pid)
        bounds_bytes = _bounds_bytes(size)
        self.bounds: list[Tensor] = []
        self.halves: list[Tensor] = []
        for half in (0, 1):
            at = _HEADER + half * bounds_bytes
            self.bounds.append(torch.frombuffer(self._memory, dtype=torch.int32, count=size + 1, offset=at))
            at = _HEADER + 2 * bounds_bytes + half * HALF_BYTES
            self.halves.append(torch.frombuffer(self._memory, dtype=torch.int32, count=HALF_BYTES // 4, offset=at))
        self._views: dict[torch.dtype, tuple[Tensor, Tensor]] = {}

    def view(self, half: int, dtype: torch.dtype) -> Tensor:
        """One half as a flat tensor of ``dtype``."""
        views = self._views.get(dtype)
        if views is None:
            views = self._views[dtype] = (self.halves[0].view(dtype), self.halves[1].view(dtype))
        return views[half]

    def __del__(self) -> None:
        if hasattr(self, "pidfd"):
            os.close(self.pidfd)


class Mailboxes:
    """The mailboxes of one epoch's group, by position. Used by the main thread alone.

    Errors of every wait: EpochAborted, PeerLost, GroupTimeout.
    """

    def __init__(self, position: int, boxes: Sequence[Mailbox], watch: Watch) -> None:
        self.position = position
        self._boxes = boxes
        self._own = boxes[position]
        self._counters = [box.words for box in boxes]
        self._operation = 0
        self._slice = _Timespec(0, int(SLICE_S * 1e9))
        self._watch = watch

    def begin(self) -> int:
        """The number of the next operation; its half of the own mailbox may be written now.

        Waits for ranks that have not begun the operation before, and may still read the one before that.
        """
        operation = self._operation = self._operation + 1
        for position, counter in enumerate(self._counters):
            if counter[0] < operation - 1:
                self.wait_for(position, operation - 1)
        return operation

    def join(self) -> int:
        """The number of the next operation, in which this rank writes nothing. Waits for nobody."""
        self._operation += 1
        self.publish(self._operation)
        return self._operation

    def content(self, position: int, operation: int) -> Tensor:
        """int32 (HALF_BYTES / 4,): the words of a mailbox that belong to an operation."""
        return self._boxes[position].halves[operation & 1]

    def half(self, position: int, operation: int, dtype: torch.dtype) -> Tensor:
        """(HALF_BYTES / element size,): the same memory as elements of ``dtype``."""
        return self._boxes[position].view(operation & 1, dtype)

    def bounds(self, position: int, operation: int) -> Tensor:
        """int32 (size + 1,): a few numbers beside the content."""
        return self._boxes[position].bounds[operation & 1]

    def publish(self, operation: int) -> None:
        """What has been written is complete."""
        self._own.words[_COUNTER // 8] = operation
        _futex(self._own.address, _FUTEX_WAKE, _ALL_WAITERS, None)

    def wait_for(self, position: int, operation: int) -> None:
        """Return when a rank has published ``operation``."""
        if self._counters[position][0] >= operation:
            return
        waited = 0.0
        while not self.wait(position, operation):
            self._look(position, operation)
            waited += SLICE_S
            if waited >= self._watch.deadline_s:
                self._watch.check_deadline(waited, self.missing(operation))

    def wait_for_all(self, operation: int, timeout_s: float) -> None:
        """Return when all have published ``operation``; the GroupTimeout after ``timeout_s`` names who has not."""
        left = timeout_s
        while missing := self.missing(operation):
            if left <= 0:
                raise self._watch.error(GroupTimeout, f"nothing within {timeout_s:g} s", missing)
            slice_s = min(left, SLICE_S)
            if not self.wait(missing[0], operation, _Timespec(0, int(slice_s * 1e9))):
                self._look(missing[0], operation)
                left -= slice_s

    def missing(self, operation: int) -> list[int]:
        """The positions of the ranks that have not published ``operation``."""
        return [position for position, counter in enumerate(self._counters) if counter[0] < operation]

    def _look(self, position: int, operation: int) -> None:
        self._watch.check()
        gone = self.gone(position)
        # What it published before it went still counts.
        if gone and self._counters[position][0] < operation:
            raise self._watch.error(PeerLost, gone, [position])

    def wait(self, position: int, operation: int, limit: _Timespec | None = None) -> bool:
        """Whether a rank has published ``operation``; waits one slice of time, or ``limit``, at most."""
        box = self._boxes[position]
        words = box.words
        for _ in range(SPINS):
            if words[0] >= operation:
                return True
            os.sched_yield()
        seen = words[0]
        if seen < operation and not self.gone(position):
            _futex(box.address, _FUTEX_WAIT, seen & 0xFFFFFFFF, limit or self._slice)
        return bool(words[0] >= operation)

    def gone(self, position: int) -> str:
        """Why a rank will publish no more: it has left the epoch, or its process has ended. Empty while it may."""
        box = self._boxes[position]
        if box.words[_LEFT // 8]:
            return "it has left the epoch"
        ended = select.poll()
        ended.register(box.pidfd, select.POLLIN)
        return "its process has ended" if ended.poll(0) else ""

    def leave(self) -> None:
        """Tell the others that this rank publishes no more."""
        self._own.words[_LEFT // 8] = 1
        _futex(self._own.address, _FUTEX_WAKE, _ALL_WAITERS, None)


def _bounds_bytes(size: int) -> int:
    return -(-4 * (size + 1) // 64) * 64


def mailbox_bytes(size: int) -> int:
    return _HEADER + 2 * _bounds_bytes(size) + 2 * HALF_BYTES


def _futex(address: int, operation: int, value: int, timeout: _Timespec | None) -> None:
    """Wait or wake; every return, a signal or a timeout too, only means that it is time to look again."""
    limit = None if timeout is None else ctypes.byref(timeout)
    _libc.syscall(_SYS_FUTEX, ctypes.c_void_p(address), operation, ctypes.c_uint32(value), limit, None, 0)
