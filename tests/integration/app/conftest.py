"""One engine on the demo model for a whole module, and what the tests wait for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest_asyncio

from drumline.engine import AsyncEngine, CacheConfig, EngineConfig, SchedulerConfig
from drumline.protocol.status import EngineStatus

WITHIN_S = 60.0


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine() -> AsyncIterator[AsyncEngine]:
    config = EngineConfig(
        model="demo",
        max_model_len=128,
        cache=CacheConfig(num_gpu_blocks_override=128),
        scheduler=SchedulerConfig(max_num_seqs=16),
    )
    async with AsyncEngine(config) as running:
        yield running


async def status_when(engine: AsyncEngine, holds: Callable[[EngineStatus], bool]) -> EngineStatus:
    """The first status for which ``holds``; fails after a while with the last one."""
    async with asyncio.timeout(WITHIN_S):
        while True:
            status = await engine.status()
            if holds(status):
                return status
            await asyncio.sleep(0.02)


def idle(status: EngineStatus) -> bool:
    """Nothing runs or waits and every block is free."""
    return all(
        (replica.running, replica.waiting) == (0, 0) and replica.blocks_free == replica.blocks_total
        for replica in status.replicas
    )
