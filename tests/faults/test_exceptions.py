"""What a rank raises in a step, and logits that are no numbers: the epoch ends, the processes stay."""

from __future__ import annotations

import asyncio

import pytest

from drumline.engine.client import AsyncEngine
from drumline.engine.errors import RequestFailed
from drumline.engine.sampling_params import SamplingParams
from drumline.engine.testing import FaultyEngine
from tests.faults.matrix import LAYOUTS
from tests.faults.streams import WITHIN_S, Streams, requests

TWO = LAYOUTS["dp2-ep"]


async def pids(faulty: FaultyEngine) -> list[int]:
    return [rank.pid for rank in (await faulty.engine.status()).ranks]


async def test_an_exception_costs_a_pause_and_a_second_one_soon_after_costs_the_rank_its_place(mark: str) -> None:
    async with FaultyEngine(TWO) as faulty:
        streams = await Streams.learned(faulty.engine)
        first = await pids(faulty)
        async with streams.running():
            await streams.move_on()
            for rank in range(2):
                streams.fault("exception")
                await faulty.crash_in_step(rank)
                await streams.move_on()
                await faulty.until_whole()
                assert await pids(faulty) == first
            streams.fault("second exception")
            await faulty.crash_in_step(1)
            await streams.move_on()
            await faulty.until_whole()
        last = await faulty.engine.status()
        assert last.ranks[0].pid == first[0]
        assert last.ranks[1].pid != first[1]
        assert [rank.restarts for rank in last.ranks] == [0, 1]
        assert [fault.kind for fault in last.faults] == ["exception"] * 3
        assert all("injected fault" in fault.evidence for fault in last.faults)
        assert last.requests.failed == 0
        print("\n" + streams.report("exceptions"))


async def read_long(engine: AsyncEngine, started: asyncio.Event) -> None:
    """A request that takes the first row of replica 1, and more tokens than there is time for."""
    params = SamplingParams(temperature=0.0, max_tokens=1500, ignore_eos=True, detokenize=False)
    async for output in engine.generate([9, 8, 7], params, "spoilt", data_parallel_rank=1):
        if len(output.token_ids) > 3:
            started.set()


async def test_logits_that_are_no_numbers_are_computed_again_and_the_second_time_fail_their_request(mark: str) -> None:
    async with FaultyEngine(TWO) as faulty:
        streams = await Streams.learned(faulty.engine, requests(16))
        first = await pids(faulty)
        started = asyncio.Event()
        spoilt = asyncio.create_task(read_long(faulty.engine, started))
        await asyncio.wait_for(started.wait(), WITHIN_S)
        async with streams.running():
            await streams.move_on()
            await faulty.nan_logits(1)
            await streams.move_on()
            assert not spoilt.done()
            await faulty.nan_logits(1)
            with pytest.raises(RequestFailed) as caught:
                await asyncio.wait_for(spoilt, WITHIN_S)
            await streams.move_on()
        assert caught.value.info.kind == "numeric"
        assert caught.value.rank == 1
        status = await faulty.engine.status()
        assert [rank.pid for rank in status.ranks] == first
        assert status.requests.failed == 1
        assert [(fault.kind, fault.rank) for fault in status.faults] == [("numeric", 1)] * 2
