"""Signals reach the process that is meant, and what /proc says of it is read right."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from drumline.engine.testing.census import Holding, take_census
from drumline.engine.testing.processes import Process, family
from drumline.engine.testing.records import InjectionFailed

THREADS = (
    "import threading, time; threading.Thread(target=time.sleep, args=(60,)).start(); print(flush=True); time.sleep(60)"
)


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", THREADS], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        process.kill()


async def test_a_stopped_process_stands_still_in_all_its_threads_until_it_is_woken(
    sleeper: subprocess.Popen[bytes],
) -> None:
    process = Process(sleeper.pid, "the sleeper")
    assert process.state in ("S", "R")
    assert not process.gone
    await process.stop()
    assert process.state == "T"
    assert process.wake()
    await process.until(lambda: process.state in ("S", "R"), 5.0, "did not wake")
    process.close()


async def test_a_killed_process_is_gone_and_cannot_be_killed_twice(sleeper: subprocess.Popen[bytes]) -> None:
    process = Process(sleeper.pid, "the sleeper")
    await process.kill()
    assert (process.state, process.gone) == ("X", True)
    sleeper.wait()
    with pytest.raises(InjectionFailed, match=rf"the sleeper \(pid {sleeper.pid}\) had ended"):
        await process.kill()
    assert not process.wake()
    process.close()
    with pytest.raises(InjectionFailed, match="is not there"):
        Process(sleeper.pid, "the sleeper")


async def test_what_does_not_happen_is_told_with_the_state_of_the_process(sleeper: subprocess.Popen[bytes]) -> None:
    process = Process(sleeper.pid, "the sleeper")
    with pytest.raises(InjectionFailed, match=r"did not end within 0\.05 s: it is in state [SR]"):
        await process.until(lambda: process.gone, 0.05, "did not end")
    process.close()


def test_a_family_and_what_it_holds(sleeper: subprocess.Popen[bytes]) -> None:
    assert {os.getpid(), sleeper.pid} <= set(family(os.getpid()))
    census = take_census(sleeper.pid)
    other = census.roles["other"]
    assert (other.processes, other.threads) == (1, 2)
    assert other.rss_bytes > 1 << 20
    assert other.file_descriptors >= 3
    assert census.total == census.roles["app"] + other
    assert Holding(1, 2, 3, 4, 5) + Holding(1, 1, 1, 1, 1) == Holding(2, 3, 4, 5, 6)
