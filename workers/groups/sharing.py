"""How the ranks of a group find out who shares memory with whom, and share it where all of them can.

A rank reaches another's memory through /proc, which the kernel grants to processes of one user in one process namespace
of one running kernel. Each leaves a nonce in its memory; whoever reads it there sees that memory, whatever the hosts
are called.
"""

from __future__ import annotations

import os
import platform
import secrets
from collections.abc import Sequence
from pathlib import Path

import msgspec

from drumline.protocol.stateless import StatelessGroup
from drumline.workers.groups.mailboxes import NONCE_AT, NONCE_BYTES, Mailbox, Mailboxes, mailbox_bytes
from drumline.workers.groups.watch import Watch


class _Offer(msgspec.Struct, array_like=True, frozen=True):
    """How a rank's memory is found. ``willing``: it would exchange tensors through it."""

    kernel: str
    pid: int
    fd: int
    nonce: bytes
    willing: bool


class _Answer(msgspec.Struct, array_like=True, frozen=True):
    """Whose memory a rank sees, by position, and whether it has mapped that of all."""

    sees: list[bool]
    mapped: bool


def share_memory(
    meeting: StatelessGroup, timeout_s: float, watch: Watch, willing: bool
) -> tuple[Mailboxes | None, list[list[bool]]]:
    """The mailboxes of all ranks of ``meeting``, and per rank whose memory it sees, both by position.

    The mailboxes are None, on every rank alike, where one rank does not see all, is not ``willing``, or runs on a
    processor whose stores may become visible out of order.

    Raises:
        StoreError: a rank did not answer within ``timeout_s``.
        ProtocolError: a rank answered something else.
    """
    size = len(meeting.members)
    fd = os.memfd_create("drumline-mailbox", os.MFD_CLOEXEC)
    opened: list[int] = [fd]
    try:
        os.ftruncate(fd, mailbox_bytes(size))
        nonce = secrets.token_bytes(NONCE_BYTES)
        os.pwrite(fd, nonce, NONCE_AT)
        willing = willing and platform.machine() in ("x86_64", "AMD64")
        offers = meeting.all_gather_obj(_Offer(_kernel(), os.getpid(), fd, nonce, willing), timeout_s, _Offer)
        found = [_open(offer, size) for offer in offers]
        opened += [other for other in found if other is not None]
        boxes = _map(offers, found, size)
        answer = _Answer([other is not None for other in found], len(boxes) == size)
        # One rank without access is enough: all must take the same way.
        answers = meeting.all_gather_obj(answer, timeout_s, _Answer)
    finally:
        for descriptor in opened:
            os.close(descriptor)
    sees = [answer.sees for answer in answers]
    if not all(answer.mapped for answer in answers):
        return None, sees
    return Mailboxes(meeting.members.index(meeting.rank), boxes, watch), sees


def _open(offer: _Offer, size: int) -> int | None:
    """A descriptor of the offered memory, or None where this rank cannot see it."""
    if not offer.kernel or offer.kernel != _kernel():
        return None
    try:
        fd = os.open(f"/proc/{offer.pid}/fd/{offer.fd}", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None
    if os.fstat(fd).st_size == mailbox_bytes(size) and os.pread(fd, NONCE_BYTES, NONCE_AT) == offer.nonce:
        return fd
    os.close(fd)
    return None


def _map(offers: Sequence[_Offer], found: Sequence[int | None], size: int) -> list[Mailbox]:
    """The mapped memory of all ranks, or nothing."""
    boxes = []
    for offer, fd in zip(offers, found, strict=True):
        if fd is None or not offer.willing:
            return []
        try:
            boxes.append(Mailbox(fd, size, offer.pid))
        except OSError:  # the process has ended, or there are no descriptors or mappings left
            return []
    return boxes


def _kernel() -> str:
    """Equal on two ranks when a process id means the same to both and the kernel lets them look at each other."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()} {os.geteuid()}"
    except OSError:
        return ""
