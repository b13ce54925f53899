"""Who starts the ranks of this host: one process alone (uni), a forkserver (mp), or nobody here (external_launcher)."""

from __future__ import annotations

import asyncio
import os
import select
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Protocol

from drumline.engine.launch.forkserver_pipe import Forkserver
from drumline.engine.launch.owned_process import OwnedProcess
from drumline.engine.parallel_config import ParallelConfig
from drumline.protocol.messages import Exited, Spawned

STDERR_TAIL_BYTES = 4096


class RankProcesses(Protocol):
    """The worker processes of this host. ``workers``: rank by pid; ``no_workers`` is set while there is none."""

    workers: dict[int, int]
    no_workers: asyncio.Event

    def spawn(self, rank: int, endpoint: str, token: str) -> None:
        """Start a worker, which is then told by ``on_spawned``."""

    def kill(self, pid: int, number: int) -> None:
        """Send a signal to a worker; one that has ended already is left alone."""

    def close(self) -> None:
        """End every worker at once."""

    def kill_all(self, number: int) -> None:
        """Send a signal to everything that this owns."""

    async def wait(self, timeout: float) -> bool:
        """Whether everything that this owns has ended within ``timeout`` seconds."""


def rank_processes(
    loop: asyncio.AbstractEventLoop,
    parallel: ParallelConfig,
    endpoint: str,
    *,
    on_spawned: Callable[[Spawned], None],
    on_exited: Callable[[Exited], None],
    on_lost: Callable[[str], None],
    import_path: Sequence[str] = (),
) -> RankProcesses | None:
    """What starts the ranks of this host, as ``parallel`` says; None when it starts none of them.

    ``endpoint``: the coordinator's worker socket. ``import_path``: where ranks find the modules of the app.
    """
    if not parallel.local_ranks:
        return None
    if parallel.executor_backend == "uni":
        return OneWorker(loop, endpoint, on_spawned=on_spawned, on_exited=on_exited, import_path=import_path)
    return Forkserver(loop, on_spawned=on_spawned, on_exited=on_exited, on_lost=on_lost, import_path=import_path)


class OneWorker:
    """Rank 0, started as ``python -m drumline.workers``, with a lifeline of its own and no forkserver.

    The process is started at once and then waits for its launch token, which it reads from a pipe. What it prints is
    passed on to stderr, and the last of it told with its exit.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        endpoint: str,
        *,
        on_spawned: Callable[[Spawned], None],
        on_exited: Callable[[Exited], None],
        import_path: Sequence[str] = (),
    ) -> None:
        self._on_spawned = on_spawned
        self._on_exited = on_exited
        self._tail = bytearray()
        self.workers: dict[int, int] = {}
        self.no_workers = asyncio.Event()
        self.no_workers.set()
        lifeline, self._lifeline = os.pipe()
        token, self._token = os.pipe()
        # Read through /proc, so that the token stands neither on the command line nor on a disk.
        arguments = ["--coordinator", endpoint, "--rank", "0", "--token-file", f"/proc/self/fd/{token}"]
        try:
            self._process = OwnedProcess(
                loop,
                "drumline.workers",
                [*arguments, "--lifeline-fd", str(lifeline), *(f"--import-path={entry}" for entry in import_path)],
                on_output=self._output,
                on_exit=self._ended,
                pass_fds=(lifeline, token),
                merge_stderr=True,
            )
        finally:
            os.close(lifeline)
            os.close(token)

    def spawn(self, rank: int, endpoint: str, token: str) -> None:
        """Give the worker its launch token, once; there is no other process to start."""
        if self._token < 0:
            self._on_exited(Exited(rank, 0, 1, 0, "uni starts one process, which has had its launch token"))
            return
        with suppress(BrokenPipeError):  # it has ended, which is told by its exit
            os.write(self._token, token.encode())
        os.close(self._token)
        self._token = -1
        if not self._process.exited.is_set():
            self.workers = {self._process.pid: rank}
            self.no_workers.clear()
            self._on_spawned(Spawned(rank, self._process.pid))

    def kill(self, pid: int, number: int) -> None:
        """Send a signal to the worker, if it still is ``pid``."""
        if pid in self.workers:
            self._process.signal(number)

    def close(self) -> None:
        """End the worker at once."""
        for end in (self._lifeline, self._token):
            if end >= 0:
                os.close(end)
        self._lifeline = self._token = -1

    def kill_all(self, number: int) -> None:
        """Send a signal to the worker, if it is still there."""
        self._process.signal(number)

    async def wait(self, timeout: float) -> bool:
        """Whether the worker has ended within ``timeout`` seconds."""
        return await self._process.wait(timeout)

    def _output(self, data: bytes) -> None:
        self._tail += data
        del self._tail[:-STDERR_TAIL_BYTES]
        # A reader of stderr that sleeps must not stop the loop.
        writable = select.poll()
        writable.register(2, select.POLLOUT)
        for start in range(0, len(data), select.PIPE_BUF):
            if writable.poll(0):
                with suppress(OSError):
                    os.write(2, data[start : start + select.PIPE_BUF])

    def _ended(self, code: int, number: int) -> None:
        self.workers = {}
        self.no_workers.set()
        self._on_exited(Exited(0, self._process.pid, code, number, self._tail.decode("utf-8", "replace")))
