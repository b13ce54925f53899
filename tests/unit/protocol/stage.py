"""Processes of group_ranks.py as a test sees them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests import procfs


class Player:
    """One process. ``said`` holds what it has said so far, by kind."""

    def __init__(self, stage: Stage) -> None:
        self.said: dict[str, Any] = {}
        self._stage = stage

    def hear(self, *kinds: str, timeout_s: float = 30.0) -> Any:
        """What it says of the first of ``kinds`` that it says, waited for."""
        with self._stage.heard:
            spoken = self._stage.heard.wait_for(lambda: any(kind in self.said for kind in kinds), timeout_s)
            assert spoken, f"a process that said {self.said} did not say {kinds} within {timeout_s} s"
            return next(self.said[kind] for kind in kinds if kind in self.said)

    def result(self, timeout_s: float = 30.0) -> Any:
        """What it returned, or [name, text] of the error that it ended with."""
        return self.hear("done", "failed", timeout_s=timeout_s)

    def signal(self, number: signal.Signals, state: str) -> None:
        """Send a signal and wait until the process is in ``state``: a letter of /proc, or "" for gone."""
        pid = int(self.hear("pid"))
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
        deadline = time.monotonic() + 10
        while self._state(pid) != state:
            assert time.monotonic() < deadline, f"process {pid} is in state {self._state(pid)!r}, not {state!r}"
            time.sleep(0.002)

    @staticmethod
    def _state(pid: int) -> str:
        with contextlib.suppress(OSError):
            return procfs.stat(pid)[0]
        return ""


class Stage:
    """Starts processes; all end with it."""

    def __init__(self) -> None:
        self.heard = threading.Condition()
        self._players: list[Player] = []
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.unit.protocol.group_ranks"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def start(self, play: str, **arguments: Any) -> Player:
        player = Player(self)
        self._players.append(player)
        order = {"id": len(self._players) - 1, "play": play, "arguments": arguments}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return player

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            heard = json.loads(line)
            with self.heard:
                self._players[heard["id"]].said[heard["said"]] = heard["what"]
                self.heard.notify_all()

    def close(self) -> None:
        self._process.kill()
        self._reader.join(10)
        assert not self._reader.is_alive(), "a process outlived the one that forked it"
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
        self._process.wait(10)


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    stage = Stage()
    yield stage
    stage.close()
