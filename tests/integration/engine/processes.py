"""What a test needs to know about the processes of an engine, found by a mark in their environment."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from drumline.engine.client import AsyncEngine
from drumline.engine.config import EngineConfig
from drumline.protocol.messages import Event
from tests import procfs

MARK = "DRUMLINE_TEST_MARK"
ALL_GONE_S = 3.0
"""How long anything may outlive its owner."""


def marked(mark: str) -> dict[int, str]:
    """Command lines by pid of all living processes that inherited ``mark``, this one excepted."""
    entry = f"{MARK}={mark}"
    return {
        pid: procfs.command(pid) or procfs.name(pid)
        for pid in procfs.pids()
        if pid != os.getpid() and procfs.has_environment(pid, entry) and procfs.is_alive(pid)
    }


def wait_until(condition: Callable[[], bool], seconds: float, what: str) -> float:
    """Wait for ``condition``; returns how long it took. Fails with ``what`` after ``seconds``."""
    start = time.monotonic()
    while not condition():
        if time.monotonic() - start > seconds:
            raise AssertionError(f"after {seconds:g} s: {what}")
        time.sleep(0.01)
    return time.monotonic() - start


async def until(condition: Callable[[], bool], seconds: float, what: str) -> float:
    """:func:`wait_until` in an event loop."""
    start = time.monotonic()
    while not condition():
        if time.monotonic() - start > seconds:
            raise AssertionError(f"after {seconds:g} s: {what}")
        await asyncio.sleep(0.01)
    return time.monotonic() - start


def wait_all_gone(mark: str, runtime_root: Path, seconds: float = ALL_GONE_S) -> float:
    """Every process and every file of the engine is gone within ``seconds``; returns how long it took."""
    took = wait_until(lambda: not marked(mark), seconds, f"still alive: {marked(mark)}")
    assert files_in(runtime_root) == [], f"left behind: {files_in(runtime_root)}"
    return took


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def workers(mark: str) -> list[int]:
    """Pids of worker processes (they name themselves), by rank."""
    names = {pid: procfs.name(pid) for pid in marked(mark)}
    return sorted((pid for pid in names if names[pid].startswith("drumline:r")), key=lambda pid: names[pid])


def of_module(mark: str, module: str) -> int:
    """The pid of the process that runs ``module``; workers, which are forks, keep the command line of their origin."""
    forks = set(workers(mark))
    (pid,) = [pid for pid, command in marked(mark).items() if f"-m {module}" in command and pid not in forks]
    return pid


@asynccontextmanager
async def running(config: EngineConfig, events: list[Event] | None = None) -> AsyncIterator[AsyncEngine]:
    """A started engine."""
    async with AsyncEngine(config, on_event=(events if events is not None else []).append) as engine:
        yield engine
