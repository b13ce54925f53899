"""A coordinator that dies, however, is followed by another one: streams go on, and no rank loads anything again."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import msgspec
import pytest

from drumline.engine.client import AsyncEngine
from drumline.engine.config import FaultConfig
from drumline.engine.errors import EngineClosed, RequestFailed
from drumline.engine.sampling_params import SamplingParams
from drumline.protocol.messages import Event
from tests.integration.engine.processes import marked, of_module, running, until, workers
from tests.integration.engine.test_life import ONE, TWO
from tests.procfs import is_alive

COORDINATOR = "drumline.engine.launch.coordinator"
PATIENT = FaultConfig(restart_limit=100)


async def read_all(engine: AsyncEngine, seed: int, request_id: str | None = None, length: int = 300) -> list[int]:
    params = SamplingParams(max_tokens=length, temperature=0.8, seed=seed, ignore_eos=True)
    tokens: list[int] = []
    async for out in engine.generate("The", params, request_id):
        tokens += out.token_ids_delta
    return tokens


async def begun(engine: AsyncEngine) -> None:
    """Something is being computed."""
    while (await engine.status()).groups[0].step < 5:
        await asyncio.sleep(0.02)


@pytest.mark.parametrize("config", [ONE, TWO], ids=["one rank", "two ranks"])
async def test_streams_go_on_over_two_killed_coordinators_and_workers_stay(mark: str, config: object) -> None:
    faults = msgspec.structs.replace(config, faults=PATIENT)  # type: ignore[type-var]
    async with running(faults) as engine:  # type: ignore[arg-type]
        expected = [await read_all(engine, seed) for seed in range(3)]
        pids = workers(mark)
        events = engine.events()
        # Some with an id of the app's, some without: whose client stays, both go on.
        reading = [
            asyncio.create_task(read_all(engine, seed, "mine" if seed == 0 else None)) for seed in range(len(expected))
        ]
        for term in (2, 3):
            await begun(engine)
            killed = of_module(mark, COORDINATOR)
            os.kill(killed, signal.SIGKILL)
            await until(lambda killed=killed: not is_alive(killed), 3.0, "it is still there")  # type: ignore[misc]
            status = await engine.status()
            assert status.term == term
            assert status.coordinator.pid == of_module(mark, COORDINATOR)
            assert engine._local is not None
            assert engine._local.coordinator_pid == status.coordinator.pid
        assert [await one for one in reading] == expected
        assert workers(mark) == pids
        seen = [await anext(events)]
        while seen[-1].term != 3:
            seen.append(await anext(events))
        assert [event.term for event in seen if event.kind == "term"] == [2, 3]


async def test_a_stopped_coordinator_is_killed_and_followed(mark: str) -> None:
    async with running(msgspec.structs.replace(ONE, faults=PATIENT)) as engine:
        expected = await read_all(engine, 1)
        reading = asyncio.create_task(read_all(engine, 1))
        await begun(engine)
        stopped = of_module(mark, COORDINATOR)
        os.kill(stopped, signal.SIGSTOP)
        async with asyncio.timeout(25.0):
            assert await reading == expected
        assert not is_alive(stopped)
        assert (await engine.status()).term == 2


async def test_a_request_with_an_id_of_its_own_is_read_on_by_another_connection(mark: str) -> None:
    async with running(ONE) as engine:
        expected = await read_all(engine, 7)
        params = SamplingParams(max_tokens=300, temperature=0.8, seed=7, ignore_eos=True)
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
        reading = asyncio.create_task(read_all(engine, 1, length=400))
        await begun(engine)
        os.kill(of_module(mark, COORDINATOR), signal.SIGKILL)
        assert (await engine.status()).term == 2
        last = of_module(mark, COORDINATOR)
        os.kill(last, signal.SIGKILL)
        with pytest.raises(EngineClosed, match=rf"coordinator \(pid {last}\) ended with signal 9"):
            await read_all(engine, 2)
        reading.cancel()
        await until(lambda: not marked(mark), 3.0, f"left: {marked(mark)}")
        assert list(runtime_root.iterdir()) == []


async def test_a_coordinator_killed_while_the_engine_starts_is_followed(mark: str) -> None:
    events: list[Event] = []
    engine = AsyncEngine(msgspec.structs.replace(ONE, faults=PATIENT), on_event=events.append)
    starting = asyncio.create_task(engine.start())
    try:
        await until(lambda: any(event.kind == "loading" for event in events), 30.0, "nothing is loaded")
        os.kill(of_module(mark, COORDINATOR), signal.SIGKILL)
        await starting
        assert len(await read_all(engine, 1, length=8)) == 8
        assert (await engine.status()).term == 2
    finally:
        await engine.close()
