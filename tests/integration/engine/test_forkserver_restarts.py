"""The forkserver may die, or be stopped: its workers live on, their ends are told, and others take their place."""

from __future__ import annotations

import asyncio
import os
import signal

import msgspec
import pytest

from drumline.engine.config import FaultConfig, ParallelConfig
from tests.integration.engine.processes import of_module, running, until, workers
from tests.integration.engine.test_coordinator_restarts import Reading, read_all
from tests.integration.engine.test_life import ONE, TWO
from tests.procfs import is_alive

FORKSERVER = "drumline.workers.forkserver"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=lambda number: number.name)
async def test_streams_go_on_without_a_forkserver_and_the_next_one_replaces_workers(
    mark: str, number: signal.Signals
) -> None:
    async with running(msgspec.structs.replace(TWO, faults=FaultConfig(restart_limit=20))) as engine:
        expected = await read_all(engine, 0, 1, 2)
        events = engine.events()
        pids = workers(mark)
        readings = [Reading(engine, seed) for seed in range(3)]
        await readings[0].at(10)
        forkserver = of_module(mark, FORKSERVER)
        os.kill(forkserver, number)
        await readings[0].at(30)
        assert workers(mark) == pids
        os.kill(pids[1], signal.SIGKILL)
        assert [await one.task for one in readings] == expected
        # Without its parent the exit is told by whoever has become that, with the signal.
        told = "signal 9" if number == signal.SIGKILL else "rank 1"
        async with asyncio.timeout(20.0):
            while (event := await anext(events)).kind != "fault" or told not in event.text:
                pass
            while (await anext(events)).kind != "joined":
                pass
        assert not is_alive(forkserver)
        assert workers(mark)[0] == pids[0]
        assert len(workers(mark)) == 2
        assert await read_all(engine, 1) == expected[1:2]


async def test_the_one_worker_of_uni_is_replaced_as_often_as_it_dies(mark: str) -> None:
    parallel = ParallelConfig(distributed_executor_backend="uni")
    async with running(msgspec.structs.replace(ONE, parallel=parallel)) as engine:
        (expected,) = await read_all(engine, 1, length=100)
        for _ in range(2):
            reading = Reading(engine, 1, length=100)
            await reading.at(10)
            (pid,) = workers(mark)
            os.kill(pid, signal.SIGKILL)
            assert await reading.task == expected
            await until(lambda pid=pid: workers(mark) not in ([], [pid]), 5.0, "it was not replaced")  # type: ignore[misc]
