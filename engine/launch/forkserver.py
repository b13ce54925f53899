"""The ranks of this host, forked by a forkserver: one that dies is replaced, while its workers live on."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Sequence

from drumline.engine.launch.forkserver_pipe import MODULE, ForkserverPipe, ForkserverReport
from drumline.engine.launch.owned_process import how_ended
from drumline.engine.launch.restart_limit import RestartLimit
from drumline.engine.launch.subreaper import children, reap, runs_module
from drumline.engine.launch.watched_workers import WatchedWorkers
from drumline.protocol.messages import Exited, Spawned

log = logging.getLogger(__name__)

REPORT_S = 1.0
"""A forkserver that does not tell of an ended worker within this time is replaced."""


class Forkserver:
    """The forkserver and its workers. The callbacks run in the loop.

    ``on_lost(text)``: there is none, and none can be had. ``import_path``: what comes first in the workers'
    ``sys.path``. ``restart_limit``: how often it is replaced within 10 minutes.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        *,
        on_spawned: Callable[[Spawned], None],
        on_exited: Callable[[Exited], None],
        on_lost: Callable[[str], None],
        import_path: Sequence[str] = (),
        restart_limit: int = 5,
    ) -> None:
        self._loop = loop
        self._on_spawned = on_spawned
        self._on_exited = on_exited
        self._on_lost = on_lost
        self._import_path = tuple(import_path)
        self._closing = False
        self._restarts = RestartLimit(restart_limit)
        self._restart: asyncio.TimerHandle | None = None
        self._starts: deque[tuple[int, str, str]] = deque()
        self._workers = WatchedWorkers(loop, self._worker_ended)
        # Workers hold the read end; the write end is this process's alone, so that its death is theirs.
        self._lifeline_end, self._lifeline = os.pipe()
        self._pipe = self._start()

    @property
    def workers(self) -> dict[int, int]:
        """Rank by pid."""
        return self._workers.ranks

    @property
    def no_workers(self) -> asyncio.Event:
        """Set while there is none."""
        return self._workers.none

    @property
    def pids(self) -> set[int]:
        """Every process that is waited for here."""
        return {self._pipe.pid, *self._workers.ranks}

    def _start(self) -> ForkserverPipe:
        return ForkserverPipe(
            self._loop,
            self._lifeline_end,
            self._import_path,
            on_report=self._take,
            on_broken=self._broken,
            on_exit=self._ended,
        )

    # -------------------------------------------------------------------------------------------------------- orders

    def spawn(self, rank: int, endpoint: str, token: str) -> None:
        """Start a worker; it is reported by ``on_spawned``."""
        self._starts.append((rank, endpoint, token))
        self._command(rank, endpoint, token)

    def _command(self, rank: int, endpoint: str, token: str) -> None:
        if not self._pipe.command({"spawn": (rank, endpoint, token)}):
            # It is dead, or as good as that: its successor gets all that has not been started.
            self._pipe.signal(signal.SIGKILL)

    def kill(self, pid: int, number: int) -> None:
        """Send a signal to a worker; one that has ended already is left alone."""
        self._workers.signal(pid, number)

    def close(self) -> None:
        """End all workers and the forkserver, at once."""
        self._closing = True
        if self._restart is not None:
            self._restart.cancel()
        self._pipe.close()
        if self._lifeline >= 0:
            os.close(self._lifeline)
            os.close(self._lifeline_end)
            self._lifeline = self._lifeline_end = -1

    def kill_all(self, number: int) -> None:
        """Signal the forkserver and every worker."""
        self._closing = True
        self._pipe.signal(number)
        for pid in self._workers.ranks:
            self._workers.signal(pid, number)

    async def wait(self, timeout: float) -> bool:
        """Whether the forkserver and all workers have ended within ``timeout`` seconds."""
        try:
            async with asyncio.timeout(timeout):
                await self._pipe.exited.wait()
                await self._workers.none.wait()
        except TimeoutError:
            return False
        return True

    # ------------------------------------------------------------------------------------------------------- reports

    def _take(self, report: ForkserverReport) -> None:
        if report.spawned is not None:
            rank, pid = report.spawned
            self._started(rank)
            self._workers.add(pid, rank)
            self._on_spawned(Spawned(rank, pid))
        elif report.exited is not None:
            rank, pid, code, number, tail = report.exited
            if pid == 0:
                self._started(rank)
                self._on_exited(Exited(rank, pid, code, number, tail))
            elif self._workers.remove(pid) is not None:
                self._on_exited(Exited(rank, pid, code, number, tail))

    def _started(self, rank: int) -> None:
        for start in self._starts:
            if start[0] == rank:
                self._starts.remove(start)
                return

    def _worker_ended(self, pid: int) -> None:
        if self._pipe.exited.is_set():
            self._settle(pid)
        else:
            # It is the forkserver's child, which tells how it ended, and its last words; or an earlier one's, and ours.
            self._loop.call_later(REPORT_S, self._unreported, pid, self._pipe)
            self._reap(pid)

    def _reap(self, pid: int) -> bool:
        """Tell of an ended worker whose forkserver is dead: it has become a child of ours. Whether it had."""
        how = reap(pid)
        if how is not None:
            self._tell_of(pid, how)
        return how is not None

    def _settle(self, pid: int) -> None:
        """Tell of an ended worker of a dead forkserver, which may have taken with it how it ended."""
        if not self._reap(pid):
            self._tell_of(pid, (0, 0))

    def _tell_of(self, pid: int, how: tuple[int, int]) -> None:
        rank = self._workers.remove(pid)
        if rank is not None:
            self._on_exited(Exited(rank, pid, *how))

    def _unreported(self, pid: int, pipe: ForkserverPipe) -> None:
        if pid in self._workers.ended and pipe is self._pipe and not self._closing:
            log.warning("the forkserver (pid %d) does not tell how worker %d ended; it is killed", pipe.pid, pid)
            pipe.signal(signal.SIGKILL)

    # --------------------------------------------------------------------------------------------------- its own end

    def _broken(self, text: str) -> None:
        log.error("the forkserver (pid %d) is killed: %s", self._pipe.pid, text)
        self._pipe.signal(signal.SIGKILL)

    def _ended(self, code: int, number: int) -> None:
        for pid in list(self._workers.ended):
            self._settle(pid)
        if self._closing:
            return
        self._kill_strays()
        text = f"the forkserver (pid {self._pipe.pid}) ended with {how_ended(code, number)}"
        now = time.monotonic()
        pause = self._restarts.pause(now, lived_s=self._pipe.lived_s(now)) if number or self._pipe.ready else None
        if pause is None:
            self._on_lost(text)
            return
        log.warning("%s; another one is started, its %d workers go on", text, len(self._workers.ranks))
        self._restart = self._loop.call_later(pause, self._start_again)

    def _kill_strays(self) -> None:
        """A worker that was forked and not told of any more would be started a second time."""
        for pid in children():
            if pid not in self.pids and runs_module(pid, MODULE):
                os.kill(pid, signal.SIGKILL)

    def _start_again(self) -> None:
        if self._closing:
            return
        try:
            self._pipe = self._start()
        except OSError as error:
            self._on_lost(f"the forkserver cannot be started again: {error}")
            return
        for start in self._starts:
            self._command(*start)
