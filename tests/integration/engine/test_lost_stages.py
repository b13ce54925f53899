"""Two stages of two ranks: whichever rank is lost or fails, all get out and that one is named."""

from __future__ import annotations

import asyncio
import os
import signal
import time

import pytest

from drumline.engine import AsyncEngine, EngineConfig, FaultConfig, ParallelConfig, SamplingParams
from drumline.engine.errors import EngineClosed, RequestFailed
from tests.integration.engine.processes import marked, running, until, workers
from tests.integration.engine.test_life import eight_tokens

STAGES = EngineConfig(
    "demo",
    parallel=ParallelConfig(
        tensor_parallel_size=2,
        pipeline_parallel_size=2,
        worker_extension_cls="tests.integration.engine.failing_ranks.Saboteur",
    ),
    faults=FaultConfig(step_deadline_s=1.0),
)
REQUESTS = 5


async def read(engine: AsyncEngine, number: int, started: asyncio.Event) -> None:
    params = SamplingParams(temperature=0.8, seed=number, max_tokens=900, ignore_eos=True)
    async for output in engine.generate("The", params):
        if len(output.token_ids) > 6:
            started.set()


async def lose(engine: AsyncEngine, mark: str, how: str, rank: int) -> tuple[list[object], float]:
    """Requests that are running when ``rank`` is lost: what became of each, and after how long."""
    started = [asyncio.Event() for _ in range(REQUESTS)]
    readers = [asyncio.create_task(read(engine, number, event)) for number, event in enumerate(started)]
    await asyncio.wait_for(asyncio.gather(*(event.wait() for event in started)), 30.0)
    lost_at = time.monotonic()
    if how in ("kill", "stop"):
        os.kill(workers(mark)[rank], signal.SIGKILL if how == "kill" else signal.SIGSTOP)
    else:
        await engine.collective_rpc(how, (rank,))
    results = await asyncio.wait_for(asyncio.gather(*readers, return_exceptions=True), 30.0)
    return list(results), time.monotonic() - lost_at


@pytest.mark.parametrize(
    ("how", "rank", "blamed", "text", "within_s"),
    [
        ("kill", 2, {2}, "ended with signal 9", 2.0),
        ("stop", 3, {3}, "is furthest behind", 4.0),
        ("raise_in_steps", 1, {1}, "LookupError: rank 1 was told to", 2.0),
        # What one of them makes is in the sums of both: either may tell first.
        ("poison_weights", 3, {2, 3}, "hidden states are NaN or infinite in rows", 2.0),
    ],
)
async def test_every_rank_gets_out_and_the_one_that_failed_is_named(
    mark: str, how: str, rank: int, blamed: set[int], text: str, within_s: float
) -> None:
    async with running(STAGES) as engine:
        assert len(workers(mark)) == 4
        results, seconds = await lose(engine, mark, how, rank)
        assert seconds < within_s
        for result in results:
            assert isinstance(result, RequestFailed), result
            assert result.rank in blamed
            assert text in result.text
        with pytest.raises(EngineClosed, match=text):
            await eight_tokens(engine)
        await until(lambda: not marked(mark), 3.0, f"left: {marked(mark)}")
