"""A rank that dies, hangs or fails ends the engine cleanly, and every client is told which rank and why."""

from __future__ import annotations

import asyncio
import os
import signal
import time

import msgspec
import pytest

from drumline.engine.client import AsyncEngine
from drumline.engine.config import FaultConfig
from drumline.engine.errors import EngineClosed, RequestFailed, StartFailed
from drumline.engine.sampling_params import SamplingParams
from tests.integration.engine.processes import marked, running, until, workers
from tests.integration.engine.test_life import TWO, eight_tokens
from tests.procfs import is_alive

LONG = SamplingParams(temperature=0.8, seed=1, max_tokens=900, ignore_eos=True)


async def read_to_the_end(engine: AsyncEngine, started: asyncio.Event) -> None:
    async for output in engine.generate("The", LONG):
        if len(output.token_ids) > 12:
            started.set()


@pytest.mark.parametrize("rank", [0, 1])
async def test_a_worker_killed_while_it_loads_fails_the_start_by_name(mark: str, rank: int) -> None:
    engine = AsyncEngine(TWO)
    start = asyncio.create_task(engine.start())
    await until(lambda: len(workers(mark)) == 2, 30.0, "no worker was started")
    victim = workers(mark)[rank]
    # Stopped first: it cannot become ready before the kill.
    os.kill(victim, signal.SIGSTOP)
    assert not start.done()
    os.kill(victim, signal.SIGKILL)
    killed_at = time.monotonic()
    with pytest.raises(StartFailed, match=rf"rank {rank} \(pid {victim}\) ended with signal 9") as caught:
        await start
    assert time.monotonic() - killed_at < 5.0
    assert not is_alive(victim)
    assert (caught.value.rank, caught.value.info.kind) == (rank, "start_failed")
    assert marked(mark) == {}


@pytest.mark.parametrize("rank", [0, 1])
async def test_a_worker_killed_while_it_serves_fails_every_request_by_name(mark: str, rank: int) -> None:
    async with running(TWO) as engine:
        status = await engine.status()
        started = [asyncio.Event() for _ in range(6)]
        readers = [asyncio.create_task(read_to_the_end(engine, event)) for event in started]
        await asyncio.wait_for(asyncio.gather(*(event.wait() for event in started)), 30.0)
        victim = workers(mark)[rank]
        os.kill(victim, signal.SIGKILL)
        killed_at = time.monotonic()
        results = await asyncio.gather(*readers, return_exceptions=True)
        assert time.monotonic() - killed_at < 2.0
        assert not is_alive(victim)
        for result in results:
            assert isinstance(result, RequestFailed), result
            assert (result.rank, result.epoch) == (rank, 1)
            assert result.step >= 12
            assert result.incarnation == status.ranks[rank].incarnation
            assert f"rank {rank} (pid {victim}) ended with signal 9" in result.text
        with pytest.raises(EngineClosed, match=f"rank {rank}"):
            await eight_tokens(engine)
        await until(lambda: not marked(mark), 3.0, f"left: {marked(mark)}")


async def test_a_worker_killed_while_idle_refuses_what_comes_next(mark: str) -> None:
    async with running(TWO) as engine:
        os.kill(workers(mark)[1], signal.SIGKILL)
        await until(lambda: not marked(mark), 4.0, f"left: {marked(mark)}")
        with pytest.raises(EngineClosed, match="rank 1"):
            await eight_tokens(engine)


async def test_a_worker_that_is_stopped_in_a_step_is_named_after_its_deadline(mark: str) -> None:
    config = msgspec.structs.replace(TWO, faults=FaultConfig(step_deadline_s=1.0))
    async with running(config) as engine:
        started = asyncio.Event()
        reader = asyncio.create_task(read_to_the_end(engine, started))
        await asyncio.wait_for(started.wait(), 30.0)
        victim = workers(mark)[1]
        os.kill(victim, signal.SIGSTOP)
        stopped_at = time.monotonic()
        with pytest.raises(RequestFailed, match=r"rank 1 .* is furthest behind") as caught:
            await reader
        assert time.monotonic() - stopped_at < 1.0 + 2.0
        assert caught.value.rank == 1
        await until(lambda: not marked(mark), 3.0, f"left: {marked(mark)}")
