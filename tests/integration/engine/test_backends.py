"""Who starts the ranks: one process alone, a job script, or both a forkserver and a job script."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import signal
import stat
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from drumline.engine.client import AsyncEngine
from drumline.engine.config import CacheConfig, EngineConfig, ParallelConfig
from drumline.engine.errors import InvalidConfig, StartFailed
from drumline.protocol.endpoints import bind_tcp
from drumline.protocol.messages import Event
from tests.integration.engine.processes import marked, running, until, wait_all_gone, wait_until, workers
from tests.integration.engine.recovery import all_of, told_of, under_way, undisturbed, whole
from tests.integration.engine.test_life import ONE, TWO, eight_tokens
from tests.integration.engine.test_lifelines import app, kill_app, read_until

UNI = msgspec.structs.replace(ONE, parallel=ParallelConfig(distributed_executor_backend="uni"))


def two(**settings: Any) -> EngineConfig:
    return msgspec.structs.replace(TWO, parallel=msgspec.structs.replace(TWO.parallel, **settings))


EXTERNAL = two(distributed_executor_backend="external_launcher")
MIXED = two(data_parallel_size_local=1)


class Job:
    """A job script: starts the ranks that the engine says it waits for."""

    def __init__(self) -> None:
        self.engine: AsyncEngine | None = None
        self.ranks: dict[int, subprocess.Popen[bytes]] = {}
        self.events: list[Event] = []

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        if event.kind == "waiting":
            assert self.engine is not None
            assert self.engine.launch is not None
            for rank in self.engine.launch.ranks:
                self.ranks[rank] = self.start_another(rank)

    def start_another(self, rank: int) -> subprocess.Popen[bytes]:
        assert self.engine is not None
        assert self.engine.launch is not None
        return subprocess.Popen(self.engine.launch.command(rank))

    def exit_codes(self) -> list[int]:
        return [process.wait(5.0) for _, process in sorted(self.ranks.items())]


@pytest.fixture
def job() -> Iterator[Job]:
    one = Job()
    yield one
    for process in one.ranks.values():
        process.kill()
        process.wait(5.0)


@asynccontextmanager
async def run_with(config: EngineConfig, job: Job) -> AsyncIterator[AsyncEngine]:
    job.engine = AsyncEngine(config, on_event=job)
    async with job.engine as engine:
        yield engine


_said: list[int] = []


async def said_by_a_forkserver() -> list[int]:
    """The tokens that any of these engines must say; float32 on the demo model has no ties there."""
    if not _said:
        async with running(TWO) as engine:
            _said.extend(await eight_tokens(engine))
    return _said


async def test_one_rank_alone_needs_no_forkserver_and_says_the_same(mark: str, runtime_root: Path) -> None:
    expected = await said_by_a_forkserver()
    async with running(UNI) as engine:
        assert await eight_tokens(engine) == expected
        assert len(marked(mark)) == 3
        assert len(workers(mark)) == 1
        assert not any("forkserver" in command for command in marked(mark).values())
        status = await engine.status()
        assert [rank.pid for rank in status.ranks] == workers(mark)
        assert not any(token in command for command in marked(mark).values() for token in ("launch-token", "secret"))
    wait_all_gone(mark, runtime_root, 0.5)


async def test_one_rank_alone_that_is_killed_is_started_again_and_its_streams_go_on(mark: str) -> None:
    events: list[Event] = []
    async with running(UNI, events) as engine:
        expected = await undisturbed(engine, 2)
        streams = await under_way(engine, 2)
        (victim,) = workers(mark)
        os.kill(victim, signal.SIGKILL)
        assert await all_of(streams) == expected
        fault = told_of(await whole(engine), events, 0)
        assert f"rank 0 (pid {victim}) ended with signal 9" in fault.evidence


async def test_one_rank_alone_that_cannot_load_fails_the_start_in_its_own_words(mark: str) -> None:
    config = msgspec.structs.replace(UNI, cache=CacheConfig(kv_cache_memory_bytes=1))
    with pytest.raises(StartFailed) as caught:
        await AsyncEngine(config).start()
    assert caught.value.info.field == "kv_cache_memory_bytes"


async def test_a_killed_supervisor_takes_a_rank_alone_with_it(mark: str, runtime_root: Path) -> None:
    async with running(UNI) as engine:
        status = await engine.status()
        os.kill(status.supervisor.pid, signal.SIGKILL)
        await until(lambda: not marked(mark), 3.0, f"left: {marked(mark)}")


@pytest.mark.parametrize("pause_s", [0.0, 0.4, 0.8, 1.6])
def test_an_app_killed_while_its_one_rank_starts_takes_everything_with_it(
    mark: str, runtime_root: Path, pause_s: float
) -> None:
    """The moments cover a rank that has no launch token yet."""
    with app("--uni") as process:
        read_until(process, "start")
        wait_until(lambda: any("drumline.workers" in line for line in marked(mark).values()), 30.0, "no rank")
        time.sleep(pause_s)
        kill_app(process)
        wait_all_gone(mark, runtime_root)


async def test_ranks_of_a_job_script_serve_like_those_of_a_forkserver(mark: str, runtime_root: Path, job: Job) -> None:
    expected = await said_by_a_forkserver()
    async with run_with(EXTERNAL, job) as engine:
        assert engine.launch is not None
        token = engine.launch.token_file
        assert stat.S_IMODE(os.stat(token).st_mode) == 0o600  # noqa: PTH116
        assert engine.launch.ranks == (0, 1)
        assert await eight_tokens(engine) == expected
        status = await engine.status()
        assert [rank.pid for rank in status.ranks] == [job.ranks[0].pid, job.ranks[1].pid]
        # The app, its supervisor and coordinator; nothing that starts ranks.
        assert len(marked(mark)) == 4
    assert job.exit_codes() == [0, 0]
    wait_all_gone(mark, runtime_root, 0.5)
    (waiting,) = [event for event in job.events if event.kind == "waiting"]
    assert (waiting.done, waiting.total) == (0, 2)
    assert f"--token-file {token}` for N in 0-1" in waiting.text


async def test_replicas_are_started_here_and_by_a_job_script(mark: str, runtime_root: Path, job: Job) -> None:
    expected = await said_by_a_forkserver()
    async with run_with(MIXED, job) as engine:
        assert engine.launch is not None
        assert engine.launch.ranks == (1,)
        assert await eight_tokens(engine) == expected
        status = await engine.status()
        assert status.ranks[1].pid == job.ranks[1].pid
        assert any("forkserver" in command for command in marked(mark).values())
    assert job.exit_codes() == [0]
    wait_all_gone(mark, runtime_root, 0.5)


async def test_a_second_process_for_a_rank_is_refused_and_ends(mark: str, job: Job) -> None:
    async with run_with(EXTERNAL, job) as engine:
        second = job.start_another(1)

        async def refused() -> int:
            return (await engine.status()).counters["worker_messages_duplicate_hello"]

        deadline = time.monotonic() + 30.0
        while not await refused():
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)
        # It is told so.
        await until(lambda: second.poll() is not None, 10.0, "the second process lives on")
        assert len(await eight_tokens(engine)) == 8
        assert (await engine.status()).ranks[1].pid == job.ranks[1].pid
    assert job.exit_codes() == [0, 0]


@pytest.mark.parametrize("config", [EXTERNAL, MIXED], ids=["all by the job", "half by the job"])
async def test_streams_of_a_killed_job_rank_go_on_without_it_until_the_job_starts_another(
    mark: str, job: Job, config: EngineConfig
) -> None:
    async with run_with(config, job) as engine:
        expected = await undisturbed(engine, 4)
        streams = await under_way(engine, 4)
        victim = job.ranks[1]
        victim.kill()
        assert await all_of(streams) == expected
        status = await engine.status()
        fault = told_of(status, job.events, 1)
        assert (fault.kind, fault.incarnation) == ("unreachable", status.ranks[1].incarnation)
        assert f"rank 1 (pid {victim.pid})" in fault.evidence
        # Nobody here can start it.
        assert status.ranks[1].state == "dead"
        assert victim.wait(5.0) == -signal.SIGKILL
        job.ranks[1] = job.start_another(1)
        status = await whole(engine)
        assert status.ranks[1].pid == job.ranks[1].pid
        assert await undisturbed(engine, 4) == expected
    assert set(job.exit_codes()) == {0}


async def test_job_ranks_stay_with_the_next_coordinator_and_are_not_asked_for_again(mark: str, job: Job) -> None:
    async with run_with(EXTERNAL, job) as engine:
        expected = await undisturbed(engine, 4)
        streams = await under_way(engine, 4)
        os.kill((await engine.status()).coordinator.pid, signal.SIGKILL)
        assert await all_of(streams) == expected
        status = await whole(engine)
        assert status.term == 2
        assert [rank.pid for rank in status.ranks] == [job.ranks[0].pid, job.ranks[1].pid]
        assert [event.done for event in job.events if event.kind == "waiting"] == [0]
    assert job.exit_codes() == [0, 0]


async def test_a_job_rank_that_is_killed_while_idle_is_found_out(mark: str, job: Job) -> None:
    async with run_with(EXTERNAL, job) as engine:
        expected = await eight_tokens(engine)
        job.ranks[0].kill()
        await until(lambda: any(event.kind == "fault" for event in job.events), 3.0, "no fault was told")
        assert await eight_tokens(engine) == expected
        assert told_of(await engine.status(), job.events, 0).kind == "unreachable"
    assert job.exit_codes() == [-signal.SIGKILL, 0]


async def test_the_place_of_a_job_rank_that_dies_while_it_starts_is_free_for_another(mark: str, job: Job) -> None:
    job.engine = AsyncEngine(EXTERNAL, on_event=job)
    start = asyncio.create_task(job.engine.start())
    # Torch is imported after the Hello: a rank that nobody has heard of is only missed at the start deadline.
    await until(lambda: len(job.ranks) == 2 and has_torch(job.ranks[1].pid), 30.0, "rank 1 does not load")
    assert not start.done()
    job.ranks[1].kill()
    assert job.ranks[1].wait(5.0) == -signal.SIGKILL
    job.ranks[1] = job.start_another(1)
    try:
        await asyncio.wait_for(start, 30.0)
        assert len(await eight_tokens(job.engine)) == 8
        assert (await job.engine.status()).ranks[1].pid == job.ranks[1].pid
    finally:
        await job.engine.close()


@pytest.mark.parametrize("moment", ["loads", "serves"])
def test_a_killed_app_takes_the_ranks_of_its_job_with_it(mark: str, runtime_root: Path, moment: str) -> None:
    with app("--external") as process:
        if moment == "serves":
            read_until(process, "token 5")
        wait_until(lambda: len(workers(mark)) == 2, 30.0, "no rank was started")
        kill_app(process)
        wait_all_gone(mark, runtime_root)


def test_the_command_says_how_to_start_its_ranks(mark: str, runtime_root: Path) -> None:
    arguments = "generate --prompt x --max-tokens 4 --json --distributed-executor-backend external_launcher"
    command = [sys.executable, "-c", "from drumline.engine.cli import main; main()", *arguments.split()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as generate:
        assert generate.stderr is not None
        waiting = next(line for line in generate.stderr if line.startswith("waiting for 1 rank: "))
        _, shown, rest = waiting.split("`")
        assert rest == " for N in 0\n"
        python, *words = shlex.split(shown.replace("--rank N", "--rank 0"))
        assert python == "python"
        with subprocess.Popen([sys.executable, *words]) as rank:
            out, _ = generate.communicate(timeout=60)
            assert rank.wait(5.0) == 0
    assert generate.returncode == 0
    assert len(json.loads(out)["outputs"][0]["token_ids"]) == 4


async def test_ranks_that_load_in_turns_serve_all_the_same(mark: str, runtime_root: Path) -> None:
    expected = await said_by_a_forkserver()
    async with running(two(max_parallel_loading_workers=1)) as engine:
        assert await eight_tokens(engine) == expected
        turns = [path.name for path in runtime_root.glob("drumline-*/loading-*.lock")]  # noqa: ASYNC240
        assert turns == ["loading-0.lock"]


async def test_ports_that_were_asked_for_are_taken(mark: str, job: Job) -> None:
    rpc, master = free_port(), free_port()
    config = two(
        distributed_executor_backend="external_launcher", data_parallel_rpc_port=rpc, data_parallel_master_port=master
    )
    async with run_with(config, job) as engine:
        assert engine.launch is not None
        assert engine.launch.endpoint == f"tcp://127.0.0.1:{rpc}"
        assert len(await eight_tokens(engine)) == 8
        with pytest.raises(InvalidConfig, match=str(master)):
            bind_tcp("127.0.0.1", master)
        for field, port in (("data_parallel_rpc_port", rpc), ("data_parallel_master_port", master)):
            with pytest.raises(InvalidConfig, match="in use") as caught:
                await AsyncEngine(two(**{field: port})).start()
            assert caught.value.info.field == field
    assert job.exit_codes() == [0, 0]


def has_torch(pid: int) -> bool:
    return "libtorch" in Path(f"/proc/{pid}/maps").read_text()


def free_port() -> int:
    bound, port = bind_tcp("127.0.0.1")
    bound.close()
    return port
