"""What was committed is given back, to one coordinator at a time."""

from __future__ import annotations

import asyncio
import functools
import os
import sqlite3
from pathlib import Path

import pytest

from drumline.engine.errors import EngineClosed, InvalidConfig
from drumline.engine.journal import Batch, journal_term
from tests.unit.engine.journal.told import (
    Heard,
    Told,
    committed,
    mode,
    opened,
    plain,
    read,
    submit,
    there,
    until,
    write,
)


def fail() -> None:
    raise ZeroDivisionError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "journal.sqlite"


async def test_a_new_journal_is_empty_whole_and_nobody_elses_to_read(path: Path) -> None:
    assert journal_term(str(path)) == 0
    async with opened(path, 1) as (journal, restored):
        assert restored == ()
        assert journal.whole
        assert journal.state == "on"
    assert mode(path) == 0o600
    assert mode(path.parent) == 0o700
    assert journal_term(str(path)) == 1


async def test_requests_come_back_with_all_that_they_are(path: Path) -> None:
    told = Told()
    async with opened(path, 1) as (journal, _):
        await committed(
            journal,
            told.accept(submit("r1"), submit("r2", n=3, logprobs=2, prompt=5000)),
            told.step(),
            told.step(2),
            told.accept(submit("r3")),
            told.step(ending="r1"),
            told.rehandle("r2"),
            told.step(),
            told.accept(submit("r4")),
        )
    async with opened(path, 2) as (journal, restored):
        assert plain(restored) == plain(told.snapshot())
        assert journal.whole
        await committed(journal, told.rehandle("r3"), told.step(), told.forget("r1", "r4"), told.step())
    async with opened(path, 3) as (_, restored):
        assert plain(restored) == plain(told.snapshot())
        assert sorted(len(tokens) for one in restored for tokens in one.tokens) == [4, 7, 7, 7]


async def test_what_was_forgotten_leaves_nothing_for_those_who_get_its_handles(path: Path) -> None:
    told = Told()
    async with opened(path, 1) as (journal, _):
        await committed(journal, told.accept(submit("r1", n=2)), told.step(5), told.forget("r1"))
    again = Told()
    async with opened(path, 2) as (journal, restored):
        assert restored == ()
        await committed(journal, again.accept(submit("r2", n=2)), again.step())
    async with opened(path, 3) as (_, restored):
        assert plain(restored) == plain(again.snapshot())


async def test_an_id_can_be_forgotten_and_accepted_in_one_batch(path: Path) -> None:
    told = Told()
    async with opened(path, 1) as (journal, _):
        await committed(journal, told.accept(submit("r1")), told.step())
        first = told.forget("r1")
        both = told.accept(submit("r1", n=2))
        both.forgotten = first.forgotten
        await committed(journal, both, told.step())
    async with opened(path, 2) as (_, restored):
        assert plain(restored) == plain(told.snapshot())


async def test_batches_are_told_in_order_and_after_they_are_in_the_file(path: Path) -> None:
    told = Told()
    seen: list[int] = []
    async with opened(path, 1) as (journal, _):

        def look() -> None:
            with sqlite3.connect(path) as reader:
                seen.append(reader.execute("SELECT seq FROM meta").fetchone()[0])
            reader.close()

        journal.append(told.accept(submit("r1")), look)
        assert seen == []
        for _ in range(50):
            journal.append(told.step(), look)
            await asyncio.sleep(0)
        await until(lambda: len(seen) == 51)
    assert all(number >= place + 1 for place, number in enumerate(seen))


async def test_closing_commits_what_waits_and_tells_it(path: Path) -> None:
    told = Told()
    done: list[int] = []
    async with opened(path, 1) as (journal, _):
        journal.append(told.accept(submit("r1")), lambda: done.append(0))
        for number in range(1, 300):
            journal.append(told.step(), functools.partial(done.append, number))
    assert done == list(range(300))
    async with opened(path, 2) as (journal, restored):
        assert journal.whole
        assert plain(restored) == plain(told.snapshot())


async def test_one_that_fails_takes_nothing_from_those_after_it(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    told = Told()
    done: list[int] = []
    async with opened(path, 1) as (journal, _):
        journal.append(told.accept(submit("r1")), fail)
        journal.append(told.step(), lambda: done.append(1))
        await until(lambda: done)
    assert "ZeroDivisionError" in caplog.text


async def test_a_higher_term_ends_the_lower_one_which_tells_nothing_more(path: Path) -> None:
    told, old = Told(), Heard()
    async with opened(path, 1, old) as (first, _):
        await committed(first, told.accept(submit("r1")), told.step())
        async with opened(path, 2) as (second, restored):
            assert plain(restored) == plain(told.snapshot())
            first.append(Told().accept(submit("r9")), lambda: pytest.fail("told by the lower term"))
            await until(lambda: old.superseded)
            assert first.superseded
            assert "term 2" in old.superseded[0]
            first.append(Told().accept(submit("r8")), lambda: pytest.fail("told by the lower term"))
            await committed(second, told.step())
            assert second.state == "on"
    async with opened(path, 3) as (_, restored):
        assert plain(restored) == plain(told.snapshot())


@pytest.mark.parametrize("term", [4, 5])
async def test_a_term_that_is_not_the_highest_is_refused(path: Path, term: int) -> None:
    async with opened(path, 5):
        pass
    with pytest.raises(EngineClosed, match=f"term 5; this coordinator's is {term}"):
        async with opened(path, term):
            pass
    assert journal_term(str(path)) == 5


async def test_paths_that_cannot_be_a_journals_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_text("")
    with sqlite3.connect(tmp_path / "other") as other:
        other.execute("CREATE TABLE people (name)")
    other.close()
    before = read(tmp_path / "other")
    for name in ("pipe", "file/journal", "other", ""):
        with pytest.raises(InvalidConfig) as caught:
            async with opened(tmp_path / name, 1):
                pass
        assert caught.value.field == "journal"
        assert str(tmp_path) in str(caught.value.found)
    assert read(tmp_path / "other") == before
    assert journal_term(str(tmp_path / "other")) == 0
    with pytest.raises(InvalidConfig, match="journal: found /proc/folder/journal"):
        async with opened("/proc/folder/journal", 1):
            pass


async def test_a_journal_of_another_version_is_refused_and_left_as_it_is(path: Path) -> None:
    async with opened(path, 1):
        pass
    with sqlite3.connect(path) as changed:
        changed.execute("PRAGMA user_version = 9")
        changed.execute("UPDATE meta SET version = 9")
    changed.close()
    before = read(path)
    with pytest.raises(InvalidConfig, match=r"version 9.*valid: a journal of version 1"):
        async with opened(path, 2):
            pass
    assert read(path) == before


async def test_a_journal_that_did_not_begin_with_term_1_is_whole_after_a_while(path: Path) -> None:
    async with opened(path, 7, whole_after_s=0.1) as (journal, _):
        assert not journal.whole
        assert not there(path, ".whole")
        await until(lambda: there(path, ".whole"))
    async with opened(path, 8) as (journal, _):
        assert journal.whole


async def test_a_journal_without_its_last_batch_is_not_whole(path: Path) -> None:
    told = Told()
    async with opened(path, 1) as (journal, _):
        await committed(journal, told.accept(submit("r1")), told.step())
        saved = [read(path, ending) for ending in ("", "-wal")]
        await committed(journal, told.step())
    for ending, data in zip(("", "-wal"), saved, strict=True):
        write(path, data, ending)
    async with opened(path, 2) as (journal, restored):
        assert [one.tokens[0].tolist() for one in restored] == [told.requests["r1"][0].tokens[:1]]
        assert not journal.whole


async def test_an_empty_batch_says_so() -> None:
    assert Batch().empty
    assert not Told().accept(submit("r1")).empty
