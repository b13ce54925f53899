"""Streams that run while a rank is lost, and what is told of the loss."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from drumline.engine.client import AsyncEngine
from drumline.engine.sampling_params import SamplingParams
from drumline.protocol.messages import Event
from drumline.protocol.status import EngineStatus, FaultStatus

WITHIN_S = 30.0
TOKENS = 200


async def read(engine: AsyncEngine, number: int, started: asyncio.Event | None = None) -> list[int]:
    """The tokens of stream ``number``, of which every second is sampled; ``started`` is set once it decodes."""
    params = SamplingParams(temperature=0.8 * (number % 2), seed=number, max_tokens=TOKENS, ignore_eos=True)
    tokens: list[int] = []
    async for output in engine.generate(f"The {number}", params):
        tokens += output.token_ids_delta
        if started is not None and len(tokens) > 12:
            started.set()
    return tokens


async def all_of(tasks: Sequence[asyncio.Task[list[int]]]) -> list[list[int]]:
    """What the streams said."""
    return await asyncio.wait_for(asyncio.gather(*tasks), WITHIN_S)


async def undisturbed(engine: AsyncEngine, streams: int) -> list[list[int]]:
    """What the streams say when no rank is lost."""
    return await all_of([asyncio.create_task(read(engine, number)) for number in range(streams)])


async def under_way(engine: AsyncEngine, streams: int) -> list[asyncio.Task[list[int]]]:
    """The same streams, once all of them decode."""
    started = [asyncio.Event() for _ in range(streams)]
    tasks = [asyncio.create_task(read(engine, number, event)) for number, event in enumerate(started)]
    await asyncio.wait_for(asyncio.gather(*(event.wait() for event in started)), WITHIN_S)
    assert not any(task.done() for task in tasks)
    return tasks


async def whole(engine: AsyncEngine) -> EngineStatus:
    """The status once every rank computes."""
    deadline = time.monotonic() + WITHIN_S
    while True:
        status = await engine.status()
        if all(rank.state == "ready" for rank in status.ranks):
            return status
        assert time.monotonic() < deadline, [(rank.rank, rank.state, rank.last_fault) for rank in status.ranks]
        await asyncio.sleep(0.02)


def told_of(status: EngineStatus, events: Sequence[Event], rank: int) -> FaultStatus:
    """The one fault of ``rank`` that the status tells of, as an event does; its group computes again."""
    (fault,) = [one for one in status.faults if one.rank == rank]
    told = [event for event in events if event.kind == "fault" and event.rank == rank]
    assert [(event.incarnation, event.epoch, event.fault) for event in told] == [
        (fault.incarnation, fault.epoch, fault.kind)
    ]
    assert fault.evidence in told[0].text
    assert fault.recovered_s >= 0.0
    return fault
