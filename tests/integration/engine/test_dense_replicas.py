"""Engine replicas of a dense model never wait for each other: one that stands still holds up only its own requests."""

from __future__ import annotations

import asyncio
import os
import signal
import time

from drumline.engine.client import AsyncEngine
from drumline.engine.config import EngineConfig, FaultConfig, ParallelConfig
from drumline.engine.sampling_params import SamplingParams
from drumline.protocol.messages import Event
from tests import procfs
from tests.checkpoints import Checkpoints, checkpoints
from tests.integration.engine.processes import running, until, workers
from tests.integration.engine.recovery import WITHIN_S, told_of, whole

__all__ = ["checkpoints"]

DEADLINE_S = 3.0
PROMPT = [5, 17, 200, 31]


async def written(engine: AsyncEngine, replica: int, max_tokens: int, seen: asyncio.Event | None = None) -> list[int]:
    """What ``replica`` writes; ``seen`` is set past the steps that run under a lease."""
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    tokens: list[int] = []
    async for output in engine.generate(PROMPT, params, data_parallel_rank=replica):
        tokens += output.token_ids_delta
        if seen is not None and len(tokens) > 40:
            seen.set()
    return tokens


async def test_a_replica_that_is_stopped_holds_up_no_other(mark: str, checkpoints: Checkpoints) -> None:
    config = EngineConfig(
        str(checkpoints("llama")),
        parallel=ParallelConfig(data_parallel_size=2),
        faults=FaultConfig(step_deadline_s=DEADLINE_S),
    )
    events: list[Event] = []
    async with running(config, events) as engine:
        expected = await written(engine, 0, 60)
        undisturbed = await written(engine, 1, 500)
        caught_up = asyncio.Event()
        stuck = asyncio.create_task(written(engine, 1, 500, caught_up))
        await asyncio.wait_for(caught_up.wait(), 30.0)
        victim = workers(mark)[1]
        os.kill(victim, signal.SIGSTOP)
        stopped_at = time.monotonic()
        await until(lambda: procfs.stat(victim)[0] == "T", 5.0, "the rank was not stopped")
        # What it said before it stopped is read first.
        await asyncio.sleep(0.2)
        before = {group.id: group.step for group in (await engine.status()).groups}
        served = 0
        while time.monotonic() - stopped_at < 0.6 * DEADLINE_S:
            assert await asyncio.wait_for(written(engine, 0, 60), DEADLINE_S) == expected
            served += 1
        after = {group.id: group.step for group in (await engine.status()).groups}
        assert served > 1
        assert after[0] - before[0] >= 60 * served
        assert after[1] == before[1]
        assert not stuck.done()
        assert await asyncio.wait_for(stuck, DEADLINE_S + WITHIN_S) == undisturbed
        status = await whole(engine)
        assert told_of(status, events, 1).kind == "wedged"
        assert status.groups[0].epoch == 1 < status.groups[1].epoch
