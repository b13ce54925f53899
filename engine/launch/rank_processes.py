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
    *,
    on_spawned: Callable[[Spawned], None],
    on_exited: Callable[[Exited], None],
    on_lost: Callable[[str], None],
    import_path: Sequence[str] = (),
) -> RankProcesses | None:
    """What starts the ranks of this host, as ``parallel`` says; None when it starts none of them. ``import_path``:
    where ranks find the modules of the app."""
    if not parallel.local_ranks:
        return None
    if parallel.executor_backend == "uni":
        return OneWorker(loop, on_spawned=on_spawned, on_exited=on_exited, import_path=import_path)
    return Forkserver(loop, on_spawned=on_spawned, on_exited=on_exited, on_lost=on_lost, import_path=import_path)


class OneWorker:
    """One worker that is started as ``python -m drumline.workers``, with a lifeline of its own and no forkserver.

    Its launch token is read from a pipe. What it prints is passed on to stderr, and the end of it told with its exit.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        *,
        on_spawned: Callable[[Spawned], None],
        on_exited: Callable[[Exited], None],
        import_path: Sequence[str] = (),
    ) -> None:
        self._loop = loop
        self._import_path = import_path
        self._on_spawned = on_spawned
        self._on_exited = on_exited
        self._process: OwnedProcess | None = None
        self._lifeline = -1
        self._rank = 0
        self._tail = bytearray()
        self.workers: dict[int, int] = {}
        self.no_workers = asyncio.Event()
        self.no_workers.set()

    def spawn(self, rank: int, endpoint: str, token: str) -> None:
        """Start the worker. A start that fails is told as an exit."""
        self._rank = rank
        self._tail.clear()
        self._cut_lifeline()
        lifeline, self._lifeline = os.pipe()
        token_end, written = os.pipe()
        os.write(written, token.encode())
        os.close(written)
        # Read through /proc, so that the token stands neither on the command line nor on a disk.
        arguments = ["--coordinator", endpoint, "--rank", str(rank), "--token-file", f"/proc/self/fd/{token_end}"]
        arguments += [f"--import-path={entry}" for entry in self._import_path]
        try:
            self._process = OwnedProcess(
                self._loop,
                "drumline.workers",
                [*arguments, "--lifeline-fd", str(lifeline)],
                on_output=self._output,
                on_exit=self._ended,
                pass_fds=(lifeline, token_end),
                merge_stderr=True,
            )
        except OSError as error:
            self._on_exited(Exited(rank, 0, 1, 0, f"start failed: {error}"))
            return
        finally:
            os.close(lifeline)
            os.close(token_end)
        self.workers = {self._process.pid: rank}
        self.no_workers.clear()
        self._on_spawned(Spawned(rank, self._process.pid))

    def kill(self, pid: int, number: int) -> None:
        """Send a signal to the worker, if it still is ``pid``."""
        if self._process is not None and pid in self.workers:
            self._process.signal(number)

    def close(self) -> None:
        """End the worker at once."""
        self._cut_lifeline()

    def kill_all(self, number: int) -> None:
        """Send a signal to the worker, if it is still there."""
        if self._process is not None:
            self._process.signal(number)

    async def wait(self, timeout: float) -> bool:
        """Whether the worker has ended within ``timeout`` seconds."""
        return self._process is None or await self._process.wait(timeout)

    def _cut_lifeline(self) -> None:
        if self._lifeline >= 0:
            os.close(self._lifeline)
            self._lifeline = -1

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
        pid = next(iter(self.workers), 0)
        self.workers = {}
        self.no_workers.set()
        self._on_exited(Exited(self._rank, pid, code, number, self._tail.decode("utf-8", "replace")))
