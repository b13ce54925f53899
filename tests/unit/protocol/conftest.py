from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import uvloop
import zmq

Run: TypeAlias = Callable[[Coroutine[Any, Any, None]], None]
StartPeer: TypeAlias = Callable[[str], "subprocess.Popen[str]"]


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    """Runs a coroutine in a loop of each kind, for 20 s at most."""
    factory = asyncio.new_event_loop if request.param == "asyncio" else uvloop.new_event_loop

    def run_in_loop(main: Coroutine[Any, Any, None]) -> None:
        async def bounded() -> None:
            async with asyncio.timeout(20):
                await main

        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(bounded())

    return run_in_loop


@pytest.fixture
def context() -> Iterator[zmq.Context[Any]]:
    """A context whose sockets the test closes: it must end within 5 s, and a socket left open would hold it."""
    context: zmq.Context[Any] = zmq.Context()
    yield context
    end = threading.Thread(target=context.term, daemon=True)
    end.start()
    end.join(5)
    assert not end.is_alive(), "a socket was left open"


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder whose name is short enough for a socket's path."""
    path = Path(tempfile.mkdtemp(prefix="dl"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def start_peer() -> Iterator[StartPeer]:
    """Starts processes of peer.py; all are gone afterwards."""
    started: list[subprocess.Popen[str]] = []

    def start(endpoint: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "tests.unit.protocol.peer", endpoint]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate(timeout=10)
