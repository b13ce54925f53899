"""An engine starts, serves, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from pathlib import Path

import msgspec
import pytest

from drumline.engine.client import AsyncEngine
from drumline.engine.config import EngineConfig, ParallelConfig
from drumline.engine.errors import EngineClosed, InvalidConfig, StartFailed
from drumline.engine.resolve import model_folder
from drumline.engine.sampling_params import SamplingParams
from drumline.protocol.messages import Event
from drumline.protocol.status import EngineStatus
from tests.integration.engine.processes import files_in, marked, of_module, running, wait_all_gone, workers
from tests.procfs import session

ONE = EngineConfig("demo")
TWO = EngineConfig("demo", parallel=ParallelConfig(data_parallel_size=2, enable_expert_parallel=True))
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)


async def eight_tokens(engine: AsyncEngine, prompt: str = "Return the", max_tokens: int = 8) -> list[int]:
    tokens: list[int] = []
    async for output in engine.generate(prompt, msgspec.structs.replace(GREEDY, max_tokens=max_tokens)):
        tokens = list(output.token_ids)
    return tokens


@pytest.mark.parametrize("config", [ONE, TWO], ids=["one rank", "two ranks"])
async def test_start_serve_and_close_leave_no_process_no_file_and_no_complaint(
    config: EngineConfig, mark: str, runtime_root: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    events: list[Event] = []
    async with running(config, events) as engine:
        assert len(await eight_tokens(engine)) == 8
        ranks = config.parallel.data_parallel_size
        assert len(workers(mark)) == ranks
        assert len(marked(mark)) == ranks + 3
        assert len(files_in(runtime_root)) == 1
        unfinished = asyncio.create_task(eight_tokens(engine, max_tokens=900))
        await asyncio.sleep(0.1)
    with pytest.raises(EngineClosed):
        await unfinished
    wait_all_gone(mark, runtime_root, 0.5)
    assert {"starting", "loading", "ready"} <= {event.kind for event in events}
    complaints = [line for line in capfd.readouterr().err.splitlines() if " INFO " not in line]
    assert complaints == []


async def test_the_coordinator_runs_in_the_apps_loop_when_told_to(mark: str) -> None:
    async with running(msgspec.structs.replace(TWO, inline=True)) as engine:
        inline = await eight_tokens(engine)
        assert not any("drumline.engine.launch.coordinator" in command for command in marked(mark).values())
    async with running(TWO) as engine:
        assert await eight_tokens(engine) == inline


async def test_the_status_shows_every_process_and_every_part(mark: str) -> None:
    async with running(TWO) as engine:
        await eight_tokens(engine)
        status: EngineStatus = await engine.status()
        assert (status.state, status.term, status.journal) == ("ready", 1, "on")
        assert status.supervisor.pid == of_module(mark, "drumline.engine.supervisor")
        assert status.coordinator.pid == of_module(mark, "drumline.engine.launch.coordinator")
        assert [rank.pid for rank in status.ranks] == workers(mark)
        assert [(rank.rank, rank.dp_rank, rank.ep_rank, rank.state) for rank in status.ranks] == [
            (0, 0, 0, "ready"),
            (1, 1, 1, "ready"),
        ]
        (group,) = status.groups
        assert (group.replicas, group.epoch, group.wave_state) == ((0, 1), 1, "paused")
        assert len(status.replicas) == 2
        assert all(replica.blocks_free == replica.blocks_total > 0 for replica in status.replicas)
        assert (status.requests.accepted, status.requests.finished) == (1, 1)
        assert status.counters["client_frames_malformed"] == 0
        assert status.counters["worker_frames_received"] > 0
        shown = json.loads(msgspec.json.encode(status))
        assert [set(entry) >= {"rank", "pid"} for entry in shown["ranks"]] == [True, True]


async def test_no_process_is_started_for_a_folder_that_is_broken(mark: str, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(model_folder("demo"), copy)
    with (copy / "model.safetensors").open("r+b") as file:
        file.truncate(10_000)
    with pytest.raises(InvalidConfig, match="cut short"):
        await AsyncEngine(EngineConfig(str(copy))).start()
    assert marked(mark) == {}


async def test_what_a_worker_cannot_load_fails_the_start_in_its_own_words(mark: str, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(model_folder("demo"), copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"intermediate_size": 128, "moe_intermediate_size": 32}))
    with pytest.raises(StartFailed) as caught:
        await AsyncEngine(msgspec.structs.replace(TWO, model=str(copy))).start()
    assert caught.value.rank in (0, 1)
    assert "mlp" in caught.value.text
    assert "Traceback" in caught.value.traceback


async def test_a_worker_without_room_for_its_cache_fails_the_start_with_the_figures(mark: str) -> None:
    cache = msgspec.structs.replace(ONE.cache, kv_cache_memory_bytes=1)
    with pytest.raises(StartFailed) as caught:
        await AsyncEngine(msgspec.structs.replace(ONE, cache=cache)).start()
    assert caught.value.info.field == "kv_cache_memory_bytes"
    assert caught.value.info.found
    assert caught.value.info.valid


async def test_control_calls_are_answered_by_every_rank(mark: str) -> None:
    async with running(TWO) as engine:
        replies = await engine.collective_rpc("ping", timeout=5.0)
        assert [(reply.rank, reply.ok) for reply in replies] == [(0, True), (1, True)]
        replies = await engine.collective_rpc("no such method", timeout=5.0)
        assert [reply.ok for reply in replies] == [False, False]


async def test_the_helpers_of_an_engine_ignore_the_terminals_interrupt(mark: str) -> None:
    async with running(ONE) as engine:
        # Ctrl-C goes to the foreground group of the terminal's session, in which none of them is.
        assert all(session(pid) != session(os.getpid()) for pid in marked(mark))
        assert len(await eight_tokens(engine)) == 8
