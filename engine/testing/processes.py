"""Processes of this machine, as /proc shows them and as signals reach them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import time
from collections.abc import Callable
from pathlib import Path

from drumline.engine.testing.records import InjectionFailed

LOOK_S = 0.005
GONE_S = 5.0


class Process:
    """One process, held by a descriptor, so that its number cannot become another's. Raises InjectionFailed when there
    is none."""

    def __init__(self, pid: int, what: str) -> None:
        self.pid = pid
        self.what = f"{what} (pid {pid})"
        try:
            self._descriptor = os.pidfd_open(pid)
        except (OSError, OverflowError, ValueError) as error:
            raise InjectionFailed(f"{self.what} is not there: {error}") from None

    def close(self) -> None:
        """Let go of it."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def signal(self, number: int) -> bool:
        """Send a signal. False when it is gone."""
        try:
            signal.pidfd_send_signal(self._descriptor, number)
        except ProcessLookupError:
            return False
        return True

    @property
    def gone(self) -> bool:
        """Whether it has ended, reaped or not."""
        return bool(select.select([self._descriptor], [], [], 0)[0])

    @property
    def state(self) -> str:
        """Of all its threads: T when each is stopped, X when it is gone, else that of the first that is not."""
        states = [state_of(self.pid, int(entry.name)) for entry in _entries(f"/proc/{self.pid}/task")]
        if self.gone or not states:
            return "X"
        return next((state for state in states if state != "T"), "T")

    async def until(self, condition: Callable[[], bool], seconds: float, what: str) -> None:
        """Wait for ``condition``. Raises InjectionFailed with ``what`` after ``seconds``."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                raise InjectionFailed(f"{self.what} {what} within {seconds:g} s: it is in state {self.state}")
            await asyncio.sleep(LOOK_S)

    async def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        if not self.signal(signal.SIGKILL):
            raise InjectionFailed(f"{self.what} had ended before it could be killed")
        await self.until(lambda: self.gone, GONE_S, "did not end")

    async def stop(self) -> None:
        """SIGSTOP, and wait until it stands still."""
        if not self.signal(signal.SIGSTOP):
            raise InjectionFailed(f"{self.what} had ended before it could be stopped")
        await self.until(lambda: self.state == "T", GONE_S, "did not stop")

    def wake(self) -> bool:
        """SIGCONT. False when it is gone."""
        return self.signal(signal.SIGCONT)


def state_of(pid: int, thread: int) -> str:
    """The state letter of one thread, X when it is gone."""
    try:
        return Path(f"/proc/{pid}/task/{thread}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return "X"


def command(pid: int) -> str:
    """The command line, empty when the process is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def name(pid: int) -> str:
    """What the process calls itself, empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def parents() -> dict[int, int]:
    """The parent of every process."""
    found: dict[int, int] = {}
    for entry in _entries("/proc"):
        with contextlib.suppress(OSError, IndexError, ValueError):
            found[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    return found


def family(pid: int) -> list[int]:
    """``pid`` and all that it has started, ascending."""
    above = parents()
    found, grown = {pid}, True
    while grown:
        more = {one for one, parent in above.items() if parent in found} - found
        grown = bool(more)
        found |= more
    return sorted(found)


def _entries(folder: str) -> list[Path]:
    try:
        return [entry for entry in Path(folder).iterdir() if entry.name.isdigit()]
    except OSError:
        return []
