"""Rank 0 alone (uni): started as ``python -m drumline.workers``, with a lifeline of its own and no forkserver."""

from __future__ import annotations

import asyncio
import os
import select
from collections.abc import Callable, Sequence
from contextlib import suppress

from drumline.engine.launch.owned_process import OwnedProcess
from drumline.protocol.messages import Exited, Spawned

STDERR_TAIL_BYTES = 4096


class OneWorker:
    """The worker and, after its end, its replacement.

    The first process is started at once and then waits for its launch token, which it reads from a pipe; each further
    one is started when it is ordered. What they print is passed on to stderr, and the last of it told with their exit.
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
        self._loop = loop
        self._endpoint = endpoint
        self._import_path = tuple(import_path)
        self._on_spawned = on_spawned
        self._on_exited = on_exited
        self._lifeline_end, self._lifeline = os.pipe()
        self._processes: dict[int, _Process] = {}
        self._all_gone = asyncio.Event()
        self.workers: dict[int, int] = {}
        self.no_workers = asyncio.Event()
        self.no_workers.set()
        self._waiting: _Process | None = self._start()

    @property
    def pids(self) -> set[int]:
        """Every process that is waited for here."""
        return set(self._processes)

    def _start(self) -> _Process:
        process = _Process(self._loop, self._endpoint, self._lifeline_end, self._import_path, self._ended)
        self._processes[process.pid] = process
        self._all_gone.clear()
        return process

    def spawn(self, rank: int, endpoint: str, token: str) -> None:
        """Give a worker its launch token: the one that waits for it, else a new one."""
        process, self._waiting = self._waiting, None
        if process is None:
            try:
                process = self._start()
            except OSError as error:
                self._on_exited(Exited(rank, 0, 1, 0, f"the process cannot be started: {error}"))
                return
        self.workers[process.pid] = rank
        self.no_workers.clear()
        self._on_spawned(Spawned(rank, process.pid))
        process.give(token)

    def kill(self, pid: int, number: int) -> None:
        """Send a signal to a worker, if it still is one."""
        if pid in self.workers:
            self._processes[pid].owned.signal(number)

    def close(self) -> None:
        """End the worker at once."""
        if self._lifeline >= 0:
            os.close(self._lifeline)
            os.close(self._lifeline_end)
            self._lifeline = self._lifeline_end = -1
        for process in self._processes.values():
            process.give("")

    def kill_all(self, number: int) -> None:
        """Send a signal to every process that is still there."""
        for process in self._processes.values():
            process.owned.signal(number)

    async def wait(self, timeout: float) -> bool:
        """Whether every process has ended within ``timeout`` seconds."""
        try:
            async with asyncio.timeout(timeout):
                await self._all_gone.wait()
        except TimeoutError:
            return False
        return True

    def _ended(self, process: _Process, code: int, number: int) -> None:
        del self._processes[process.pid]
        if not self._processes:
            self._all_gone.set()
        if process is self._waiting:
            # It has no place in the world yet: the order that comes starts another one, which then says why not.
            self._waiting = None
        rank = self.workers.pop(process.pid, None)
        if not self.workers:
            self.no_workers.set()
        if rank is not None:
            self._on_exited(Exited(rank, process.pid, code, number, process.tail.decode("utf-8", "replace")))


class _Process:
    """One process, and the pipe that its launch token comes through."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        endpoint: str,
        lifeline: int,
        import_path: Sequence[str],
        on_ended: Callable[[_Process, int, int], None],
    ) -> None:
        self.tail = bytearray()
        token, self._token = os.pipe()
        # Read through /proc, so that the token stands neither on the command line nor on a disk.
        arguments = ["--coordinator", endpoint, "--rank", "0", "--token-file", f"/proc/self/fd/{token}"]
        try:
            self.owned = OwnedProcess(
                loop,
                "drumline.workers",
                [*arguments, "--lifeline-fd", str(lifeline), *(f"--import-path={entry}" for entry in import_path)],
                on_output=self._output,
                on_exit=lambda code, number: on_ended(self, code, number),
                pass_fds=(lifeline, token),
                merge_stderr=True,
            )
        except OSError:
            os.close(self._token)
            raise
        finally:
            os.close(token)
        self.pid = self.owned.pid

    def give(self, token: str) -> None:
        """The launch token, once; without one the process ends."""
        if self._token < 0:
            return
        if token:
            with suppress(BrokenPipeError):  # it has ended, which is told by its exit
                os.write(self._token, token.encode())
        os.close(self._token)
        self._token = -1

    def _output(self, data: bytes) -> None:
        if not data:
            self.give("")  # it has ended
        self.tail += data
        del self.tail[:-STDERR_TAIL_BYTES]
        # A reader of stderr that sleeps must not stop the loop.
        writable = select.poll()
        writable.register(2, select.POLLOUT)
        for start in range(0, len(data), select.PIPE_BUF):
            if writable.poll(0):
                with suppress(OSError):
                    os.write(2, data[start : start + select.PIPE_BUF])
