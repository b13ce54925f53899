"""The term of a coordinator: one more than that of any before it, agreed on by a file in the runtime directory."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from pathlib import Path

from drumline.protocol.errors import StartFailed

TERM_NAME = "term"
DEADLINE_S = 5.0
RETRY_S = 0.01
_DIGITS = 20


def raise_term(runtime_dir: str | os.PathLike[str], at_least: int = 1, deadline_s: float = DEADLINE_S) -> int:
    """A term that no coordinator of this runtime directory has had: at least ``at_least``.

    The file ``term`` there holds the highest so far. It is locked (flock) only while it is raised, so that a
    coordinator that is stopped later blocks nobody. Raises StartFailed when the lock is not to be had within
    ``deadline_s`` seconds, or the file cannot be written or holds something else.
    """
    path = Path(runtime_dir, TERM_NAME)
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise _failed(path, error.strerror or str(error)) from error
    try:
        _lock(fd, path, deadline_s)
        term = max(_read(fd, path) + 1, at_least)
        # One write of a fixed length, in place: whoever dies around it leaves the old number or the new one.
        if os.pwrite(fd, b"%0*d\n" % (_DIGITS, term), 0) != _DIGITS + 1:
            raise _failed(path, "the disk is full")
        return term
    except OSError as error:
        raise _failed(path, error.strerror or str(error)) from error
    finally:
        # Closing lets go of the lock.
        os.close(fd)


def _lock(fd: int, path: Path, deadline_s: float) -> None:
    end = time.monotonic() + deadline_s
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EINTR):
                raise
        if time.monotonic() >= end:
            raise _failed(path, f"another process has kept it locked for {deadline_s:g} s")
        time.sleep(RETRY_S)


def _read(fd: int, path: Path) -> int:
    found = os.pread(fd, _DIGITS + 2, 0)
    if not found:
        return 0
    if len(found) != _DIGITS + 1 or not found[:_DIGITS].isdigit() or found[_DIGITS:] != b"\n":
        raise _failed(path, f"it holds {found!r} instead of the highest term so far")
    return int(found[:_DIGITS])


def _failed(path: Path, reason: str) -> StartFailed:
    return StartFailed(f"the term of the coordinator cannot be raised with {path}: {reason}")
