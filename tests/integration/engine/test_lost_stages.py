"""Two stages of two ranks: whichever rank is lost or fails is named, and all come out and go on."""

from __future__ import annotations

import os
import signal

import pytest

from drumline.engine import EngineConfig, FaultConfig, ParallelConfig
from drumline.engine.errors import RequestFailed
from drumline.protocol.messages import Event
from tests.integration.engine.processes import running, workers
from tests.integration.engine.recovery import all_of, told_of, under_way, undisturbed, whole

STAGES = EngineConfig(
    "demo",
    parallel=ParallelConfig(
        tensor_parallel_size=2,
        pipeline_parallel_size=2,
        worker_extension_cls="tests.integration.engine.failing_ranks.Saboteur",
    ),
    faults=FaultConfig(step_deadline_s=1.0),
)
STREAMS = 5


async def test_streams_go_on_when_a_rank_of_either_stage_is_killed_or_stopped(mark: str) -> None:
    events: list[Event] = []
    async with running(STAGES, events) as engine:
        assert len(workers(mark)) == 4
        expected = await undisturbed(engine, STREAMS)
        for rank, number, kind, text in (
            (2, signal.SIGKILL, "exit", "ended with signal 9"),
            (1, signal.SIGSTOP, "wedged", "is furthest behind"),
        ):
            before = await whole(engine)
            streams = await under_way(engine, STREAMS)
            os.kill(workers(mark)[rank], number)
            assert await all_of(streams) == expected
            after = await whole(engine)
            fault = told_of(after, events, rank)
            assert fault.kind == kind
            assert text in fault.evidence
            # The siblings of a replaced rank keep their weights.
            assert [one.pid != other.pid for one, other in zip(before.ranks, after.ranks, strict=True)] == [
                number == rank for number in range(4)
            ]


async def test_a_rank_whose_steps_raise_is_replaced_at_the_second_exception(mark: str) -> None:
    events: list[Event] = []
    async with running(STAGES, events) as engine:
        expected = await undisturbed(engine, STREAMS)
        streams = await under_way(engine, STREAMS)
        await engine.collective_rpc("raise_in_steps", (1,))
        assert await all_of(streams) == expected
        status = await whole(engine)
        assert [(fault.rank, fault.kind) for fault in status.faults] == [(1, "exception")] * 2
        assert all("LookupError: rank 1 was told to" in fault.evidence for fault in status.faults)
        assert [rank.restarts for rank in status.ranks] == [0, 1, 0, 0]


async def test_requests_that_are_nan_twice_fail_as_numeric_and_no_rank_is_blamed(mark: str) -> None:
    events: list[Event] = []
    async with running(STAGES, events) as engine:
        streams = await under_way(engine, 2)
        await engine.collective_rpc("poison_weights", (3,))
        for stream in streams:
            with pytest.raises(RequestFailed, match="NaN or infinite") as caught:
                await all_of([stream])
            assert caught.value.info.kind == "numeric"
        status = await whole(engine)
        # What one of them makes is in the sums of both: either may tell first.
        assert {(fault.rank, fault.kind) for fault in status.faults} <= {(2, "numeric"), (3, "numeric")}
        assert [rank.restarts for rank in status.ranks] == [0] * 4
