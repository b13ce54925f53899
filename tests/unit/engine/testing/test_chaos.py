"""A run that could not see everything is not reported as a clean one."""

from __future__ import annotations

import asyncio
import os
from types import SimpleNamespace
from typing import Any, cast

import pytest

from drumline.engine.config import EngineConfig
from drumline.engine.testing import chaos
from drumline.engine.testing.chaos import Chaos, ChaosPlan
from drumline.engine.testing.faulty_engine import FaultyEngine
from drumline.engine.testing.load import Load
from drumline.engine.testing.scenario import Scenario, ScheduledFault


class Faulty:
    """As far as a run asks it."""

    engine = property(lambda self: self)

    async def status(self) -> Any:
        return SimpleNamespace(supervisor=SimpleNamespace(pid=os.getpid()), ranks=(0, 1), journal="on")

    async def until_whole(self, seconds: float) -> float:
        return 0.0

    async def kill_coordinator(self) -> None:
        raise RuntimeError("an own mistake")


async def _fail() -> None:
    raise RuntimeError("an own mistake")


async def test_a_load_that_dies_ends_the_run_with_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chaos, "WARM_S", 0.0)
    run = Chaos(EngineConfig(model="demo"), ChaosPlan(0.01))
    faulty = cast(FaultyEngine, Faulty())
    load = Load(faulty.engine, [], lambda stream, at: None)
    running = asyncio.create_task(_fail())
    with pytest.raises(RuntimeError, match="an own mistake"):
        await run._under(faulty, load, running)


async def test_a_scenario_that_dies_ends_the_run_with_its_error() -> None:
    run = Chaos(EngineConfig(model="demo"), ChaosPlan(0.01))
    running = asyncio.create_task(asyncio.sleep(60.0))
    scenario = Scenario("one", (ScheduledFault("coordinator"),))
    try:
        with pytest.raises(ExceptionGroup) as raised:
            await run._play(cast(FaultyEngine, Faulty()), scenario, running)
        assert raised.value.subgroup(RuntimeError) is not None
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
