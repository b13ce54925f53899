"""A child process that is watched through its pidfd and ends with its owner."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence

STOP_POLL_LIMIT_S = 5.0


class OwnedProcess:
    """``python -m module`` with a pipe on stdin (its lifeline) and one on stdout.

    ``on_exit(code, signal)`` is called in the loop as soon as the process ends; ``on_output(data)`` for what it writes
    to stdout, empty at its end. stderr is the owner's own, or with ``merge_stderr`` goes where stdout goes.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        module: str,
        arguments: Sequence[str],
        *,
        on_output: Callable[[bytes], None],
        on_exit: Callable[[int, int], None],
        pass_fds: Sequence[int] = (),
        new_session: bool = False,
        first_line: bytes = b"",
        merge_stderr: bool = False,
    ) -> None:
        self._loop = loop
        self._on_output = on_output
        self._on_exit = on_exit
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT if merge_stderr else None,
            pass_fds=pass_fds,
            start_new_session=new_session,
            bufsize=0,
        )
        self.pid = self._process.pid
        self.exited = asyncio.Event()
        self._pidfd = os.pidfd_open(self.pid)
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise OSError(f"{module} was started without pipes")
        self._stdin, self._stdout = stdin, stdout
        os.set_blocking(stdin.fileno(), False)
        os.set_blocking(stdout.fileno(), False)
        self._output_open = True
        self._unsent = memoryview(b"")
        loop.add_reader(self._pidfd, self._ended)
        loop.add_reader(stdout.fileno(), self._readable)
        if first_line and not self.write(first_line):
            self.close_lifeline()
            raise OSError(f"{module} did not take its first line of {len(first_line)} bytes")

    def write(self, data: bytes) -> bool:
        """Write to its stdin; False when the pipe is closed or full, which nothing but a stuck reader makes it."""
        if self._stdin.closed:
            return False
        try:
            return os.write(self._stdin.fileno(), data) == len(data)
        except (BrokenPipeError, BlockingIOError):
            return False

    def send(self, data: bytes) -> None:
        """Write all of ``data`` to its stdin, as fast as it reads there; what it has not read at its end is dropped."""
        self._unsent = memoryview(bytes(self._unsent) + data) if self._unsent else memoryview(data)
        self._send_more()

    def _send_more(self) -> None:
        if self._stdin.closed:
            return
        try:
            self._unsent = self._unsent[os.write(self._stdin.fileno(), self._unsent) :]
        except BlockingIOError:
            pass
        except BrokenPipeError:
            self._unsent = memoryview(b"")
        if self._unsent:
            self._loop.add_writer(self._stdin.fileno(), self._send_more)
        else:
            self._loop.remove_writer(self._stdin.fileno())

    def close_lifeline(self) -> None:
        """Tell the process that it should end: its stdin reaches its end."""
        if not self._stdin.closed:
            self._loop.remove_writer(self._stdin.fileno())
            self._stdin.close()

    def signal(self, number: int) -> None:
        """Send a signal, if the process is still there."""
        if not self.exited.is_set():
            signal.pidfd_send_signal(self._pidfd, number)

    async def wait(self, timeout: float) -> bool:
        """Whether the process has ended within ``timeout`` seconds."""
        try:
            async with asyncio.timeout(timeout):
                await self.exited.wait()
        except TimeoutError:
            return False
        return True

    def _readable(self) -> None:
        try:
            data = os.read(self._stdout.fileno(), 1 << 16)
        except BlockingIOError:
            return
        if not data:
            self._close_output()
        self._on_output(data)

    def _close_output(self) -> None:
        if self._output_open:
            self._output_open = False
            self._loop.remove_reader(self._stdout.fileno())
            self._stdout.close()

    def _ended(self) -> None:
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        code = self._process.wait(STOP_POLL_LIMIT_S)
        while self._output_open:
            try:
                data = os.read(self._stdout.fileno(), 1 << 16)
            except BlockingIOError:
                # A grandchild holds the pipe open; what the process itself wrote has been read.
                data = b""
            if data:
                self._on_output(data)
            else:
                self._close_output()
                self._on_output(b"")
        self.close_lifeline()
        self.exited.set()
        self._on_exit(max(code, 0), max(-code, 0))


def watch_owner(loop: asyncio.AbstractEventLoop, fd: int, owner_pid: int, on_gone: Callable[[], None]) -> None:
    """Call ``on_gone`` once when ``fd`` reaches its end or the process ``owner_pid`` is gone.

    Both are watched: a fork of the owner may hold the other end of the pipe open beyond the owner's death.
    """
    watched: list[int] = []

    def gone() -> None:
        while watched:
            loop.remove_reader(watched.pop())
        on_gone()

    def readable() -> None:
        try:
            if os.read(fd, 1 << 12):
                return
        except BlockingIOError:
            return
        except OSError:
            pass  # a lifeline that cannot be read is as good as cut
        gone()

    os.set_blocking(fd, False)
    watched.append(fd)
    loop.add_reader(fd, readable)
    try:
        owner = os.pidfd_open(owner_pid)
    except ProcessLookupError:
        loop.call_soon(gone)
        return
    watched.append(owner)
    loop.add_reader(owner, gone)


def how_ended(code: int, number: int) -> str:
    """What ``on_exit`` is told, in words."""
    return f"signal {number}" if number else f"code {code}"


def has_ended(pid: int) -> bool:
    """Whether there is no such process, or its parent alone has still to take note of its end."""
    try:
        owner = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([owner], [], [], 0.0)[0])
    finally:
        os.close(owner)
