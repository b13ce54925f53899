"""A damaged file: what is given back is the beginning of what was told, never anything else."""

from __future__ import annotations

import asyncio
import random
import shutil
from pathlib import Path

import pytest

from tests.unit.engine.journal.told import (
    Heard,
    Told,
    beside,
    check_prefix,
    committed,
    opened,
    read,
    submit,
    there,
    write,
)

HEADER_BYTES = 100


async def copy_of_a_killed_ones(folder: Path, told: Told) -> Path:
    """The files as a coordinator leaves them that is killed: some of it in the file, some in the log."""
    path = folder / "live" / "journal.sqlite"
    async with opened(path, 1) as (journal, _):
        await committed(journal, told.accept(submit("r1", n=2), submit("r2", logprobs=2)), told.step(300))
    async with opened(path, 2) as (journal, _):
        for number in range(3, 30):
            await committed(journal, told.step(), told.accept(submit(f"r{number}")))
        shutil.copytree(path.parent, folder / "killed")
    return folder / "killed" / path.name


async def restored_from(original: Path, folder: Path, told: Told) -> tuple[int, bool, Heard]:
    heard = Heard()
    async with opened(folder / original.name, 3, heard) as (journal, restored):
        count = check_prefix(told, restored)
        whole = journal.whole
    await asyncio.sleep(0)
    async with opened(folder / original.name, 4) as (_, again):
        assert check_prefix(told, again) == count
    return count, whole, heard


async def test_any_end_of_the_log_may_be_cut_off(tmp_path: Path) -> None:
    told = Told()
    original = await copy_of_a_killed_ones(tmp_path, told)
    log = read(original, "-wal")
    counts = []
    for length in [*sorted(random.Random(1).sample(range(len(log)), 16)), len(log)]:
        folder = tmp_path / str(length)
        shutil.copytree(original.parent, folder)
        write(folder / original.name, log[:length], "-wal")
        count, whole, heard = await restored_from(original, folder, told)
        assert whole == (length == len(log))
        assert heard.states == []
        counts.append(count)
    assert counts == sorted(counts)
    assert counts[-1] == sum(len(stream.tokens) for streams in told.requests.values() for stream in streams)
    assert counts[0] >= 900
    assert len(set(counts)) > 5


@pytest.mark.parametrize("ending", ["-wal", ""])
async def test_any_byte_may_be_another(tmp_path: Path, ending: str) -> None:
    told = Told()
    original = await copy_of_a_killed_ones(tmp_path, told)
    if not ending:
        # A log hides what is in the file below it: here it was moved there.
        original = tmp_path / "live" / original.name
        assert not there(original, "-wal")
    good = read(original, ending)
    everything = sum(len(stream.tokens) for streams in told.requests.values() for stream in streams)
    draw = random.Random(2)
    counts: list[int] = []
    set_aside = 0
    places = [draw.randrange(len(good)) for _ in range(22)] + [draw.randrange(HEADER_BYTES) for _ in range(8)]
    for number, place in enumerate(places):
        folder = tmp_path / f"{number}{ending}"
        shutil.copytree(original.parent, folder)
        damaged = bytearray(good)
        damaged[place] ^= 1 << draw.randrange(8)
        write(folder / original.name, bytes(damaged), ending)
        count, whole, heard = await restored_from(original, folder, told)
        counts.append(count)
        assert not whole or count == everything
        if heard.states:
            set_aside += 1
            assert heard.names == ["set aside"]
            assert there(folder / original.name, ".corrupt-1")
    if ending:
        # A transaction of the log and all after it are left out.
        assert set_aside == 0
        assert 900 <= min(counts) < max(counts) < everything
    else:
        # Some bytes stand for nothing; where one stands for something, nothing of the file is believed.
        assert 0 < set_aside < len(places)
        assert set(counts) == {0, everything}


async def test_a_file_of_something_else_is_set_aside_and_three_such_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"
    for number in range(1, 6):
        heard = Heard()
        write(path, b"something else %d" % number * 1000)
        async with opened(path, number + 1, heard) as (journal, restored):
            assert restored == ()
            assert not journal.whole
            told = Told()
            await committed(journal, told.accept(submit("r1")), told.step())
        assert heard.names == ["set aside"]
        assert f"corrupt-{number}" in heard.states[0][1]
    kept = beside(tmp_path, "corrupt")
    assert kept == [f"journal.sqlite.corrupt-{number}" for number in (3, 4, 5)]
    assert read(tmp_path / kept[0]).startswith(b"something else 3")


async def test_an_old_file_under_a_newer_log_is_noticed(tmp_path: Path) -> None:
    """Pages of two moments: each of them valid, together not what was ever written."""
    told = Told()
    path = tmp_path / "live" / "journal.sqlite"
    path.parent.mkdir()
    async with opened(path, 1) as (journal, _):
        await committed(journal, told.accept(submit("r1"), submit("r2")), told.step(400))
        old = path.read_bytes()
    async with opened(path, 2) as (journal, _):
        await committed(journal, told.forget("r1"), told.accept(submit("r3")), told.step(300))
        shutil.copytree(path.parent, tmp_path / "killed")
    mixed = tmp_path / "killed" / path.name
    mixed.write_bytes(old)
    heard = Heard()
    async with opened(mixed, 3, heard) as (_, restored):
        check_prefix(told, restored)
