"""Worker processes that another process has forked, each watched through a pidfd of our own."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from contextlib import suppress


class WatchedWorkers:
    """Rank by pid in ``ranks``. ``on_ended(pid)`` is called in the loop when one has ended; it stays here until it is
    removed. ``none`` is set while there is none."""

    def __init__(self, loop: asyncio.AbstractEventLoop, on_ended: Callable[[int], None]) -> None:
        self._loop = loop
        self._on_ended = on_ended
        self._pidfds: dict[int, int] = {}
        self.ranks: dict[int, int] = {}
        self.ended: set[int] = set()
        self.none = asyncio.Event()
        self.none.set()

    def add(self, pid: int, rank: int) -> None:
        """Watch a process that was started for ``rank``."""
        self.ranks[pid] = rank
        self.none.clear()
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:  # it has ended, and was waited for; that will be told
            return
        self._pidfds[pid] = pidfd
        self._loop.add_reader(pidfd, self._has_ended, pid)

    def _has_ended(self, pid: int) -> None:
        # It stays readable; the descriptor is kept, so that no other process can take the number meanwhile.
        self._loop.remove_reader(self._pidfds[pid])
        self.ended.add(pid)
        self._on_ended(pid)

    def remove(self, pid: int) -> int | None:
        """Forget a process that has ended. Its rank, None for one that is not here."""
        rank = self.ranks.pop(pid, None)
        pidfd = self._pidfds.pop(pid, None)
        self.ended.discard(pid)
        if pidfd is not None:
            self._loop.remove_reader(pidfd)
            os.close(pidfd)
        if not self.ranks:
            self.none.set()
        return rank

    def signal(self, pid: int, number: int) -> None:
        """Send a signal to one of them, stopped or not; one that has ended is left alone."""
        pidfd = self._pidfds.get(pid)
        if pidfd is not None and pid not in self.ended:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, number)
