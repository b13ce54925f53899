"""A coordinator that dies, however, is followed by another one: streams go on, and no rank loads anything again."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import msgspec
import pytest

from drumline.engine.client import AsyncEngine
from drumline.engine.config import EngineConfig, FaultConfig
from drumline.engine.errors import EngineClosed, RequestFailed
from drumline.engine.sampling_params import SamplingParams
from drumline.protocol.messages import Event
from tests.integration.engine.processes import files_in, marked, of_module, running, until, workers
from tests.integration.engine.test_life import ONE, TWO
from tests.procfs import is_alive

COORDINATOR = "drumline.engine.launch.coordinator"
PATIENT = FaultConfig(restart_limit=100)


class Reading:
    """One request, read by a task of its own; ``tokens`` so far."""

    def __init__(self, engine: AsyncEngine, seed: int, request_id: str | None = None, length: int = 200) -> None:
        self.tokens: list[int] = []
        params = SamplingParams(max_tokens=length, temperature=0.8, seed=seed, ignore_eos=True)
        self._outputs = engine.generate("The", params, request_id)
        self.task = asyncio.create_task(self._read())

    async def _read(self) -> list[int]:
        async for out in self._outputs:
            self.tokens += out.token_ids_delta
        return self.tokens

    async def at(self, position: int) -> None:
        """Returns once so many tokens are there."""
        await until(lambda: len(self.tokens) >= position or self.task.done(), 20.0, "no tokens come")


async def read_all(engine: AsyncEngine, *seeds: int, length: int = 200) -> list[list[int]]:
    """The tokens of a request for each seed."""
    return list(await asyncio.gather(*(Reading(engine, seed, length=length).task for seed in seeds)))


@pytest.mark.parametrize("config", [ONE, TWO], ids=["one rank", "two ranks"])
async def test_streams_go_on_over_two_killed_coordinators_and_workers_stay(mark: str, config: EngineConfig) -> None:
    async with running(msgspec.structs.replace(config, faults=PATIENT)) as engine:
        expected = await read_all(engine, 0, 1, 2)
        pids = workers(mark)
        events = engine.events()
        # Some with an id of the app's, some without: whose client stays, both go on.
        readings = [Reading(engine, seed, "mine" if seed == 0 else None) for seed in range(3)]
        for term, position in ((2, 20), (3, 80)):
            await readings[0].at(position)
            killed = of_module(mark, COORDINATOR)
            os.kill(killed, signal.SIGKILL)
            await until(lambda killed=killed: not is_alive(killed), 3.0, "it is still there")  # type: ignore[misc]
            status = await engine.status()
            assert status.term == term
            assert status.coordinator.pid == of_module(mark, COORDINATOR)
            assert engine._local is not None
            assert engine._local.coordinator_pid == status.coordinator.pid
        assert [await one.task for one in readings] == expected
        assert workers(mark) == pids
        seen = [await anext(events)]
        while seen[-1].term != 3:
            seen.append(await anext(events))
        assert [event.term for event in seen if event.kind == "term"] == [2, 3]


async def test_a_stopped_coordinator_is_killed_and_followed(mark: str) -> None:
    async with running(msgspec.structs.replace(ONE, faults=PATIENT)) as engine:
        (expected,) = await read_all(engine, 1)
        reading = Reading(engine, 1)
        await reading.at(20)
        stopped = of_module(mark, COORDINATOR)
        os.kill(stopped, signal.SIGSTOP)
        async with asyncio.timeout(25.0):
            assert await reading.task == expected
        assert not is_alive(stopped)
        assert (await engine.status()).term == 2


async def test_a_request_with_an_id_of_its_own_is_read_on_by_another_connection(mark: str) -> None:
    async with running(ONE) as engine:
        (expected,) = await read_all(engine, 7)
        params = SamplingParams(max_tokens=200, temperature=0.8, seed=7, ignore_eos=True)
        outputs = engine.generate("The", params, "mine")
        first = await anext(outputs)
        async with await AsyncEngine.connect(engine.endpoint) as other:
            tokens = list(first.token_ids)
            async for out in other.resume("mine", (len(tokens),)):
                tokens += out.token_ids_delta
            assert tokens == expected
            with pytest.raises(RequestFailed, match="newer reader"):
                async for _ in outputs:
                    pass


async def test_coordinators_that_die_too_often_end_the_engine_which_says_so(mark: str, runtime_root: Path) -> None:
    faults = FaultConfig(restart_limit=1)
    async with running(msgspec.structs.replace(ONE, faults=faults)) as engine:
        os.kill(of_module(mark, COORDINATOR), signal.SIGKILL)
        assert (await engine.status()).term == 2
        last = of_module(mark, COORDINATOR)
        os.kill(last, signal.SIGKILL)
        with pytest.raises(EngineClosed, match=rf"coordinator \(pid {last}\) ended with signal 9"):
            await read_all(engine, 2)
        await until(lambda: not marked(mark), 3.0, f"left: {marked(mark)}")
        assert files_in(runtime_root) == []


async def test_a_coordinator_killed_while_the_engine_starts_is_followed(mark: str) -> None:
    events: list[Event] = []
    engine = AsyncEngine(msgspec.structs.replace(ONE, faults=PATIENT), on_event=events.append)
    starting = asyncio.create_task(engine.start())
    try:
        await until(lambda: any(event.kind == "loading" for event in events), 30.0, "nothing is loaded")
        os.kill(of_module(mark, COORDINATOR), signal.SIGKILL)
        await starting
        assert [len(tokens) for tokens in await read_all(engine, 1, length=8)] == [8]
        assert (await engine.status()).term == 2
    finally:
        await engine.close()
