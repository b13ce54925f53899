"""A rank that cannot be had, and experts that the survivors have no room for."""

from __future__ import annotations

import asyncio

import msgspec

from drumline.engine.config import FaultConfig
from drumline.engine.testing import FaultyEngine
from tests.faults.matrix import LAYOUTS
from tests.faults.streams import Streams
from tests.integration.engine.processes import until

LIMIT = 2


async def test_who_dies_at_every_start_is_not_started_again_and_the_others_serve(mark: str) -> None:
    config = msgspec.structs.replace(LAYOUTS["dp2-ep"], faults=FaultConfig(restart_limit=LIMIT))
    async with FaultyEngine(config) as faulty:
        streams = await Streams.learned(faulty.engine)
        async with streams.running():
            await streams.move_on()
            loading = [asyncio.create_task(faulty.kill(1, at="loading")) for _ in range(LIMIT)]
            await asyncio.sleep(0.05)
            await faulty.kill(1)
            await asyncio.gather(*loading)
            await until(lambda: any(one.kind == "crash_loop" for one in faulty.events), 10.0, "no crash loop is told")
            await streams.move_on()
            # Long enough for one more start.
            await asyncio.sleep(1.5)
            await streams.move_on()
        (told,) = [one for one in faulty.events if one.kind == "crash_loop"]
        assert (told.rank, told.total) == (1, LIMIT)
        assert "ended with signal 9" in told.text
        status = await faulty.engine.status()
        assert status.state == "ready"
        assert [(rank.state, rank.restarts) for rank in status.ranks] == [("ready", 0), ("dead", LIMIT)]
        assert len(faulty.injected) == LIMIT + 1
        assert status.requests.failed == 0


async def test_requests_wait_for_the_replacement_when_the_survivors_have_no_room_for_its_experts(mark: str) -> None:
    faults = FaultConfig(expert_growth_bytes=0, restart_limit=1000)
    async with FaultyEngine(msgspec.structs.replace(LAYOUTS["dp2-ep"], faults=faults)) as faulty:
        streams = await Streams.learned(faulty.engine)
        async with streams.running():
            await streams.move_on()
            # The first replacement dies, too: there is time to look.
            loading = asyncio.create_task(faulty.kill(1, at="loading"))
            await asyncio.sleep(0.05)
            await faulty.kill(1)
            await loading
            status = await faulty.engine.status()
            assert status.state == "recovering"
            assert "group 0 waits for rank 1 (not started)" in status.waiting_for
            assert "expert" in status.waiting_for
            assert status.ranks[0].state == "parked"
            await faulty.until_whole()
            await streams.move_on()
        status = await faulty.engine.status()
        assert status.waiting_for == ""
        assert [rank.restarts for rank in status.ranks] == [0, 2]
