"""A request that kills whoever computes it fails, alone; whoever was beside it is served."""

from __future__ import annotations

import asyncio

import pytest

from drumline.engine.client import AsyncEngine
from drumline.engine.config import EngineConfig, FaultConfig, ParallelConfig
from drumline.engine.errors import RequestFailed
from drumline.engine.sampling_params import SamplingParams
from drumline.engine.testing import FaultyEngine
from tests.faults.failing_workers import POISON
from tests.faults.streams import Streams, requests

OTHERS = 15
WORKER = "tests.faults.failing_workers.Poisonable"
DEATHS = 8
"""At most: two, and one more for each time that 16 requests and a few that came meanwhile are halved."""


def poisonable(replicas: int) -> EngineConfig:
    parallel = ParallelConfig(data_parallel_size=replicas, enable_expert_parallel=replicas > 1, worker_cls=WORKER)
    return EngineConfig("demo", parallel=parallel, faults=FaultConfig(restart_limit=4 * DEATHS))


async def poisoned(engine: AsyncEngine) -> RequestFailed:
    """How the request ends that kills."""
    try:
        async for _ in engine.generate([5, 6, POISON], SamplingParams(max_tokens=20), request_id="poison"):
            pytest.fail("it was computed")
    except RequestFailed as error:
        return error
    pytest.fail("it ended as if it had been computed")


@pytest.mark.parametrize("replicas", [1, 2])
async def test_only_the_request_that_kills_fails(mark: str, replicas: int) -> None:
    async with FaultyEngine(poisonable(replicas)) as faulty:
        streams = await Streams.learned(faulty.engine, requests(OTHERS, 24))
        said = {token for one in streams.asked for sequence in one.expected for token in sequence.tokens}
        assert POISON not in said | {token for one in streams.asked for token in one.prompt}
        async with streams.running():
            await streams.move_on()
            error = await asyncio.wait_for(poisoned(faulty.engine), 60.0)
            await streams.move_on()
        assert error.info.kind == "poisoned"
        assert "poison" in error.info.text
        await faulty.until_whole()
        status = await faulty.engine.status()
        assert status.requests.failed == 1
        deaths = [fault for fault in status.faults if fault.kind == "exit"]
        assert all("signal 11" in fault.evidence for fault in deaths)
        assert 3 <= len(deaths) <= DEATHS
        assert sum(rank.restarts for rank in status.ranks) == len(deaths)
        (told,) = [event for event in faulty.events if event.kind == "poisoned"]
        assert told.request_ids == ("poison",)
        # The quarantine is over: the replicas are everybody's again.
        async with streams.running():
            await streams.move_on()
        print("\n" + streams.report(f"poison, {replicas} replicas") + f", {len(deaths)} deaths")
