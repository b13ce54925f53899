"""Whoever dies, and however: every process and every file of the engine is gone within 3 s."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from drumline.engine.config import EngineConfig, ParallelConfig
from drumline.engine.errors import EngineClosed
from drumline.engine.sampling_params import SamplingParams
from tests.integration.engine.processes import (
    files_in,
    marked,
    of_module,
    running,
    until,
    wait_all_gone,
    wait_until,
    workers,
)
from tests.integration.engine.test_life import TWO, eight_tokens

UNI = EngineConfig("demo", parallel=ParallelConfig(distributed_executor_backend="uni"))


@contextmanager
def app(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """The app as a process; killed at the end if the test did not do it."""
    command = [sys.executable, "-m", "tests.integration.engine.app", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def read_until(process: subprocess.Popen[str], start: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(start):
            return
    raise AssertionError(f"the app ended before it said {start!r}")


def kill_app(process: subprocess.Popen[str]) -> None:
    process.kill()
    assert process.wait(5) == -signal.SIGKILL


@pytest.mark.parametrize("arguments", [(), ("--inline",)], ids=["own process", "inline"])
def test_a_killed_app_takes_a_serving_engine_with_it(mark: str, runtime_root: Path, arguments: tuple[str, ...]) -> None:
    with app(*arguments) as process:
        read_until(process, "token 5")
        assert len(workers(mark)) == 2
        kill_app(process)
        wait_all_gone(mark, runtime_root)


async def test_the_next_engine_on_the_journal_of_a_killed_app_goes_on_with_its_request(
    mark: str, runtime_root: Path, tmp_path: Path
) -> None:
    path = str(tmp_path / "journal.sqlite")
    with app("--uni", f"--journal={path}") as process:
        read_until(process, "token 20")
        kill_app(process)
        wait_all_gone(mark, runtime_root)
    async with running(msgspec.structs.replace(UNI, journal=path)) as engine:
        tokens: list[int] = []
        async for output in engine.resume("kept"):
            tokens += output.token_ids_delta
        params = SamplingParams(max_tokens=500, temperature=0.8, seed=1, ignore_eos=True)
        assert tokens == [token async for out in engine.generate("The", params) for token in out.token_ids_delta]


@pytest.mark.parametrize("seed", range(4))
def test_an_app_killed_at_a_random_moment_of_its_start_takes_everything_with_it(
    mark: str, runtime_root: Path, seed: int
) -> None:
    """The moments cover the birth of the supervisor, of the forkserver and coordinator, and the loading of weights."""
    with app() as process:
        read_until(process, "start")
        time.sleep(random.Random(seed).uniform(0.0, 0.75) + 0.75 * seed)
        kill_app(process)
        wait_all_gone(mark, runtime_root)


def test_an_app_killed_while_its_workers_load_takes_everything_with_it(mark: str, runtime_root: Path) -> None:
    with app() as process:
        wait_until(lambda: bool(workers(mark)), 30.0, "no worker was started")
        kill_app(process)
        wait_all_gone(mark, runtime_root)


def test_a_stopped_worker_does_not_outlive_a_killed_app(mark: str, runtime_root: Path) -> None:
    with app() as process:
        wait_until(lambda: bool(workers(mark)), 30.0, "no worker was started")
        os.kill(workers(mark)[0], signal.SIGSTOP)
        kill_app(process)
        wait_all_gone(mark, runtime_root)


@pytest.mark.parametrize("module", ["drumline.engine.launch.coordinator", "drumline.workers.forkserver"])
def test_neither_a_stopped_coordinator_nor_forkserver_outlives_a_killed_app(
    mark: str, runtime_root: Path, module: str
) -> None:
    with app() as process:
        read_until(process, "ready")
        os.kill(of_module(mark, module), signal.SIGSTOP)
        kill_app(process)
        wait_all_gone(mark, runtime_root)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=lambda number: number.name)
async def test_a_supervisor_that_dies_ends_the_engine_and_the_app_is_told(
    mark: str, runtime_root: Path, number: signal.Signals
) -> None:
    async with running(TWO) as engine:
        await eight_tokens(engine)
        os.kill(of_module(mark, "drumline.engine.supervisor"), number)
        await until(lambda: not marked(mark), 3.0, f"left: {marked(mark)}")
        with pytest.raises(EngineClosed):
            await eight_tokens(engine)
        assert files_in(runtime_root) == []
