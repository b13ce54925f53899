"""A rank that is stopped: streams go on after its deadline, not when it wakes, and what wakes has no place any more."""

from __future__ import annotations

import asyncio
import os
import signal
import time

import msgspec
import pytest

from drumline.engine.config import FaultConfig
from drumline.engine.testing import FaultyEngine
from tests.faults.matrix import LAYOUTS
from tests.faults.streams import Streams
from tests.integration.engine.processes import until
from tests.integration.engine.recovery import whole
from tests.integration.engine.test_backends import EXTERNAL, Job, job, run_with
from tests.procfs import is_alive, stat

__all__ = ["job"]

DEADLINE_S = 1.5
ASLEEP_S = 6.0
FAULTS = FaultConfig(step_deadline_s=DEADLINE_S, restart_limit=1000)
TWO = msgspec.structs.replace(LAYOUTS["dp2-ep"], faults=FAULTS)
JOB = msgspec.structs.replace(EXTERNAL, faults=FAULTS)


async def sleep_through(faulty: FaultyEngine, streams: Streams, rank: int, seconds: float, at: str | None) -> float:
    """Stop ``rank`` for ``seconds``, now or at a point; returns how soon all streams had moved on."""
    before = (await faulty.engine.status()).ranks[rank]
    stopped = await faulty.pause(rank, seconds, at=at)
    streams.fault("stopped")
    await streams.move_on()
    took = time.monotonic() - stopped.at
    await faulty.until_whole()
    status = await faulty.engine.status()
    assert status.ranks[rank].incarnation != before.incarnation
    assert not is_alive(before.pid), "the sleeper was left alive"
    assert [fault.kind for fault in status.faults if fault.incarnation == before.incarnation] == ["wedged"]
    return took


async def sleep_idle(faulty: FaultyEngine, streams: Streams, rank: int, seconds: float) -> float:
    """Stop ``rank`` while nothing runs; returns how soon streams that come then had moved on."""
    before = (await faulty.engine.status()).ranks[rank]
    stopped = await faulty.pause(rank, seconds, at="idle")
    async with streams.running():
        streams.fault("stopped")
        await streams.move_on()
        took = time.monotonic() - stopped.at
        await faulty.until_whole()
    assert not is_alive(before.pid), "the sleeper was left alive"
    return took


async def sleep_after_a_death(
    faulty: FaultyEngine, streams: Streams, rank: int, seconds: float, at: str | None
) -> float:
    """Stop ``rank`` at a point that a death brings about: the other rank's for a regroup, its own for the life of its
    replacement. Returns how soon all streams had moved on."""
    order = asyncio.create_task(faulty.pause(rank, seconds, at=at))
    await asyncio.sleep(0.05)
    await faulty.kill(1 - rank if at == "regroup" else rank)
    stopped = await order
    streams.fault("stopped")
    await streams.move_on()
    took = time.monotonic() - stopped.at
    await faulty.until_whole()
    assert not is_alive(stopped.pid), "the sleeper was left alive"
    return took


@pytest.mark.parametrize(("rank", "at"), [(0, "decode"), (1, None)])
async def test_streams_go_on_at_the_deadline_of_a_stopped_rank(mark: str, rank: int, at: str | None) -> None:
    async with FaultyEngine(TWO) as faulty:
        streams = await Streams.learned(faulty.engine)
        async with streams.running():
            await streams.move_on()
            assert await sleep_through(faulty, streams, rank, ASLEEP_S, at) < ASLEEP_S - 1.0
        print("\n" + streams.report("stopped"))


async def test_a_rank_of_somebody_else_that_wakes_is_told_that_its_place_is_taken_and_ends(mark: str, job: Job) -> None:
    async with run_with(JOB, job) as engine:
        streams = await Streams.learned(engine)
        sleeper = job.ranks[1]
        async with streams.running():
            await streams.move_on()
            os.kill(sleeper.pid, signal.SIGSTOP)
            await until(lambda: stat(sleeper.pid)[0] == "T", 5.0, "rank 1 did not stop")
            streams.fault("stopped")
            await until(lambda: any(event.fault == "wedged" for event in job.events), 20.0, "nobody missed rank 1")
            await streams.move_on()
            # Nobody here may kill what somebody else has started.
            assert stat(sleeper.pid)[0] == "T"
            job.ranks[1] = job.start_another(1)
            status = await whole(engine)
            assert status.ranks[1].pid == job.ranks[1].pid
            os.kill(sleeper.pid, signal.SIGCONT)
            assert await asyncio.to_thread(sleeper.wait, 10.0) == 0
            await streams.move_on()
        assert (await engine.status()).ranks[1].pid == job.ranks[1].pid
        print("\n" + streams.report("job"))
    assert job.exit_codes() == [0, 0]
