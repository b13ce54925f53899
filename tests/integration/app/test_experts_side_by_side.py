"""An app on two replicas with expert parallelism."""

import asyncio
from typing import Any

import pytest

from drumline.engine import AsyncEngine, EngineConfig, ParallelConfig, SamplingParams
from tests.integration.app.conftest import WITHIN_S, idle, status_when


async def texts(config: EngineConfig, params: SamplingParams) -> dict[tuple[str, int], list[int]]:
    async def one(engine: AsyncEngine, name: str) -> dict[tuple[str, int], list[int]]:
        prompt = f"Return the {name}"
        return {
            (name, out.index): out.token_ids
            async for out in engine.generate(prompt, params, request_id=name)
            if out.finished
        }

    async with asyncio.timeout(WITHIN_S), AsyncEngine(config) as engine:
        found = await asyncio.gather(*(one(engine, name) for name in ("list", "name", "value")))
        await status_when(engine, idle)
        return {key: ids for part in found for key, ids in part.items()}


@pytest.mark.timeout(180)
async def test_sampled_output_is_the_same_on_one_rank_and_on_two() -> None:
    params = SamplingParams(n=2, temperature=0.8, seed=5, max_tokens=12)
    both: list[Any] = [
        await texts(EngineConfig("demo", parallel=parallel), params)
        for parallel in (ParallelConfig(), ParallelConfig(2, enable_expert_parallel=True))
    ]
    assert len(both[0]) == 6
    assert both[0] == both[1]
