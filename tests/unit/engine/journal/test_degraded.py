"""A journal that cannot be written to: everything goes on; what is missing is written down before it is on again."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from drumline.engine.journal import Journal, journal, journal_term
from tests.unit.engine.journal.told import (
    Heard,
    Told,
    check_prefix,
    committed,
    opened,
    plain,
    remove,
    submit,
    there,
    until,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.sqlite"


@contextlib.contextmanager
def locked(path: Path, kind: str = "IMMEDIATE") -> Iterator[None]:
    """Another process has a transaction open."""
    program = (
        "import sqlite3, sys\n"
        "c = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
        "c.execute('PRAGMA locking_mode = ' + ('EXCLUSIVE' if sys.argv[2] == 'EXCLUSIVE' else 'NORMAL'))\n"
        "c.execute('BEGIN ' + sys.argv[2])\n"
        "print('locked', flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(path), kind], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"locked\n"
        yield
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(10) == 0


def answering(journal: Journal, told: Told, heard: Heard) -> None:
    """Snapshots are given when they are asked for."""
    heard.on_writable = lambda: journal.recover(told.snapshot())


async def test_a_full_disk_degrades_at_once_and_nothing_waits(path: Path) -> None:
    told, heard = Told(), Heard()
    async with opened(path, 1, heard) as (journal, _):
        await committed(journal, told.accept(submit("r1", n=2), submit("r2", logprobs=1)), told.step())
        journal.limit(True)
        await committed(journal, told.step(), told.step())
        assert heard.names == ["degraded"]
        assert "full" in heard.states[0][1]
        assert journal.state == "degraded"
        assert not there(path, ".whole")
        start = time.perf_counter()
        for _ in range(100):
            await committed(journal, told.step())
        assert time.perf_counter() - start < 1.0
        # It stays so, however often it is tried: the limit holds for probes too.
        await asyncio.sleep(0.7)
        assert heard.names == ["degraded"]
    async with opened(path, 2) as (journal, restored):
        assert not journal.whole
        assert check_prefix(told, restored) == 3


async def test_when_there_is_room_again_all_that_is_missing_is_written_before_it_is_on(path: Path) -> None:
    told, heard = Told(), Heard()
    async with opened(path, 1, heard) as (journal, _):
        answering(journal, told, heard)
        await committed(journal, told.accept(submit("r1", n=2), submit("r2", logprobs=1)), told.step())
        journal.limit(True)
        await committed(journal, told.step(ending="r1"), told.accept(submit("r3")), told.step(3), told.forget("r1"))
        journal.limit(False)
        while journal.state != "on":
            await committed(journal, told.step())
            await asyncio.sleep(0.01)
        assert heard.names == ["degraded", "writable", "on"]
        await committed(journal, told.step())
        assert there(path, ".whole")
    async with opened(path, 2) as (journal, restored):
        assert journal.whole
        assert plain(restored) == plain(told.snapshot())


async def test_a_lock_is_waited_for_a_second_and_no_longer(path: Path) -> None:
    told, heard = Told(), Heard()
    async with opened(path, 1, heard) as (journal, _):
        answering(journal, told, heard)
        await committed(journal, told.accept(submit("r1")), told.step())
        with locked(path):
            start = time.perf_counter()
            await committed(journal, told.step(), told.step())
            assert 0.9 < time.perf_counter() - start < 3.0
            assert heard.names == ["degraded"]
            assert "1 s" in heard.states[0][1]
            await committed(journal, told.step())
            await asyncio.sleep(0.6)
            assert heard.names == ["degraded"]
        await until(lambda: journal.state == "on")
    async with opened(path, 2) as (journal, restored):
        assert journal.whole
        assert plain(restored) == plain(told.snapshot())


async def test_a_lock_that_goes_in_time_is_not_noticed(path: Path) -> None:
    told, heard = Told(), Heard()
    async with opened(path, 1, heard) as (journal, _):
        await committed(journal, told.accept(submit("r1")))
        done: list[int] = []
        with locked(path):
            journal.append(told.step(), lambda: done.append(1))
            await asyncio.sleep(0.3)
            assert done == []
        await until(lambda: done)
        assert heard.names == []


async def test_time_in_which_the_loop_did_not_run_is_not_the_journals_fault(path: Path) -> None:
    told, heard = Told(), Heard()
    async with opened(path, 1, heard) as (journal, _):
        await committed(journal, told.accept(submit("r1")))
        done: list[int] = []
        with locked(path):
            journal.append(told.step(), lambda: done.append(1))
            await asyncio.sleep(0.25)
            time.sleep(1.5)  # noqa: ASYNC251
            await asyncio.sleep(0.25)
            assert done == []
        await until(lambda: done)
        assert heard.names == []


async def test_one_that_is_locked_when_it_is_opened_is_read_and_taken_over_later(path: Path) -> None:
    told, heard = Told(), Heard()
    async with opened(path, 1) as (journal, _):
        await committed(journal, told.accept(submit("r1")), told.step())
    with locked(path):
        async with opened(path, 2, heard) as (journal, restored):
            answering(journal, told, heard)
            assert plain(restored) == plain(told.snapshot())
            assert not journal.whole
            await committed(journal, told.step())
            await until(lambda: heard.names == ["degraded"])
            assert journal_term(str(path)) == 1
    async with opened(path, 3, heard) as (journal, restored):
        assert not journal.whole


async def test_one_that_cannot_even_be_read_when_it_is_opened_is_taken_over_later(path: Path) -> None:
    told, heard = Told(), Heard()
    async with opened(path, 1) as (journal, _):
        await committed(journal, told.accept(submit("r1")), told.step())
    with contextlib.ExitStack() as lock:
        lock.enter_context(locked(path, "EXCLUSIVE"))
        async with opened(path, 2, heard) as (journal, restored):
            answering(journal, told, heard)
            assert restored == ()
            await committed(journal, told.step())
            await until(lambda: heard.names == ["degraded"])
            lock.close()
            await until(lambda: journal.state == "on")
            await committed(journal, told.step())
    async with opened(path, 3) as (_, restored):
        assert plain(restored) == plain(told.snapshot())


async def test_a_file_that_somebody_removes_is_made_again(path: Path) -> None:
    told, heard = Told(), Heard()
    async with opened(path, 1, heard) as (journal, _):
        answering(journal, told, heard)
        await committed(journal, told.accept(submit("r1")), told.step())
        remove(path)
        await asyncio.sleep(1.0)
        await committed(journal, told.step(), told.step())
        await until(lambda: "on" in heard.names)
        assert heard.names == ["degraded", "writable", "on"]
        await committed(journal, told.step())
    async with opened(path, 2) as (journal, restored):
        assert plain(restored) == plain(told.snapshot())


async def test_a_file_that_is_damaged_while_it_is_used_is_set_aside(path: Path) -> None:
    told, heard = Told(), Heard()
    async with opened(path, 1, heard) as (journal, _):
        answering(journal, told, heard)
        await committed(journal, told.accept(submit("r1")), told.step())
        with sqlite3.connect(path) as other:
            other.execute("PRAGMA writable_schema = 1")
            other.execute("UPDATE sqlite_master SET sql = 'nonsense'")
            other.execute("PRAGMA schema_version = 99")
        other.close()
        await committed(journal, told.step())
        await until(lambda: "on" in heard.names)
        assert "set aside" in heard.names
        await committed(journal, told.step())
    assert there(path, ".corrupt-1")
    async with opened(path, 2) as (_, restored):
        assert plain(restored) == plain(told.snapshot())


async def test_too_much_that_waits_degrades(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told, heard = Told(), Heard()
    monkeypatch.setattr(journal, "MAX_BATCHES", 10)
    async with opened(path, 1, heard) as (one, _):
        await committed(one, told.accept(submit("r1")))
        with locked(path):
            await committed(one, *[told.step() for _ in range(11)])
            assert heard.names == ["degraded"]
            assert "11 batches" in heard.states[0][1]


async def test_closing_while_nothing_can_be_written_tells_all_and_says_that_it_is_not_whole(path: Path) -> None:
    told = Told()
    done: list[int] = []
    async with opened(path, 1) as (journal, _):
        await committed(journal, told.accept(submit("r1")), told.step())
        with locked(path):
            journal.append(told.step(), lambda: done.append(1))
            journal.append(told.step(), lambda: done.append(2))
            journal.close()
            assert done == [1, 2]
    async with opened(path, 2) as (journal, restored):
        assert not journal.whole
        # A writer that is late may still get the lock: what it writes then is right, and nobody relies on it.
        assert check_prefix(told, restored) >= 1
