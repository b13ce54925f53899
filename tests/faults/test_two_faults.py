"""Two faults at once."""

from __future__ import annotations

import asyncio

from drumline.engine.testing import FaultyEngine
from tests.faults.matrix import LAYOUTS
from tests.faults.streams import Streams


async def test_streams_go_on_when_two_ranks_are_killed_at_once(mark: str) -> None:
    async with FaultyEngine(LAYOUTS["dp4-ep"]) as faulty:
        streams = await Streams.learned(faulty.engine)
        before = await faulty.engine.status()
        async with streams.running():
            await streams.move_on()
            streams.fault("two ranks")
            await asyncio.gather(faulty.kill(1), faulty.kill(2))
            await streams.move_on()
            await faulty.until_whole()
        after = await faulty.engine.status()
        assert [rank.restarts for rank in after.ranks] == [0, 1, 1, 0]
        for rank in (0, 3):
            assert after.ranks[rank].pid == before.ranks[rank].pid
        print("\n" + streams.report("two of four"))
