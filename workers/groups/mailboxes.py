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

from drumline.workers.groups.shared_counter import SharedCounter
from drumline.workers.groups.watch import SLICE_S, GroupTimeout, PeerLost, Watch

HALF_BYTES = 4 << 20
OUTBOX_SLOTS, OUTBOX_SLOT_BYTES = 64, 64 << 10
OUTBOX_BYTES = OUTBOX_SLOTS * OUTBOX_SLOT_BYTES + 4096
NONCE_AT, NONCE_BYTES = 16, 16
_COUNTER, _LEFT, _HEADER = 0, 1, 64


class Mailbox:
    """One rank's mapped memory: counter, a flag for having left, a nonce, per half the bounds and the content, and last
    its outboxes, one for each rank (:mod:`drumline.workers.groups.outboxes`)."""

    def __init__(self, fd: int, size: int, pid: int) -> None:
        self.memory = mmap.mmap(fd, mailbox_bytes(size))
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.words = memoryview(self.memory)[:_HEADER].cast("q")
        self.counter = SharedCounter(self.words, _COUNTER, self.address)
        self.pid = pid
        self.pidfd = os.pidfd_open(pid)
        self.outboxes_at = _HEADER + 2 * _bounds_bytes(size) + 2 * HALF_BYTES
        bounds_bytes = _bounds_bytes(size)
        self.bounds: list[Tensor] = []
        self.halves: list[Tensor] = []
        for half in (0, 1):
            at = _HEADER + half * bounds_bytes
            self.bounds.append(torch.frombuffer(self.memory, dtype=torch.int32, count=size + 1, offset=at))
            at = _HEADER + 2 * bounds_bytes + half * HALF_BYTES
            self.halves.append(torch.frombuffer(self.memory, dtype=torch.int32, count=HALF_BYTES // 4, offset=at))
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
        self._watch = watch

    @property
    def boxes(self) -> Sequence[Mailbox]:
        """All mailboxes, by position."""
        return self._boxes

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
        self._own.counter.raise_to(operation)

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
            if not self.wait(missing[0], operation, slice_s):
                self._look(missing[0], operation)
                left -= slice_s

    def missing(self, operation: int) -> list[int]:
        """The positions of the ranks that have not published ``operation``."""
        return [position for position, counter in enumerate(self._counters) if counter[0] < operation]

    def wait(self, position: int, operation: int, slice_s: float = SLICE_S) -> bool:
        """Whether a rank has published ``operation``; waits for ``slice_s`` at most."""
        return self._boxes[position].counter.wait(operation, slice_s, lambda: self.gone(position))

    def _look(self, position: int, operation: int) -> None:
        gone = self.check_peer(position)
        # What it published before it went still counts.
        if gone and self._counters[position][0] < operation:
            raise self._watch.error(PeerLost, gone, [position])

    def check_peer(self, position: int) -> str:
        """What :meth:`gone` says, while the epoch lasts; else EpochAborted."""
        self._watch.check()
        return self.gone(position)

    def gone(self, position: int) -> str:
        """Why a rank will publish no more: it has left the epoch, or its process has ended. Empty while it may."""
        box = self._boxes[position]
        if box.words[_LEFT]:
            return "it has left the epoch"
        ended = select.poll()
        ended.register(box.pidfd, select.POLLIN)
        return "its process has ended" if ended.poll(0) else ""

    def leave(self) -> None:
        """Tell the others that this rank publishes no more."""
        self._own.words[_LEFT] = 1
        self._own.counter.wake()


def _bounds_bytes(size: int) -> int:
    return -(-4 * (size + 1) // 64) * 64


def mailbox_bytes(size: int) -> int:
    """How long a mailbox is in a group of ``size`` ranks."""
    return _HEADER + 2 * _bounds_bytes(size) + 2 * HALF_BYTES + size * OUTBOX_BYTES
