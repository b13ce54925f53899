"""The file stays small, whatever has passed through it, and what is live stays in it."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.unit.engine.journal.told import Heard, Told, committed, opened, plain, submit, until


def size(path: Path) -> int:
    return sum(one.stat().st_size for one in path.parent.iterdir())


async def test_short_requests_that_come_and_go_leave_a_small_file(tmp_path: Path) -> None:
    """100,000 tokens, ten a batch."""
    path = tmp_path / "journal.sqlite"
    told, heard = Told(), Heard()
    largest = 0
    async with opened(path, 1, heard, dead_bytes=1 << 19) as (journal, _):
        for number in range(100):
            names = [f"r{number}.{place}" for place in range(10)]
            batches = [told.accept(*[submit(name) for name in names])]
            batches += [told.step(ending=names[0] if token == 99 else "") for token in range(100)]
            batches.append(told.forget(*names))
            await committed(journal, *batches)
            largest = max(largest, size(path))
        assert heard.states == []
    assert largest < 8 << 20
    assert size(path) < 2 << 20
    async with opened(path, 2) as (journal, restored):
        assert restored == ()
        assert journal.whole


@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_what_is_live_survives_any_number_of_compactions(tmp_path: Path, seed: int) -> None:
    path = tmp_path / "journal.sqlite"
    draw = random.Random(seed)
    told, heard = Told(), Heard()
    async with opened(path, 1, heard, dead_bytes=1 << 13) as (journal, _):
        for number in range(150):
            batches = [told.accept(submit(f"r{number}", n=draw.randint(1, 3), logprobs=draw.choice([-1, -1, 1])))]
            batches += [told.step(draw.randint(1, 4), ending=draw.choice(list(told.requests))) for _ in range(3)]
            if draw.random() < 0.2:
                batches.append(told.rehandle(draw.choice(list(told.requests))))
            while len(told.requests) > 6:
                batches.append(told.forget(draw.choice(list(told.requests))))
            await committed(journal, *batches)
        book = journal._book
        assert book._compaction is not None
        assert book._compaction.rounds > 5
        await until(lambda: not book.busy)
        assert heard.states == []
    async with opened(path, 2) as (journal, restored):
        assert journal.whole
        assert plain(restored) == plain(told.snapshot())


async def test_a_large_journal_is_compacted_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "journal.sqlite"
    told = Told()
    async with opened(path, 1, dead_bytes=1 << 20) as (journal, _):
        await committed(journal, told.accept(*[submit(f"r{number}") for number in range(100)]))
        pieces: list[int] = []
        read_steps = journal._book._store.read_steps  # type: ignore[union-attr]

        def counted(*arguments: object) -> object:
            rows = read_steps(*arguments)  # type: ignore[arg-type]
            pieces.append(sum(row.nbytes for row in rows))
            return rows

        monkeypatch.setattr(journal._book._store, "read_steps", counted)
        for _ in range(10):
            await committed(journal, *[told.step(10) for _ in range(10)])
        await until(lambda: not journal._book.busy)
        assert len(pieces) > 3
        assert max(pieces) < 600 << 10
    async with opened(path, 2) as (_, restored):
        assert plain(restored) == plain(told.snapshot())
