"""The lifeline: the read end of a pipe whose write end only the owner holds.

The owner's death, by SIGKILL too, closes the write end. Two things watch for that. The control thread polls the
descriptor, and the kernel itself is asked for a signal, because a thread cannot act while another one holds the
interpreter lock inside a long library load.
"""

from __future__ import annotations

import fcntl
import os
import select

from drumline.protocol.errors import InvalidConfig


def arm(fd: int) -> int:
    """Have the kernel end this process when the owner of ``fd`` is gone. Returns the descriptor to poll from now on.

    The pipe is opened once more, since the target of the signal belongs to the open description and that one is shared
    by every process that inherited it. ``fd`` is closed. The signal is SIGIO, whose default action ends the process;
    nothing is ever written to a lifeline, so it means end of file and nothing else.

    Raises:
        InvalidConfig: ``fd`` is not the read end of an open pipe.
        SystemExit: the owner is gone already.
    """
    try:
        own = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        fcntl.fcntl(own, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(own, fcntl.F_SETFL, fcntl.fcntl(own, fcntl.F_GETFL) | os.O_ASYNC)
        os.close(fd)
    except OSError as error:
        raise InvalidConfig("lifeline_fd", fd, f"the read end of an open pipe ({error})") from error
    if broken(own):
        raise SystemExit(1)
    return own


def disarm(fd: int) -> None:
    """Take the signal back; the descriptor stays open and can still be polled."""
    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_ASYNC)


def broken(fd: int) -> bool:
    """Whether the owner is gone. Never waits."""
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    return bool(poller.poll(0))
