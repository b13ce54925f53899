"""stdout and stderr of a worker: a pipe that its forkserver reads, while there is one."""

from __future__ import annotations

import os
import stat


def is_pipe(fd: int) -> bool:
    """Whether ``fd`` is a pipe, whose reader may go away."""
    try:
        return stat.S_ISFIFO(os.fstat(fd).st_mode)
    except OSError:
        return False


def silence() -> None:
    """Nobody reads any more: a user's print must not fail for that."""
    null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    for fd in (1, 2):
        os.dup2(null, fd)
    os.close(null)
