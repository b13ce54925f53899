"""The coordinator is killed: the ranks keep what they have, every stream goes on."""

from __future__ import annotations

import asyncio

from drumline.engine.testing import FaultyEngine
from tests.faults.matrix import LAYOUTS
from tests.faults.streams import Streams

TIMES = 2
SOON_S = 0.02
"""After the kill of a rank: its group has not come together again by then."""


async def kill_coordinators(faulty: FaultyEngine, streams: Streams, times: int) -> None:
    """One after the other, under load; nobody else is replaced."""
    pids = [rank.pid for rank in (await faulty.engine.status()).ranks]
    for _ in range(times):
        before = await faulty.engine.status()
        streams.fault("coordinator")
        await faulty.kill_coordinator()
        await streams.move_on()
        await faulty.until_whole()
        after = await faulty.engine.status()
        assert after.term > before.term
        assert after.coordinator.pid != before.coordinator.pid
        assert [rank.pid for rank in after.ranks] == pids
        assert after.requests.failed == after.requests.cancelled == 0


async def kill_rank_and_coordinator(faulty: FaultyEngine, streams: Streams, rank: int) -> None:
    """A rank, and the coordinator while the others come together without it."""
    before = await faulty.engine.status()
    streams.fault("rank and coordinator")
    await faulty.kill(rank)
    await asyncio.sleep(SOON_S)
    await faulty.kill_coordinator()
    await streams.move_on()
    await faulty.until_whole()
    after = await faulty.engine.status()
    assert after.term > before.term
    for old, new in zip(before.ranks, after.ranks, strict=True):
        assert (old.pid == new.pid) == (old.rank != rank)


async def test_streams_go_on_with_the_next_coordinator(mark: str) -> None:
    async with FaultyEngine(LAYOUTS["dp2-ep"]) as faulty:
        streams = await Streams.learned(faulty.engine)
        async with streams.running():
            await streams.move_on()
            await kill_coordinators(faulty, streams, TIMES)
            await kill_rank_and_coordinator(faulty, streams, 1)
        print("\n" + streams.report("coordinator"))
