"""The forkserver: workers start in milliseconds, exits are told at once, nobody outlives the owner."""

from __future__ import annotations

import fcntl
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from drumline.protocol.messages import Fault, HelloWorker, Load, Loaded, StepDone
from tests.checkpoints import Checkpoints
from tests.integration.workers.driving import PROMPT, placement, start_one
from tests.integration.workers.processes import (
    NO_EXPERTS,
    CoordinatorEnd,
    ForkServerProcess,
    admission,
    open_descriptors,
    proc_file,
    step,
    wait_until_gone,
    worker_config,
)


async def test_workers_greet_with_rank_pid_and_token(
    forkserver: ForkServerProcess, coordinator: CoordinatorEnd
) -> None:
    pids = [forkserver.spawn(rank, coordinator.endpoint, f"token-{rank}") for rank in (0, 1)]
    hellos = [await coordinator.expect(HelloWorker, rank) for rank in (0, 1)]
    assert [hello.pid for hello in hellos] == pids
    assert [hello.token for hello in hellos] == ["token-0", "token-1"]
    assert hellos[0].incarnation != hellos[1].incarnation
    assert [proc_file(pid, "comm").strip() for pid in pids] == ["drumline:r0", "drumline:r1"]
    for pid in pids:
        forkserver.kill(pid, signal.SIGKILL)
        assert forkserver.expect_exit(pid)[:2] == (0, signal.SIGKILL)


async def test_a_worker_starts_with_clean_descriptors_and_signals(
    forkserver: ForkServerProcess, coordinator: CoordinatorEnd
) -> None:
    first = forkserver.spawn(0, coordinator.endpoint)
    second = forkserver.spawn(1, coordinator.endpoint)
    for rank in (0, 1):
        await coordinator.expect(HelloWorker, rank)
    commands = [open_descriptors(forkserver.process.pid)[fd] for fd in (0, 1)]
    stderr = [open_descriptors(pid)[2] for pid in (first, second)]
    for pid, own, other in ((first, stderr[0], stderr[1]), (second, stderr[1], stderr[0])):
        descriptors = open_descriptors(pid)
        assert not set(commands) & set(descriptors.values())
        assert other not in descriptors.values()
        assert (descriptors[0], descriptors[1]) == ("/dev/null", own)
        assert "anon_inode:[pidfd]" not in descriptors.values()
        masks = dict(re.findall(r"Sig(Blk|Ign):\t(\w+)", proc_file(pid, "status")))
        assert int(masks["Blk"], 16) == 0
        assert int(masks["Ign"], 16) & (1 << (signal.SIGINT - 1))
    for pid in (first, second):
        forkserver.kill(pid, signal.SIGKILL)
        forkserver.expect_exit(pid)


async def test_sigterm_ends_a_worker_and_ctrl_c_does_not(
    forkserver: ForkServerProcess, coordinator: CoordinatorEnd
) -> None:
    pid = forkserver.spawn(0, coordinator.endpoint)
    await coordinator.welcome(0, worker_config("/nowhere", beat_interval_s=0.05))
    os.kill(pid, signal.SIGINT)
    await coordinator.expect_beats(3)
    os.kill(pid, signal.SIGTERM)
    code, number, tail = forkserver.expect_exit(pid, 2.0)
    assert (code, number) == (143, 0)
    assert "SIGTERM" in tail


def test_an_exit_is_told_with_the_tail_of_stderr(forkserver: ForkServerProcess) -> None:
    pid = forkserver.spawn(0, "tcp://0.0.0.0:1")
    code, number, tail = forkserver.expect_exit(pid, 5.0)
    assert (code, number) == (1, 0)
    assert "tcp://0.0.0.0:1" in tail
    assert tail.encode()[-200:] in forkserver.stderr.read_bytes()
    assert len(tail.encode()) <= 4096


async def test_a_worker_ends_when_its_coordinator_goes_away(
    forkserver: ForkServerProcess, coordinator: CoordinatorEnd
) -> None:
    pid = forkserver.spawn(0, coordinator.endpoint)
    await coordinator.expect(HelloWorker)
    coordinator.router.close(0.0)
    code, number, tail = forkserver.expect_exit(pid, 3.0)
    assert (code, number) == (3, 0)
    assert "coordinator is gone" in tail


async def test_closing_the_commands_ends_every_worker(
    own_forkserver: ForkServerProcess, coordinator: CoordinatorEnd
) -> None:
    pids = [own_forkserver.spawn(rank, coordinator.endpoint) for rank in range(3)]
    await coordinator.expect(HelloWorker, 2)
    assert own_forkserver.close() == 0
    wait_until_gone(pids, 1.0)


async def test_a_command_that_is_none_ends_forkserver_and_workers(
    own_forkserver: ForkServerProcess, coordinator: CoordinatorEnd
) -> None:
    pid = own_forkserver.spawn(0, coordinator.endpoint)
    await coordinator.expect(HelloWorker)
    own_forkserver.write(b"\xff\xff\xff\xffgarbage")
    assert own_forkserver.process.wait(3) == 2
    wait_until_gone([pid], 1.0)


OWNER = """
import os, subprocess, sys, time
from drumline.protocol.errors import DrumlineError
import struct, msgspec
read_end, write_end = os.pipe()
server = subprocess.Popen([sys.executable, "-m", "drumline.workers.forkserver", "--lifeline-fd", str(read_end)],
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[read_end])
os.close(read_end)
for rank in range({workers}):
    body = msgspec.msgpack.encode({{"spawn": [rank, "{endpoint}", "t"]}})
    server.stdin.write(struct.pack(">I", len(body)) + body)
server.stdin.flush()
print(server.pid, flush=True)
time.sleep(600)
"""


def _start_owner(endpoint: str, workers: int) -> tuple[subprocess.Popen[str], int]:
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER.format(endpoint=endpoint, workers=workers)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert owner.stdout is not None
    return owner, int(owner.stdout.readline())


def _kill_owner(owner: subprocess.Popen[str]) -> None:
    owner.kill()
    owner.wait(5)
    assert owner.stdout is not None
    owner.stdout.close()


def test_a_forkserver_that_still_imports_dies_with_its_owner(tmp_path: Path) -> None:
    owner, pid = _start_owner(f"ipc://{tmp_path}/none.sock", 1)
    _kill_owner(owner)
    wait_until_gone([pid], 3.0)


async def test_all_are_gone_within_3_s_of_the_owners_death_while_loading(
    coordinator: CoordinatorEnd, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    """They wait for their turns to load, which never come."""
    turn = os.open(tmp_path / "loading-0.lock", os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(turn, fcntl.LOCK_EX)
    config = worker_config(checkpoints("qwen3-moe"), max_parallel_loading_workers=1, runtime_dir=str(tmp_path))
    owner, server = _start_owner(coordinator.endpoint, 2)
    for rank in (0, 1):
        await coordinator.welcome(rank, config)
        coordinator.send(rank, Load(1, NO_EXPERTS))
    pids = [hello.pid for hello in coordinator.hellos.values()]
    await coordinator.expect_beats(2)
    assert not coordinator.holds(Loaded)
    _kill_owner(owner)
    print(f"gone after {wait_until_gone([server, *pids], 3.0):.3f} s")
    os.close(turn)


async def test_workers_outlive_their_forkserver(
    own_forkserver: ForkServerProcess, coordinator: CoordinatorEnd, checkpoints: Checkpoints
) -> None:
    """Though nobody reads what they write to stderr any more."""
    pid, _ = await start_one(own_forkserver, coordinator, checkpoints("qwen3-moe"), beat_interval_s=0.05)
    own_forkserver.process.kill()
    own_forkserver.process.wait(5)
    await coordinator.expect_beats(3)
    descriptors = open_descriptors(pid)
    assert (descriptors[1], descriptors[2]) == ("/dev/null", "/dev/null")
    coordinator.send(0, step(1, [1]))  # out of order: told, and written to stderr
    await coordinator.expect(Fault, 0)
    await coordinator.leave([0], 2)
    await coordinator.configure([0], placement(1), epoch=2)
    coordinator.send(0, step(0, [len(PROMPT)], epoch=2, **admission(PROMPT)))
    assert len((await coordinator.expect(StepDone, 0)).tokens) == 1
    os.close(own_forkserver.lifeline)
    wait_until_gone([pid], 3.0)


async def test_a_worker_starts_in_milliseconds(forkserver: ForkServerProcess, coordinator: CoordinatorEnd) -> None:
    figures = []
    for rank in range(3):
        start = time.perf_counter()
        pid = forkserver.spawn(rank, coordinator.endpoint)
        await coordinator.expect(HelloWorker, rank)
        figures.append(1e3 * (time.perf_counter() - start))
        forkserver.kill(pid, signal.SIGKILL)
        forkserver.expect_exit(pid)
    print(f"spawn to hello: {', '.join(f'{ms:.1f}' for ms in figures)} ms")
    assert min(figures) < 500
