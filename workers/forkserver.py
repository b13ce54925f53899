"""Starts workers in milliseconds: a process that has imported torch, runs none of it, and forks.

It is single-threaded, because only the thread that forks lives on in a child. One poll loop reads commands from fd 0,
reaps children through pidfds, and forwards what they write to stderr while keeping the last 4 KiB of it for the report
of their exit. When fd 0 ends, the owner is gone: every child is killed and the forkserver exits. The frames are
described in :mod:`drumline.workers.framing`.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import select
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from drumline.protocol.errors import DrumlineError, ProtocolError
from drumline.workers import lifeline
from drumline.workers.framing import Command, CommandReader, pack
from drumline.workers.signals import release_signals, take_signals
from drumline.workers.torch_environment import leave_losses_to_us, sleep_while_waiting

STDERR_TAIL_BYTES = 4096
REPLY_DEADLINE_MS = 5000
_FORWARD_CHUNK = 4096  # PIPE_BUF: a pipe that polls writable takes this much without blocking

StartWorker = Callable[[int, str, str, int | None], int]


class Child:
    """A worker process: its pidfd, and the read end of its stderr."""

    def __init__(self, rank: int, pid: int, pidfd: int, stderr: int) -> None:
        self.rank = rank
        self.pid = pid
        self.pidfd = pidfd
        self.stderr = stderr
        self.tail = bytearray()

    def keep(self, data: bytes) -> None:
        """``tail`` becomes the last ``STDERR_TAIL_BYTES`` of what the child has written, ``data`` being the newest."""
        self.tail += data
        del self.tail[:-STDERR_TAIL_BYTES]


class OwnerGone(Exception):
    """Nobody reads the reports any more."""


class ForkServer:
    """The loop. ``start`` runs in the child and returns its exit code."""

    def __init__(self, commands: int, reports: int, lifeline_fd: int | None, signals: int, start: StartWorker) -> None:
        self._commands = commands
        self._reports = reports
        self._lifeline = lifeline_fd
        self._signals = signals
        self._start = start
        self._reader = CommandReader()
        self._children: dict[int, Child] = {}
        self._by_fd: dict[int, Child] = {}
        self._poller = select.poll()

    def run(self) -> int:
        """Serve until the owner is gone. Returns the exit code: 0, or 2 when the owner sent what is no command."""
        self._poller.register(self._commands, select.POLLIN)
        self._poller.register(self._signals, select.POLLIN)
        if self._lifeline is not None:
            self._poller.register(self._lifeline, select.POLLIN)
        try:
            self._report({"ready": os.getpid()})
            while self._turn():
                pass
        except OwnerGone:
            pass
        except ProtocolError as error:
            _say(f"forkserver: {error}\n".encode())
            return 2
        finally:
            self._kill_all()
        return 0

    def _turn(self) -> bool:
        """One round of the poll loop; False once the owner is gone."""
        for fd, _ in self._poller.poll():
            if fd in (self._lifeline, self._signals):
                return False
            if fd == self._commands:
                data = os.read(fd, 65536)
                if not data:
                    return False
                for command in self._reader.feed(data):
                    self._obey(command)
                continue
            child = self._by_fd.get(fd)
            if child is None:  # closed earlier in this round
                continue
            if fd == child.stderr:
                self._forward(child)
            else:
                self._reap(child)
        return True

    def _obey(self, command: Command) -> None:
        if command.spawn is not None:
            self._spawn(*command.spawn)
        elif command.kill is not None:
            pid, number = command.kill
            child = self._children.get(pid)
            if child is not None:  # else it has been reported as gone
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(child.pidfd, number)

    def _spawn(self, rank: int, endpoint: str, token: str) -> None:
        read_end, write_end = os.pipe()
        os.set_blocking(read_end, False)
        try:
            pid = _fork_with_signals_blocked()
        except OSError as error:
            os.close(read_end)
            os.close(write_end)
            self._report({"exited": [rank, 0, 1, 0, f"fork failed: {error}"]})
            return
        if pid == 0:
            self._become_worker(rank, endpoint, token, read_end, write_end)
        os.close(write_end)
        child = Child(rank, pid, os.pidfd_open(pid), read_end)
        self._children[pid] = child
        for fd in (child.pidfd, child.stderr):
            self._by_fd[fd] = child
            self._poller.register(fd, select.POLLIN)
        self._report({"spawned": [rank, pid]})

    def _become_worker(self, rank: int, endpoint: str, token: str, read_end: int, write_end: int) -> None:
        """The child's first steps: descriptors and signals as in a fresh process. Never returns."""
        code = 1
        try:
            null = os.open(os.devnull, os.O_RDONLY)
            os.dup2(null, 0)
            os.dup2(write_end, 1)  # a stray print must not end up among the forkserver's reports
            os.dup2(write_end, 2)
            ours = {self._commands, self._reports, self._signals, *self._by_fd, null, write_end, read_end}
            for fd in ours - {0, 1, 2}:
                os.close(fd)
            release_signals()
            gc.enable()
            code = self._start(rank, endpoint, token, self._lifeline)
        except BaseException as error:  # the report of whatever ends a worker is its stderr
            sys.excepthook(type(error), error, error.__traceback__)
        finally:
            with contextlib.suppress(OSError, ValueError):
                sys.stderr.flush()
            os._exit(code)

    def _forward(self, child: Child) -> bool:
        """Move one chunk of a child's stderr on; False when there is nothing now."""
        try:
            data = os.read(child.stderr, _FORWARD_CHUNK)
        except BlockingIOError:
            return False
        if not data:  # the child closed it; its exit is told by the pidfd
            self._poller.unregister(child.stderr)
            self._by_fd.pop(child.stderr)
            return False
        child.keep(data)
        _say(data)
        return True

    def _reap(self, child: Child) -> None:
        _, status = os.waitpid(child.pid, 0)  # its pidfd is readable, so this does not wait
        while child.stderr in self._by_fd and self._forward(child):
            pass
        for fd in (child.pidfd, child.stderr):
            if self._by_fd.pop(fd, None) is not None:
                self._poller.unregister(fd)
            os.close(fd)
        del self._children[child.pid]
        code, number = (0, os.WTERMSIG(status)) if os.WIFSIGNALED(status) else (os.WEXITSTATUS(status), 0)
        tail = child.tail.decode("utf-8", "replace")
        self._report({"exited": [child.rank, child.pid, code, number, tail]})

    def _report(self, report: dict[str, object]) -> None:
        """Write one report. An owner that reads nothing for 5 s counts as gone.

        Raises:
            OwnerGone: the pipe is closed or full.
        """
        data = memoryview(pack(report))
        writable = select.poll()
        writable.register(self._reports, select.POLLOUT)
        while data:
            if not writable.poll(REPLY_DEADLINE_MS):
                raise OwnerGone
            try:
                data = data[os.write(self._reports, data[:_FORWARD_CHUNK]) :]
            except OSError as error:
                raise OwnerGone from error

    def _kill_all(self) -> None:
        for child in self._children.values():
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(child.pidfd, signal.SIGKILL)
        for child in self._children.values():
            os.waitpid(child.pid, 0)
        self._children.clear()


def _fork_with_signals_blocked() -> int:
    """Fork; the child keeps every signal blocked until it has put its own dispositions in place."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    pid = -1
    try:
        pid = os.fork()
    finally:
        if pid != 0:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return pid


def _say(data: bytes) -> None:
    """Write to stderr if it takes the bytes now; a reader that sleeps must not stop the loop."""
    writable = select.poll()
    writable.register(2, select.POLLOUT)
    if writable.poll(0):
        with contextlib.suppress(OSError):
            os.write(2, data)


def preload() -> StartWorker:
    """Import everything that a worker needs. Returns the worker's entry.

    numpy's linear algebra starts a thread when it is loaded unless told not to, and a fork from a process with
    threads may inherit a lock that nobody will ever release.

    Raises:
        DrumlineError: an import started a thread all the same.
    """
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    import drumline.workers.worker  # noqa: F401
    from drumline.workers.process import start_worker

    threads = len(list(Path("/proc/self/task").iterdir()))
    if threads != 1:
        raise DrumlineError(f"forkserver: {threads} threads after the imports; it must have one to fork safely")
    return start_worker


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="drumline.workers.forkserver", description=__doc__.splitlines()[0])
    parser.add_argument("--lifeline-fd", type=int, default=None, help="read end of the owner's lifeline pipe")
    parser.add_argument("--import-path", action="append", default=[], help="an entry that comes first in sys.path")
    options = parser.parse_args(arguments)
    lifeline_fd = None if options.lifeline_fd is None else lifeline.arm(options.lifeline_fd)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sleep_while_waiting()
    leave_losses_to_us()
    start = preload()
    # After the imports of our own, which another folder's module must not take the place of.
    sys.path[:] = [*options.import_path, *(entry for entry in sys.path if entry not in options.import_path)]
    if lifeline_fd is not None:
        lifeline.disarm(lifeline_fd)  # from here on the loop sees it, and kills the children too
    gc.collect()
    gc.disable()
    gc.freeze()  # a collection in a child would copy every page that torch's import has touched
    return ForkServer(0, 1, lifeline_fd, take_signals(), start).run()


if __name__ == "__main__":
    sys.exit(main())
