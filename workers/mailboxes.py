"""Memory that the ranks of one host share: every rank writes into its own mailbox, and all read it.

A collective over it costs microseconds where sockets cost hundreds: nothing is copied through the kernel and, while the
ranks keep step, nobody sleeps. The memory is anonymous (memfd), so it leaves no file behind and ends with the last
process that maps it. A rank reaches another's through /proc, which the kernel grants to processes of one user.

Every operation has a number, the same on all ranks. A rank fills the half of its mailbox that belongs to the number's
parity and then raises its counter; readers wait for the counter. Two halves are enough: a rank begins operation k + 2
only after all others have raised their counters to k + 1, and they do that only when they have read everything of k.

Counter and content need no fence on x86-64, where stores become visible in order; elsewhere the sockets do.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import select
from collections.abc import Sequence
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from drumline.protocol.errors import ProtocolError
from drumline.protocol.stateless import StatelessGroup

HALF_BYTES = 4 << 20
SPINS = 200
_COUNTER, _LEFT, _HEADER = 0, 8, 64
_SYS_FUTEX, _FUTEX_WAIT, _FUTEX_WAKE = 202, 0, 1
_ALL_WAITERS = 0x7FFFFFFF
_libc = ctypes.CDLL(None, use_errno=True)


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class _Offer(msgspec.Struct, array_like=True, frozen=True):
    """How a rank's mailbox is found. ``host`` is empty where there is none."""

    host: str
    pid: int
    fd: int


class _Mailbox:
    """One rank's mapped memory: counter, a flag for having left, and per half the bounds and the content."""

    def __init__(self, fd: int, size: int, pid: int) -> None:
        self._memory = mmap.mmap(fd, _total_bytes(size))
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

    def __del__(self) -> None:
        if hasattr(self, "pidfd"):
            os.close(self.pidfd)


class Mailboxes:
    """The mailboxes of one epoch's group, by position. Used by the main thread alone."""

    def __init__(self, position: int, boxes: Sequence[_Mailbox], slice_s: float) -> None:
        self.position = position
        self._boxes = boxes
        self._own = boxes[position]
        self._operation = 0
        self._slice = _Timespec(0, int(slice_s * 1e9))

    def begin(self) -> int:
        """The number of the next operation; its half of the own mailbox may be written now."""
        self._operation += 1
        return self._operation

    def content(self, position: int, operation: int) -> Tensor:
        """int32 (HALF_BYTES / 4,): the words of a mailbox that belong to an operation."""
        return self._boxes[position].halves[operation & 1]

    def bounds(self, position: int, operation: int) -> Tensor:
        """int32 (size + 1,): a few numbers beside the content."""
        return self._boxes[position].bounds[operation & 1]

    def publish(self, operation: int) -> None:
        """What has been written is complete."""
        self._own.words[_COUNTER // 8] = operation
        _futex(self._own.address, _FUTEX_WAKE, _ALL_WAITERS, None)

    def wait(self, position: int, operation: int) -> bool:
        """Whether a rank has published ``operation``; waits one slice of time at most."""
        box = self._boxes[position]
        words = box.words
        for _ in range(SPINS):
            if words[0] >= operation:
                return True
            os.sched_yield()
        seen = words[0]
        if seen < operation and not self.gone(position):
            _futex(box.address, _FUTEX_WAIT, seen & 0xFFFFFFFF, self._slice)
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


def open_mailboxes(meeting: StatelessGroup, timeout_s: float, slice_s: float) -> Mailboxes | None:
    """Share memory among all ranks of ``meeting``; None, on every rank alike, where they cannot.

    Raises:
        StoreError: a rank did not answer within ``timeout_s``.
        ProtocolError: a rank answered something else.
    """
    size = len(meeting.members)
    fd = os.memfd_create("drumline-mailbox", os.MFD_CLOEXEC)
    boxes: list[_Mailbox] = []
    try:
        os.ftruncate(fd, _total_bytes(size))
        offers = meeting.all_gather_obj(_Offer(_host(), os.getpid(), fd), timeout_s, _Offer)
        if offers[0].host and all(offer.host == offers[0].host for offer in offers):
            boxes = _attach(offers, size)
        # One rank without access is enough: all must take the same way.
        agreed = meeting.all_gather_obj(len(boxes) == size, timeout_s, bool)
    finally:
        os.close(fd)
    if not all(agreed):
        return None
    return Mailboxes(meeting.members.index(meeting.rank), boxes, slice_s)


def _attach(offers: Sequence[_Offer], size: int) -> list[_Mailbox]:
    boxes = []
    for offer in offers:
        try:
            fd = os.open(f"/proc/{offer.pid}/fd/{offer.fd}", os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return []
        try:
            if os.fstat(fd).st_size != _total_bytes(size):
                raise ProtocolError(f"the mailbox of process {offer.pid} has {os.fstat(fd).st_size} bytes")
            boxes.append(_Mailbox(fd, size, offer.pid))
        finally:
            os.close(fd)
    return boxes


def _host() -> str:
    """Equal on two ranks when they can see each other's /proc entries and their stores arrive in order."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return ""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()} {os.geteuid()}"
    except OSError:
        return ""


def _bounds_bytes(size: int) -> int:
    return -(-4 * (size + 1) // 64) * 64


def _total_bytes(size: int) -> int:
    return _HEADER + 2 * _bounds_bytes(size) + 2 * HALF_BYTES


def _futex(address: int, operation: int, value: int, timeout: _Timespec | None) -> None:
    """Wait or wake; every return, a signal or a timeout too, only means that it is time to look again."""
    limit = None if timeout is None else ctypes.byref(timeout)
    _libc.syscall(_SYS_FUTEX, ctypes.c_void_p(address), operation, ctypes.c_uint32(value), limit, None, 0)
