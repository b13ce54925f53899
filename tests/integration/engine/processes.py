"""What a test needs to know about the processes of an engine, found by a mark in their environment."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import psutil

from drumline.engine.client import AsyncEngine
from drumline.engine.config import EngineConfig
from drumline.protocol.messages import Event

MARK = "DRUMLINE_TEST_MARK"
ALL_GONE_S = 3.0
"""How long anything may outlive its owner."""


def marked(mark: str) -> dict[int, str]:
    """Command lines by pid of all living processes that inherited ``mark``, this one excepted."""
    wanted = f"{MARK}={mark}".encode()
    found: dict[int, str] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            if wanted not in (entry / "environ").read_bytes().split(b"\0"):
                continue
            process = psutil.Process(int(entry.name))
            if process.status() != psutil.STATUS_ZOMBIE:
                found[process.pid] = " ".join(process.cmdline()) or process.name()
        except (OSError, psutil.Error):
            continue
    return found


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
    found: list[tuple[str, int]] = []
    for pid in marked(mark):
        try:
            name = psutil.Process(pid).name()
        except psutil.Error:
            continue
        if name.startswith("drumline:r"):
            found.append((name, pid))
    return [pid for _, pid in sorted(found)]


def of_module(mark: str, module: str) -> int:
    """The pid of the process that runs ``module``."""
    (pid,) = [pid for pid, command in marked(mark).items() if f"-m {module}" in command]
    return pid


def has_ended(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@asynccontextmanager
async def running(config: EngineConfig, events: list[Event] | None = None) -> AsyncIterator[AsyncEngine]:
    """A started engine."""
    async with AsyncEngine(config, on_event=(events if events is not None else []).append) as engine:
        yield engine
