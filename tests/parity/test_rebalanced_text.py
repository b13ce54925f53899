"""Experts that move all the time do not change what is written."""

from __future__ import annotations

import asyncio
import os
from functools import cache

import msgspec
import pytest

from drumline.engine import AsyncEngine, EngineConfig, FaultConfig, ParallelConfig, SamplingParams
from drumline.engine.bench.shuffle_prompts import CODE, PROSE
from drumline.engine.config import EPLBConfig
from drumline.engine.testing import Comparison, Sequence, compare
from drumline.engine.testing.shuffling import Shuffling
from tests.integration.engine.conftest import mark, runtime_root

__all__ = ["mark", "runtime_root"]

GREEDY = SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True, logprobs=0)
EPLB = EPLBConfig(num_redundant_experts=4, step_interval=1 << 30, window_size=64, load_interval=8)
LAYOUTS = {
    "dp2-ep": ParallelConfig(data_parallel_size=2),
    "dp4-ep": ParallelConfig(data_parallel_size=4),
    "tp2-dp2-ep": ParallelConfig(tensor_parallel_size=2, data_parallel_size=2),
    "pp2-dp2-ep": ParallelConfig(pipeline_parallel_size=2, data_parallel_size=2),
}
# The suite runs one; `make soak-layouts` all, with DRUMLINE_EVERY_LAYOUT set.
IN_SUITE = ["dp4-ep"]
LEAST_MOVED = 3
"""Rebalances of all layers while the streams run."""


def config(layout: str, balanced: bool) -> EngineConfig:
    more = {"enable_eplb": True, "eplb_config": EPLB} if balanced else {}
    parallel = msgspec.structs.replace(LAYOUTS[layout], enable_expert_parallel=True, **more)
    return EngineConfig("demo", parallel=parallel, faults=FaultConfig(step_deadline_s=60.0))


async def write(engine: AsyncEngine) -> list[Sequence]:
    """All prompts at once."""

    async def one(prompt: str) -> Sequence:
        (last,) = [output async for output in engine.generate(prompt, GREEDY) if output.finished]
        return Sequence.of(last)

    return list(await asyncio.gather(*(one(prompt) for prompt in (*PROSE, *CODE))))


@cache
def _known() -> dict[str, list[Sequence]]:
    return {}


async def at_rest(layout: str) -> list[Sequence]:
    """What an engine writes whose experts stay where they are."""
    known = _known()
    if layout not in known:
        async with AsyncEngine(config(layout, balanced=False)) as engine:
            known[layout] = await write(engine)
    return known[layout]


async def on_the_move(layout: str) -> tuple[list[list[Sequence]], int]:
    """What one writes, again and again until its experts have moved often enough, and how often they have."""
    written: list[list[Sequence]] = []
    async with AsyncEngine(config(layout, balanced=True)) as engine:
        shuffling = await Shuffling.of(engine)
        moving = asyncio.create_task(shuffling.on_and_on())
        try:
            while shuffling.outcomes["moved"] < LEAST_MOVED:
                assert not moving.done(), moving.result()
                written.append(await write(engine))
        finally:
            moving.cancel()
            await asyncio.gather(moving, return_exceptions=True)
        assert not shuffling.refused, shuffling.refused
        status = await engine.status()
        assert status.eplb is not None
        assert all(layer.generation >= LEAST_MOVED for layer in status.eplb.layers)
        assert status.eplb.slots_moved > LEAST_MOVED * len(status.eplb.layers)
    return written, shuffling.outcomes["moved"]


@pytest.mark.parametrize("layout", list(LAYOUTS) if os.environ.get("DRUMLINE_EVERY_LAYOUT") else IN_SUITE)
async def test_greedy_text_is_equal_while_experts_move(mark: str, layout: str) -> None:
    # Layouts are equal among themselves, so that one at rest is enough for all.
    expected = await at_rest("dp2-ep")
    written, moved = await on_the_move(layout)
    found: list[Comparison] = [
        compare(one, other, GREEDY) for texts in written for one, other in zip(expected, texts, strict=True)
    ]
    ties = sum(one.tie for one in found)
    print(f"{layout}: {len(found)} streams, {ties} ties, experts moved {moved} times")
    assert all(one.equal for one in found), [str(one) for one in found if not one.equal]
    assert ties <= 1 + len(found) // 500
