"""Turns to load weights, for hosts whose memory or disk does not take all ranks at once.

A turn is a locked file in the engine's runtime folder, which the ranks of a host share. The kernel gives the lock back
when its holder ends, however it ends.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from drumline.protocol.errors import InvalidConfig, StartFailed
from drumline.protocol.messages import WorkerConfig

TURN_DEADLINE_S = 3600.0
"""How long a rank waits for its turn. Who stops loading in its own turn is found lost by the coordinator before."""
POLL_S = 0.02


@contextmanager
def loading_turn(
    config: WorkerConfig, wait: Callable[[], None], deadline_s: float = TURN_DEADLINE_S
) -> Iterator[int | None]:
    """Hold one of ``config.max_parallel_loading_workers`` turns. Gives its number, None when all may load at once.

    ``wait`` is called before every look at the turns; what it raises ends the wait. Raises StartFailed when no turn is
    free within ``deadline_s``, InvalidConfig when the runtime folder cannot be used.
    """
    turns = config.max_parallel_loading_workers
    if turns < 1:
        yield None
        return
    give_up_at = time.monotonic() + deadline_s
    while True:
        wait()
        taken = _take_any(Path(config.runtime_dir), turns)
        if taken is not None:
            break
        if time.monotonic() >= give_up_at:
            raise StartFailed(f"none of {turns} turns to load weights became free within {deadline_s:g} s")
        time.sleep(POLL_S)
    number, descriptor = taken
    try:
        yield number
    finally:
        os.close(descriptor)


def _take_any(folder: Path, turns: int) -> tuple[int, int] | None:
    """The number and the descriptor of a turn that nobody holds, None when all are held."""
    for number in range(turns):
        path = folder / f"loading-{number}.lock"
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            valid = "None where ranks cannot write the engine's runtime folder"
            raise InvalidConfig("max_parallel_loading_workers", f"{turns}: {path}: {error.strerror}", valid) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
        else:
            return number, descriptor
    return None
