"""Whoever writes a journal may be killed at any moment: what was told to be kept is there."""

from __future__ import annotations

import contextlib
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


@contextlib.contextmanager
def writing(path: Path, term: int, dead_bytes: int, limit: int = 0) -> Iterator[subprocess.Popen[bytes]]:
    """A process that writes; gone at the end. With a ``limit`` its files may be no larger."""
    command = [sys.executable, "-m", "tests.integration.engine.journal_writer", str(path), str(term), str(dead_bytes)]
    with subprocess.Popen([*command, str(limit)], stdout=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


def told_until_killed(process: subprocess.Popen[bytes], after_s: float) -> list[str]:
    """What it had told when it was killed."""
    assert process.stdout is not None
    told = [process.stdout.readline()]
    os.set_blocking(process.stdout.fileno(), False)
    end = time.monotonic() + after_s
    while time.monotonic() < end:
        told.append(process.stdout.read() or b"")
        time.sleep(0.001)
    process.kill()
    assert process.wait(10) == -signal.SIGKILL
    os.set_blocking(process.stdout.fileno(), True)
    told.append(process.stdout.read())
    # The last line may have been cut short.
    return b"".join(told).decode().split("\n")[:-1]


def names(lines: list[str], word: str) -> set[str]:
    return {line.split()[1] for line in lines if line.startswith(word + " ")}


@pytest.mark.parametrize("dead_bytes", [4 << 20, 1 << 12], ids=["as it is", "compacting all the time"])
async def test_what_was_told_to_be_kept_is_there_after_a_kill(tmp_path: Path, dead_bytes: int) -> None:
    path = tmp_path / "journal.sqlite"
    draw = random.Random(dead_bytes)
    told_tokens = 0
    for number in range(KILLS):
        term = 2 * number + 1
        with writing(path, term, dead_bytes) as process:
            lines = told_until_killed(process, draw.random() * 0.3)
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


async def test_a_disk_that_fails_stops_nothing(tmp_path: Path) -> None:
    """The files may be 200,000 bytes at most: writing fails in the middle of a transaction."""
    path = tmp_path / "journal.sqlite"
    with writing(path, 1, 4 << 20, limit=200_000) as process:
        assert process.stdout is not None
        end = time.monotonic() + 20
        while not process.stdout.readline().startswith(b"state degraded"):
            assert time.monotonic() < end
        # It goes on telling.
        later = [process.stdout.readline() for _ in range(500)]
    assert sum(line.startswith(b"kept") for line in later) > 50
    assert not [line for line in later if line.startswith(b"state")]
    async with opened(path, 2) as (journal, restored):
        assert not journal.whole
        assert check_prefix(Told(), restored) > 0
