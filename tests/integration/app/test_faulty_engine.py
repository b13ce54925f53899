"""The public fault module on a real engine: what it does is seen to happen, and what cannot happen raises."""

from __future__ import annotations

import asyncio

import pytest

from drumline.engine import EngineConfig, ParallelConfig, SamplingParams
from drumline.engine.errors import InvalidRequest
from drumline.engine.testing import FaultyEngine, InjectionFailed, Scenario, ScheduledFault, Sequence, compare
from tests.integration.engine.conftest import mark, runtime_root
from tests.procfs import is_alive
from tests.scenarios import ASLEEP, FOUR_AT_ONCE

__all__ = ["mark", "runtime_root"]

TWO = EngineConfig("demo", parallel=ParallelConfig(data_parallel_size=2, enable_expert_parallel=True))
PARAMS = [
    SamplingParams(temperature=temperature, seed=number, max_tokens=120, ignore_eos=True, logprobs=0)
    for number, temperature in enumerate((0.0, 0.8))
]


async def read(faulty: FaultyEngine, params: SamplingParams, begun: asyncio.Event | None = None) -> Sequence:
    output = None
    async for output in faulty.engine.generate("The", params):
        if begun is not None and len(output.token_ids) > 3:
            begun.set()
    assert output is not None
    return Sequence.of(output)


async def read_under(faulty: FaultyEngine, scenario: Scenario) -> list[Sequence]:
    """Both streams, with the scenario from when both run."""
    begun = [asyncio.Event() for _ in PARAMS]
    reading = [asyncio.create_task(read(faulty, *pair)) for pair in zip(PARAMS, begun, strict=True)]
    for event in begun:
        await event.wait()
    await faulty.play(scenario)
    return await asyncio.gather(*reading)


async def test_streams_are_equal_after_a_scenario_whose_every_fault_was_seen(mark: str) -> None:
    async with FaultyEngine(TWO) as faulty:
        expected = [await read(faulty, params) for params in PARAMS]
        before = await faulty.engine.status()
        found = await read_under(faulty, FOUR_AT_ONCE)
        for params, one, other in zip(PARAMS, expected, found, strict=True):
            assert compare(one, other, params).equal
        assert sorted(fault.kind for fault in faulty.injected) == ["coordinator", "duplicate", "kill", "partition"]
        killed = {fault.kind: fault.pid for fault in faulty.injected}
        assert killed["kill"] == before.ranks[1].pid
        assert killed["coordinator"] == before.coordinator.pid
        assert not is_alive(killed["kill"])
        await faulty.until_whole()
        after = await faulty.engine.status()
        assert (after.term, after.ranks[0].pid) == (before.term + 1, before.ranks[0].pid)


async def test_what_cannot_or_does_not_happen_raises_and_is_not_recorded(mark: str) -> None:
    async with FaultyEngine(TWO, timeout_s=0.5) as faulty:
        with pytest.raises(InjectionFailed, match="rank 2 does not exist; the engine has ranks 0 to 1"):
            await faulty.kill(2)
        with pytest.raises(InjectionFailed, match=r"rank 1 did not come to 'prefill' for 'kill' within 0\.5 s"):
            await faulty.kill(1, at="prefill")
        with pytest.raises(InjectionFailed, match=r"drop: no Step \(to_worker\) of ranks \[0\] came by"):
            await faulty.drop(["Step"], [0], direction="to_worker", lasting_s=0.4)
        with pytest.raises(InjectionFailed, match="scenario 'nobody there': rank 7 does not exist"):
            await faulty.play(Scenario("nobody there", (ScheduledFault("kill", rank=7),)))
        with pytest.raises(InvalidRequest, match="at: found lunch; valid: None"):
            await faulty.kill(0, at="lunch")
        assert faulty.injected == []
        # The order that was given up does not happen later.
        await asyncio.gather(*(read(faulty, params) for params in PARAMS))
        assert all(rank.restarts == 0 for rank in (await faulty.engine.status()).ranks)


async def test_a_stopped_rank_is_replaced_and_the_sleeper_woken_at_the_end(mark: str) -> None:
    async with FaultyEngine(TWO) as faulty:
        expected = [await read(faulty, params) for params in PARAMS]
        found = await read_under(faulty, ASLEEP)
        for params, one, other in zip(PARAMS, expected, found, strict=True):
            assert compare(one, other, params).equal
        (stopped,) = faulty.injected
        assert (stopped.kind, stopped.rank) == ("stop", 0)
        await faulty.until_whole()
        assert (await faulty.engine.status()).ranks[0].pid != stopped.pid
        assert not is_alive(stopped.pid)
