"""A rank without its coordinator: it keeps what it has and waits for the next one, as long as its lease says."""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from drumline.protocol.codec import config_digest
from drumline.protocol.messages import HelloWorker, Load, Loaded, Shutdown, StepDone
from tests.checkpoints import Checkpoints
from tests.integration.workers.driving import (
    PROMPT,
    generate,
    placement,
    start_one,
    start_two,
    stats_of,
    until_inside_collective,
)
from tests.integration.workers.lone_coordinator import config_on_lease
from tests.integration.workers.processes import (
    NO_EXPERTS,
    CoordinatorEnd,
    ForkServerProcess,
    admission,
    i32,
    proc_file,
    step,
    wait_until_gone,
    worker_config,
)


def bytes_read(pid: int) -> int:
    """Through read calls, whatever they read from."""
    fields = dict(line.split(": ") for line in proc_file(pid, "io").splitlines())
    return int(fields["rchar"])


async def test_a_rank_goes_on_under_the_next_coordinator_without_loading_again(
    forkserver: ForkServerProcess, coordinator: CoordinatorEnd, checkpoints: Checkpoints
) -> None:
    model = checkpoints("qwen3-moe")
    pid, config = await start_one(forkserver, coordinator, model, coordinator_lease_s=20.0)
    (tokens,) = await generate(coordinator, [PROMPT], 4)
    before = coordinator.hellos[0]
    read = bytes_read(pid)

    coordinator.close_router()
    await asyncio.sleep(0.5)
    start = time.monotonic()
    coordinator.reopen()
    hello = await coordinator.expect(HelloWorker, 0)
    print(f"Hello to the next coordinator after {1e3 * (time.monotonic() - start):.0f} ms")
    assert (hello.pid, hello.incarnation, hello.token) == (pid, before.incarnation, before.token)
    assert (hello.term, hello.epoch, hello.loaded, hello.digest) == (1, 1, True, config_digest(config))
    coordinator.welcome_again(0, config, term=2)
    (left,) = await coordinator.leave([0], 2, term=2)
    assert (left.term, left.num_blocks) == (2, config.num_blocks)
    await coordinator.configure([0], placement(1), epoch=2, term=2)

    # Its cache is whole: of the row's tokens all but the last have their keys and values.
    known = [*PROMPT, *tokens]
    coordinator.send(0, step(0, [1], epoch=2, term=2, **admission(known, num_cached=len(known) - 1)))
    resumed = await coordinator.expect(StepDone, 0)
    again = admission(known, row=1, blocks=(4, 5)) | {"evicted": i32(0)}
    coordinator.send(0, step(1, [len(known)], epoch=2, term=2, **again))
    recomputed = await coordinator.expect(StepDone, 0)
    assert resumed.tokens.tolist() == recomputed.tokens.tolist()
    assert bytes_read(pid) - read < sum(file.stat().st_size for file in model.glob("*.safetensors")) // 2
    coordinator.send(0, Shutdown(2))
    assert forkserver.expect_exit(pid, 5.0)[:2] == (0, 0)


async def test_ranks_come_out_of_their_collective_and_drop_what_they_had_to_say(
    forkserver: ForkServerProcess, coordinator: CoordinatorEnd, checkpoints: Checkpoints
) -> None:
    pids = await start_two(forkserver, coordinator, checkpoints("qwen3-moe"), coordinator_lease_s=20.0)
    os.kill(pids[1], signal.SIGSTOP)
    coordinator.send(0, step(0, [len(PROMPT), 0], **admission(PROMPT)))
    await until_inside_collective(coordinator)
    coordinator.reopen()
    config = worker_config(checkpoints("qwen3-moe"), dp=2, expert_parallel=True, coordinator_lease_s=20.0)
    await coordinator.welcome(0, config, term=2)
    (left,) = await coordinator.leave([0], 2, term=2)
    assert left.epoch == 2
    os.kill(pids[1], signal.SIGCONT)
    await coordinator.welcome(1, config, term=2)
    await coordinator.leave([1], 2, term=2)
    assert coordinator.kept == []
    store = await coordinator.open_store(0, 2, term=2)
    await coordinator.configure([0, 1], placement(2), epoch=2, term=2, store=store)
    for rank in (0, 1):
        parts = admission(PROMPT) if rank == 0 else {}
        coordinator.send(rank, step(0, [len(PROMPT), 0], epoch=2, term=2, **parts))
    assert len((await coordinator.expect(StepDone, 0)).tokens) == 1
    for rank, pid in enumerate(pids):
        coordinator.send(rank, Shutdown(2))
        assert forkserver.expect_exit(pid, 5.0)[:2] == (0, 0)


async def test_a_coordinator_of_an_older_term_is_refused(
    forkserver: ForkServerProcess, coordinator: CoordinatorEnd, checkpoints: Checkpoints
) -> None:
    pid, config = await start_one(forkserver, coordinator, checkpoints("qwen3-moe"), coordinator_lease_s=20.0)
    coordinator.reopen()
    await coordinator.welcome(0, config, term=3)
    coordinator.reopen()
    await coordinator.welcome(0, config, term=2)
    coordinator.send(0, Load(2, NO_EXPERTS))
    # It turns away, and asks again whoever is there.
    await coordinator.welcome(0, config, term=4)
    stats = await stats_of(coordinator, term=4)
    assert stats["stale"] in (1, 2)  # its Welcome, and its Load if that was there before it had turned away
    assert not coordinator.holds(Loaded)
    coordinator.send(0, Shutdown(4))
    assert forkserver.expect_exit(pid, 5.0)[:2] == (0, 0)


async def test_a_rank_whose_lease_runs_out_ends(
    forkserver: ForkServerProcess, coordinator: CoordinatorEnd, checkpoints: Checkpoints
) -> None:
    pid, _ = await start_one(forkserver, coordinator, checkpoints("qwen3-moe"), coordinator_lease_s=1.0)
    start = time.monotonic()
    coordinator.reopen()
    await coordinator.expect(HelloWorker, 0)  # and no Welcome
    code, number, tail = forkserver.expect_exit(pid, 5.0)
    assert (code, number) == (3, 0)
    assert 0.8 < time.monotonic() - start < 2.0
    assert "waiting 1.0 s for the next one" in tail
    assert "no other has welcomed this rank" in tail


async def test_sigterm_ends_a_rank_on_its_lease(
    forkserver: ForkServerProcess, coordinator: CoordinatorEnd, checkpoints: Checkpoints
) -> None:
    pid, _ = await start_one(forkserver, coordinator, checkpoints("qwen3-moe"), coordinator_lease_s=60.0)
    coordinator.close_router()
    await asyncio.sleep(0.3)
    os.kill(pid, signal.SIGTERM)
    assert forkserver.expect_exit(pid, 5.0)[:2] == (143, 0)


async def test_the_lifeline_ends_a_rank_on_its_lease(
    own_forkserver: ForkServerProcess, coordinator: CoordinatorEnd, checkpoints: Checkpoints
) -> None:
    pid, _ = await start_one(own_forkserver, coordinator, checkpoints("qwen3-moe"), coordinator_lease_s=60.0)
    own_forkserver.process.kill()
    own_forkserver.process.wait(5)
    coordinator.close_router()
    await asyncio.sleep(0.3)
    assert proc_file(pid, "stat")
    os.close(own_forkserver.lifeline)
    wait_until_gone([pid], 3.0)


async def test_a_rank_that_was_loading_goes_on_and_tells_the_next_coordinator(
    forkserver: ForkServerProcess, coordinator: CoordinatorEnd, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    """Its turn to load comes only when the second coordinator is there."""
    turn = os.open(tmp_path / "loading-0.lock", os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(turn, fcntl.LOCK_EX)
    config = worker_config(
        checkpoints("qwen3-moe"),
        coordinator_lease_s=20.0,
        max_parallel_loading_workers=1,
        runtime_dir=str(tmp_path),
        beat_interval_s=0.1,
    )
    pid = forkserver.spawn(0, coordinator.endpoint)
    await coordinator.welcome(0, config)
    coordinator.send(0, Load(1, NO_EXPERTS))
    await coordinator.expect_beats(2)
    coordinator.reopen()
    hello = await coordinator.expect(HelloWorker, 0)
    assert (hello.loaded, hello.digest) == (False, "")
    coordinator.welcome_again(0, config, term=2)
    coordinator.send(0, Load(2, NO_EXPERTS))
    await coordinator.expect_beats(2)
    assert {(beat.term, beat.load_done) for beat in coordinator.beats[-2:]} == {(2, 0)}
    os.close(turn)
    loaded = await coordinator.expect(Loaded, 0)
    assert loaded.term == 2
    await coordinator.expect_beats(1)
    assert coordinator.beats[-1].load_done == coordinator.beats[-1].load_total > 0
    assert not coordinator.holds(Loaded)
    coordinator.send(0, Shutdown(2))
    assert forkserver.expect_exit(pid, 5.0)[:2] == (0, 0)


async def test_a_rank_of_another_configuration_says_so_and_ends(
    forkserver: ForkServerProcess, coordinator: CoordinatorEnd, checkpoints: Checkpoints
) -> None:
    pid, config = await start_one(forkserver, coordinator, checkpoints("qwen3-moe"), coordinator_lease_s=20.0)
    coordinator.reopen()
    other = worker_config(config.model, coordinator_lease_s=20.0, max_num_seqs=9)
    await coordinator.welcome(0, other, term=2)
    code, number, tail = forkserver.expect_exit(pid, 5.0)
    assert (code, number) == (1, 0)
    assert "another configuration" in tail


async def test_a_coordinator_that_is_stopped_first_and_killed_later_is_followed_by_the_next(
    forkserver: ForkServerProcess, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    model = checkpoints("qwen3-moe")
    config = config_on_lease(model)
    arguments = ["-m", "tests.integration.workers.lone_coordinator", str(tmp_path), str(model)]
    first = await asyncio.create_subprocess_exec(sys.executable, *arguments, stdout=subprocess.PIPE)
    pid = forkserver.spawn(0, f"ipc://{tmp_path}/worker.sock")
    assert first.stdout is not None
    assert await asyncio.wait_for(first.stdout.readline(), 30.0) == b"left\n"
    os.kill(first.pid, signal.SIGSTOP)
    await asyncio.sleep(1.5)
    first.kill()
    await first.wait()
    coordinator = CoordinatorEnd(tmp_path)
    try:
        start = time.monotonic()
        hello = await coordinator.welcome(0, config, term=2)
        print(f"Hello {1e3 * (time.monotonic() - start):.0f} ms after the next coordinator listens")
        assert (hello.pid, hello.term, hello.epoch, hello.loaded) == (pid, 1, 1, True)
        await coordinator.leave([0], 2, term=2)
        coordinator.send(0, Shutdown(2))
        assert forkserver.expect_exit(pid, 5.0)[:2] == (0, 0)
    finally:
        coordinator.close()
