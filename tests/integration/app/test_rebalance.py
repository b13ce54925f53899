"""An app whose experts move while its requests run."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from drumline.engine import AsyncEngine, EngineConfig, EPLBConfig, ParallelConfig, SamplingParams
from drumline.engine.core.balance.measure import balancedness
from drumline.engine.expert_records import read_load_record
from drumline.engine.first_placement import first_placement, strategy_placement
from drumline.engine.resolve import resolve
from drumline.protocol.messages import Event

PLAN = np.tile([9, *range(1, 16), 0, 4], (4, 1))
"""Of the demo model's 16 experts on two ranks of nine slots: 9 and 4 get the second copies that 0 and 1 began with."""


def config(record: Path, *, inline: bool) -> EngineConfig:
    eplb = EPLBConfig(num_redundant_experts=2, load_interval=4, record_path=str(record))
    parallel = ParallelConfig(data_parallel_size=2, enable_expert_parallel=True, enable_eplb=True, eplb_config=eplb)
    return EngineConfig("demo", parallel=parallel, inline=inline)


async def tokens(engine: AsyncEngine, count: int) -> list[int]:
    params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
    got: list[int] = []
    async for output in engine.generate("Once upon a time", params):
        got = list(output.token_ids)
    return got


@pytest.mark.parametrize("inline", [False, True], ids=["own process", "inline"])
async def test_experts_move_while_requests_run_and_what_was_seen_is_a_start_for_the_next(
    tmp_path: Path, inline: bool
) -> None:
    told: list[Event] = []
    path = tmp_path / "load.npz"
    async with AsyncEngine(config(path, inline=inline), on_event=told.append) as engine:
        before = await tokens(engine, 24)
        running = asyncio.create_task(tokens(engine, 96))
        report = await engine.rebalance_experts(PLAN)
        assert (report.outcome, report.layers) == ("moved", 4)
        assert report.slots_moved == 2 * 4
        assert (await engine.layout()).ranks[0].experts[3] == tuple(range(1, 10))
        async with await AsyncEngine.connect(engine.endpoint) as other:
            record = await other.expert_load()
            np.testing.assert_array_equal(record.physical_to_logical, PLAN)
            again = await other.rebalance_experts()
            assert again.outcome in ("moved", "unchanged")
        assert (await running)[:24] == before
        assert await tokens(engine, 24) == before
        status = (await engine.status()).eplb
        assert status is not None
        assert (status.state, status.plans, status.window_steps > 0) == ("idle", 2, True)
    assert [event.kind for event in told].count("rebalance") == 2
    saved = read_load_record(path)
    parallel = ParallelConfig(
        data_parallel_size=2,
        enable_expert_parallel=True,
        enable_eplb=True,
        eplb_config=EPLBConfig(num_redundant_experts=2, init_placement=str(path)),
    )
    following = resolve(EngineConfig("demo", parallel=parallel))
    started = first_placement(parallel, following.spec, following.layout)
    load, slot_rank = saved.tokens.sum(axis=0), np.repeat([0, 1], 9).astype(np.int32)
    by_strategy = strategy_placement(parallel, following.spec, following.layout)
    assert balancedness(load, started, slot_rank).mean() > balancedness(load, by_strategy, slot_rank).mean()
