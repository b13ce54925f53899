"""A rank that dies or hangs is replaced, by name; what was running goes on as if nothing had happened."""

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
from drumline.protocol.messages import Event
from tests.integration.engine.processes import marked, running, until, workers
from tests.integration.engine.recovery import all_of, told_of, under_way, undisturbed, whole
from tests.integration.engine.test_life import ONE, TWO, eight_tokens
from tests.procfs import is_alive

STREAMS = 6
NO_RESTARTS = FaultConfig(restart_limit=0)


async def kill_while_loading(engine: AsyncEngine, mark: str, rank: int) -> tuple[asyncio.Task[None], int]:
    """The start that is under way and the pid of the rank, which is gone."""
    start = asyncio.create_task(engine.start())
    await until(lambda: len(workers(mark)) == 2, 30.0, "no worker was started")
    victim = workers(mark)[rank]
    # Stopped first: it cannot become ready before the kill.
    os.kill(victim, signal.SIGSTOP)
    assert not start.done()
    os.kill(victim, signal.SIGKILL)
    return start, victim


async def test_a_worker_killed_while_it_loads_is_started_again(mark: str) -> None:
    engine = AsyncEngine(TWO)
    start, victim = await kill_while_loading(engine, mark, 0)
    try:
        await asyncio.wait_for(start, 30.0)
        assert len(await eight_tokens(engine)) == 8
        status = await engine.status()
        assert [rank.restarts for rank in status.ranks] == [1, 0]
        assert f"(pid {victim}) ended with signal 9" in status.ranks[0].last_fault
        assert not is_alive(victim)
    finally:
        await engine.close()


async def test_a_worker_killed_while_it_loads_and_not_to_be_started_again_fails_the_start_by_name(mark: str) -> None:
    engine = AsyncEngine(msgspec.structs.replace(TWO, faults=NO_RESTARTS))
    start, victim = await kill_while_loading(engine, mark, 1)
    with pytest.raises(StartFailed, match=rf"rank 1 \(pid {victim}\) ended with signal 9") as caught:
        await asyncio.wait_for(start, 30.0)
    assert caught.value.rank == 1
    assert marked(mark) == {}


async def test_streams_go_on_when_one_worker_after_the_other_is_killed(mark: str) -> None:
    events: list[Event] = []
    async with running(TWO, events) as engine:
        expected = await undisturbed(engine, STREAMS)
        for rank in range(2):
            before = await whole(engine)
            streams = await under_way(engine, STREAMS)
            victim = workers(mark)[rank]
            os.kill(victim, signal.SIGKILL)
            assert await all_of(streams) == expected
            assert not is_alive(victim)
            after = await whole(engine)
            fault = told_of(after, events, rank)
            assert (fault.kind, fault.epoch) == ("exit", before.groups[0].epoch)
            assert fault.incarnation == before.ranks[rank].incarnation != after.ranks[rank].incarnation
            assert fault.step >= 12
            assert f"rank {rank} (pid {victim}) ended with signal 9" in fault.evidence
            assert after.ranks[1 - rank].pid == before.ranks[1 - rank].pid
        assert [rank.restarts for rank in after.ranks] == [1, 1]
        assert (after.requests.finished, after.requests.failed) == (3 * STREAMS, 0)
        kinds = [event.kind for event in events if event.kind in ("fault", "recovered", "respawn", "joined")]
        assert sorted(kinds) == sorted(["fault", "recovered", "respawn", "joined"] * 2)


async def test_what_comes_after_a_worker_was_killed_while_idle_is_served(mark: str) -> None:
    """Here the coordinator runs in the app's loop."""
    events: list[Event] = []
    async with running(msgspec.structs.replace(TWO, inline=True), events) as engine:
        expected = await eight_tokens(engine)
        os.kill(workers(mark)[1], signal.SIGKILL)
        assert await eight_tokens(engine) == expected
        told_of(await whole(engine), events, 1)
        assert await eight_tokens(engine) == expected


async def test_streams_go_on_after_the_deadline_of_a_worker_that_is_stopped_in_a_step(mark: str) -> None:
    events: list[Event] = []
    async with running(msgspec.structs.replace(TWO, faults=FaultConfig(step_deadline_s=1.0)), events) as engine:
        expected = await undisturbed(engine, STREAMS)
        streams = await under_way(engine, STREAMS)
        victim = workers(mark)[1]
        os.kill(victim, signal.SIGSTOP)
        stopped_at = time.monotonic()
        await until(lambda: any(event.kind == "recovered" for event in events), 10.0, f"told: {events}")
        assert time.monotonic() - stopped_at < 1.0 + 2.0
        assert await all_of(streams) == expected
        fault = told_of(await whole(engine), events, 1)
        assert fault.kind == "wedged"
        assert f"rank 1 (pid {victim}) is furthest behind" in fault.evidence
        # Nobody waits for it to wake.
        assert not is_alive(victim)


async def test_an_engine_that_cannot_replace_its_only_rank_ends_with_an_error_that_names_it(mark: str) -> None:
    async with running(msgspec.structs.replace(ONE, faults=NO_RESTARTS)) as engine:
        streams = await under_way(engine, 3)
        (victim,) = workers(mark)
        os.kill(victim, signal.SIGKILL)
        for result in await asyncio.wait_for(asyncio.gather(*streams, return_exceptions=True), 10.0):
            assert isinstance(result, RequestFailed), result
            assert result.rank == 0
            assert f"rank 0 (pid {victim}) ended with signal 9" in result.text
        with pytest.raises(EngineClosed, match=f"pid {victim}"):
            await eight_tokens(engine)
        await until(lambda: not marked(mark), 4.0, f"left: {marked(mark)}")
