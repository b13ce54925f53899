"""Whoever writes a journal may be killed at any moment: what was told to be kept is there."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.engine.journal.told import Told, check_prefix, opened

KILLS = 15


class Writers:
    """Starts writers, one after the other."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._orders = process.stdin
        self.told = process.stdout
        self._pid = 0

    def start(self, path: Path, term: int, dead_bytes: int, limit: int = 0) -> None:
        self._orders.write(f"{path}\t{term}\t{dead_bytes}\t{limit}\n".encode())
        self._orders.flush()
        word, pid = self.told.readline().split()
        assert word == b"pid"
        self._pid = int(pid)

    def kill(self) -> list[str]:
        """Returns what was told and not read yet."""
        os.kill(self._pid, signal.SIGKILL)
        lines = list(iter(self.told.readline, b"ended -9\n"))
        # What stands before that may have been cut short.
        return [line.decode().rstrip("\n") for line in lines[:-1]]


@pytest.fixture
def writers() -> Iterator[Writers]:
    command = [sys.executable, "-m", "tests.integration.engine.journal_writer"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        yield Writers(process)


def names(lines: list[str], word: str) -> set[str]:
    return {line.split()[1] for line in lines if line.startswith(word + " ")}


@pytest.mark.parametrize("dead_bytes", [4 << 20, 1 << 12], ids=["as it is", "compacting all the time"])
async def test_what_was_told_to_be_kept_is_there_after_a_kill(
    tmp_path: Path, writers: Writers, dead_bytes: int
) -> None:
    path = tmp_path / "journal.sqlite"
    draw = random.Random(dead_bytes)
    told_tokens = 0
    for number in range(KILLS):
        term = 2 * number + 1
        writers.start(path, term, dead_bytes)
        lines = [writers.told.readline().decode()]
        await asyncio.sleep(draw.random() * 0.1)
        lines += writers.kill()
        assert not [line for line in lines if line.startswith("state")]
        kept = [line.split()[1:] for line in lines if line.startswith("kept")][-1]
        counts = {name: list(map(int, found.split(","))) for name, found in (word.split("=") for word in kept)}
        told_tokens += sum(map(sum, counts.values()))
        async with opened(path, term + 1, dead_bytes=dead_bytes) as (journal, restored):
            assert journal.whole
        check_prefix(Told(), restored)
        found = {one.submit.request_id: [len(tokens) for tokens in one.tokens] for one in restored}
        assert not names(lines, "gone") & set(found)
        assert set(counts) - set(found) <= names(lines, "going")
        for name in set(counts) & set(found):
            assert all(there >= told for there, told in zip(found[name], counts[name], strict=True)), name
    assert told_tokens > 100 * KILLS


async def test_a_disk_that_fails_stops_nothing(tmp_path: Path, writers: Writers) -> None:
    """The files may be 200,000 bytes at most: writing fails in the middle of a transaction."""
    path = tmp_path / "journal.sqlite"
    writers.start(path, 1, 4 << 20, limit=200_000)
    end = time.monotonic() + 20
    while not writers.told.readline().startswith(b"state degraded"):
        assert time.monotonic() < end
    # It goes on telling.
    later = [writers.told.readline() for _ in range(500)]
    later += [line.encode() for line in writers.kill()]
    assert sum(line.startswith(b"kept") for line in later) > 50
    assert not [line for line in later if line.startswith(b"state")]
    async with opened(path, 2) as (journal, restored):
        assert not journal.whole
        assert check_prefix(Told(), restored) > 0
