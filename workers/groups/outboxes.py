"""Messages between two ranks of one host, through memory that they share.

In its mailbox every rank has an outbox for each other one: slots in a ring, filled by the sender, emptied by the
receiver in the same order. A send copies its bytes and is over at once; it waits only while the receiver has left as
many messages unread as there are slots. What does not fit a slot gets memory of its own (memfd), which the sender uses
again when the receiver has read it.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from drumline.protocol.errors import ProtocolError
from drumline.workers.groups.mailboxes import OUTBOX_BYTES, OUTBOX_SLOT_BYTES, OUTBOX_SLOTS, Mailbox, Mailboxes
from drumline.workers.groups.pending import PendingRecv, PendingSend
from drumline.workers.groups.shared_counter import SharedCounter
from drumline.workers.groups.watch import SLICE_S, PeerLost, Watch

# Words of an outbox, each counter in a cache line of its own; a slot's length and descriptor follow.
_WRITTEN, _READ, _SLOTS_AT = 0, 8, 16
_CONTROL_BYTES = 4096
_IN_SLOT = -1
_GRACE_S = 2.0


class _Outbox:
    """The messages from the rank that owns ``box`` to position ``dst``, as either of them sees it."""

    def __init__(self, box: Mailbox, dst: int) -> None:
        at = box.outboxes_at + dst * OUTBOX_BYTES
        self.pid = box.pid
        self.words = memoryview(box.memory)[at : at + _CONTROL_BYTES].cast("q")
        self.written = SharedCounter(self.words, _WRITTEN, box.address + at)
        self.read = SharedCounter(self.words, _READ, box.address + at)
        length = OUTBOX_SLOTS * OUTBOX_SLOT_BYTES
        self._slots = torch.frombuffer(box.memory, dtype=torch.uint8, count=length, offset=at + _CONTROL_BYTES)

    def slot(self, number: int, length: int) -> Tensor:
        """uint8 (length,): the memory of message ``number``."""
        start = number % OUTBOX_SLOTS * OUTBOX_SLOT_BYTES
        return self._slots[start : start + length]

    def label(self, number: int) -> int:
        """Where among the words the length of message ``number`` stands, with its descriptor behind it."""
        return _SLOTS_AT + 2 * (number % OUTBOX_SLOTS)


@dataclass(slots=True)
class _Large:
    """Memory for one message that no slot holds: in use until ``outbox`` has been read up to ``number``."""

    fd: int
    capacity: int
    outbox: _Outbox
    number: int

    @property
    def free(self) -> bool:
        return self.outbox.read.value >= self.number


class MemorySend(PendingSend):
    """A message that has been copied: over when it is made."""

    @property
    def done(self) -> bool:
        """True."""
        return True

    def look(self, slice_s: float) -> bool:
        """True."""
        return True


class MemoryRecv(PendingRecv):
    """A message that is expected through memory. Messages of one rank come in the order in which they were posted."""

    def __init__(self, watch: Watch, peer: int, outboxes: Outboxes, data: Tensor, number: int) -> None:
        super().__init__(watch, peer)
        self._outboxes = outboxes
        self.data = self.result = data
        self._number = number

    @property
    def done(self) -> bool:
        """Whether the message has been read."""
        return self._outboxes.read_from(self._peer) >= self._number

    def look(self, slice_s: float) -> bool:
        """Whether the message is there within ``slice_s``; reads it and those before it."""
        while not self.done:
            if not self._outboxes.read_next(self._peer, slice_s):
                return False
        return True


class Outboxes:
    """All messages of one rank in one group. Used by the main thread alone.

    Errors of every wait: EpochAborted, PeerLost, GroupTimeout.
    """

    def __init__(self, boxes: Mailboxes, watch: Watch) -> None:
        self._boxes = boxes
        self._watch = watch
        self._out: dict[int, _Outbox] = {}
        self._in: dict[int, _Outbox] = {}
        self._expected: dict[int, deque[MemoryRecv]] = {}
        self._large: list[_Large] = []

    def isend(self, data: Tensor, dst: int) -> MemorySend:
        """Send flat bytes to position ``dst``."""
        outbox = self._to(dst)
        number, length = outbox.written.value + 1, len(data)
        self._wait_for_slot(outbox, dst, number - OUTBOX_SLOTS)
        fd = _IN_SLOT
        if length <= OUTBOX_SLOT_BYTES:
            outbox.slot(number, length).copy_(data)
        else:
            fd = self._write_large(outbox, number, data)
        label = outbox.label(number)
        outbox.words[label], outbox.words[label + 1] = length, fd
        outbox.written.raise_to(number)
        return MemorySend(self._watch, dst)

    def irecv(self, data: Tensor, src: int) -> MemoryRecv:
        """Post the receive of flat bytes from position ``src``."""
        outbox = self._in.get(src)
        if outbox is None:
            outbox = self._in[src] = _Outbox(self._boxes.boxes[src], self._boxes.position)
            self._expected[src] = deque()
        expected = self._expected[src]
        pending = MemoryRecv(self._watch, src, self, data, outbox.read.value + len(expected) + 1)
        expected.append(pending)
        return pending

    def read_from(self, src: int) -> int:
        """How many messages of position ``src`` have been read."""
        return self._in[src].read.value

    def read_next(self, src: int, slice_s: float) -> bool:
        """Whether the next message of position ``src`` is there within ``slice_s``; it has been read then."""
        outbox = self._in[src]
        number = outbox.read.value + 1
        if not self._written(outbox, number, slice_s, src):
            gone = self._boxes.check_peer(src)
            if not gone or outbox.written.value >= number:
                return False
            raise self._watch.error(PeerLost, gone, [src])
        label, data = outbox.label(number), self._expected[src].popleft().data
        length, fd = outbox.words[label], outbox.words[label + 1]
        if length != len(data):
            sender, name = self._watch.place.members[src], self._watch.name
            raise ProtocolError(f"rank {sender} sent {length} bytes in group {name}; this one expects {len(data)}")
        if fd == _IN_SLOT:
            data.copy_(outbox.slot(number, length))
        else:
            self._read_large(outbox, fd, data, src)
        outbox.read.raise_to(number)
        return True

    def _written(self, outbox: _Outbox, number: int, slice_s: float, src: int) -> bool:
        if outbox.written.value >= number or slice_s <= 0.0:  # who only looks does not spin
            return outbox.written.value >= number
        return outbox.written.wait(number, slice_s, lambda: self._boxes.gone(src))

    def has_room(self, dst: int) -> bool:
        """Whether :meth:`isend` to ``dst`` waits for nobody."""
        outbox = self._to(dst)
        return outbox.read.value > outbox.written.value - OUTBOX_SLOTS

    def _to(self, dst: int) -> _Outbox:
        outbox = self._out.get(dst)
        if outbox is None:
            outbox = self._out[dst] = _Outbox(self._boxes.boxes[self._boxes.position], dst)
        return outbox

    def _wait_for_slot(self, outbox: _Outbox, dst: int, number: int) -> None:
        """Return when message ``number`` has been read."""
        if outbox.read.value >= number:
            return
        waited = 0.0
        with self._watch:
            while not outbox.read.wait(number, SLICE_S, lambda: self._boxes.gone(dst)):
                gone = self._boxes.check_peer(dst)
                if gone and outbox.read.value < number:
                    raise self._watch.error(PeerLost, gone, [dst])
                waited += SLICE_S
                self._watch.check_deadline(waited, [dst])

    def _write_large(self, outbox: _Outbox, number: int, data: Tensor) -> int:
        idle = [large for large in self._large if large.free]
        self._large = [large for large in self._large if large not in idle]
        fitting = [large for large in idle if large.capacity >= len(data)]
        if fitting:
            large = min(fitting, key=lambda one: one.capacity)
            idle.remove(large)
            large.outbox, large.number = outbox, number
        else:
            fd = os.memfd_create("drumline-message", os.MFD_CLOEXEC)
            large = _Large(fd, len(data), outbox, number)
        self._large.append(large)
        for other in idle:  # one of a size is kept while messages keep their size
            os.close(other.fd)
        view, done = data.numpy().data, 0
        while done < len(view):
            done += os.pwrite(large.fd, view[done:], done)
        return large.fd

    def _read_large(self, outbox: _Outbox, fd: int, data: Tensor, src: int) -> None:
        view, done = data.numpy().data, 0
        try:
            source = os.open(f"/proc/{outbox.pid}/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            reason = self._boxes.check_peer(src) or f"its memory is gone ({error.strerror})"
            raise self._watch.error(PeerLost, reason, [src]) from None
        try:
            while done < len(view):
                count = os.preadv(source, [view[done:]], done)
                if count == 0:
                    raise self._watch.error(PeerLost, "its message is gone", [src])
                done += count
        finally:
            os.close(source)

    def close(self) -> None:
        """Give all messages up; never blocks. What has been sent may still be read, unless a collective failed."""
        for outbox in (*self._out.values(), *self._in.values()):
            outbox.written.wake()
            outbox.read.wake()
        large, self._large = self._large, []
        self._expected.clear()
        if large:
            grace_s = 0.0 if self._watch.failed else _GRACE_S
            name = f"drop-{self._watch.name}"
            threading.Thread(target=_bury, args=(large, grace_s), name=name, daemon=True).start()


def _bury(remains: list[_Large], grace_s: float) -> None:
    end = time.monotonic() + grace_s
    while remains:
        for large in [one for one in remains if one.free or time.monotonic() >= end]:
            os.close(large.fd)
            remains.remove(large)
        if remains:
            time.sleep(SLICE_S)
