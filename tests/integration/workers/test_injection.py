"""Faults that a rank brings upon itself on order: each kind, at each point, told before it happens."""

from __future__ import annotations

import asyncio
import os
import signal
import time

import pytest

from drumline.protocol.messages import Fault, Inject, Injected, Injection, Leave, Left, Load, Loaded, Shutdown, StepDone
from tests.checkpoints import Checkpoints
from tests.integration.workers.driving import (
    PROMPT,
    form_two,
    generate,
    placement,
    start_one,
    start_two,
    stats_of,
    stop,
)
from tests.integration.workers.processes import (
    NO_EXPERTS,
    CoordinatorEnd,
    ForkServerProcess,
    admission,
    proc_file,
    step,
    worker_config,
)

ENDS = {"kill": (0, signal.SIGKILL), "exit": (1, 0), "segv": (0, signal.SIGSEGV)}
POINTS = ("loading", "leave", "regroup", "joining", "idle", "step", "prefill", "decode")


async def told(coordinator: CoordinatorEnd, number: int, text: str, rank: int = 0) -> None:
    injected = await coordinator.expect(Injected, rank)
    assert (injected.number, injected.text, injected.rank) == (number, text, rank)
    assert injected.incarnation == coordinator.hellos[rank].incarnation


@pytest.mark.parametrize("kind", sorted(ENDS))
async def test_a_rank_ends_at_once_however_deep_it_is_in_a_collective(
    forkserver: ForkServerProcess, coordinator: CoordinatorEnd, checkpoints: Checkpoints, kind: str
) -> None:
    pids = await start_two(forkserver, coordinator, checkpoints("qwen3-moe"), fault_injection=True)
    coordinator.send(0, step(0, [len(PROMPT), 0], **admission(PROMPT)))
    coordinator.send(0, Inject(1, (Injection(7, 0, kind), Injection(8, 1, kind))))
    await told(coordinator, 7, f"{kind} at now")
    assert forkserver.expect_exit(pids[0], 5.0)[:2] == ENDS[kind]
    await coordinator.leave([1], 2)
    assert not coordinator.holds(Injected)
    coordinator.send(1, Shutdown(1))
    assert forkserver.expect_exit(pids[1], 5.0)[:2] == (0, 0)


@pytest.mark.parametrize("point", POINTS)
async def test_a_rank_is_killed_at_every_point_and_not_before(
    forkserver: ForkServerProcess, coordinator: CoordinatorEnd, checkpoints: Checkpoints, point: str
) -> None:
    """Each step of the way is answered until the point is reached."""
    config = worker_config(checkpoints("qwen3-moe"), fault_injection=True)
    pid = forkserver.spawn(0, coordinator.endpoint)
    await coordinator.welcome(0, config, injections=(Injection(3, 0, "kill", point), Injection(4, 5, "kill", "now")))
    await _walk_to(coordinator, point)
    await told(coordinator, 3, f"kill at {point}")
    assert forkserver.expect_exit(pid, 5.0)[:2] == (0, signal.SIGKILL)
    assert coordinator.kept == []


async def _walk_to(coordinator: CoordinatorEnd, point: str) -> None:
    coordinator.send(0, Load(1, NO_EXPERTS))
    if point == "loading":
        return
    await coordinator.expect(Loaded, 0)
    if point == "leave":
        coordinator.send(0, Leave(1, 1))
        return
    await coordinator.leave([0], 1)
    await coordinator.configure([0], placement(1), wait=point not in ("regroup", "joining"))
    if point in ("regroup", "joining", "idle"):
        return
    coordinator.send(0, step(0, [len(PROMPT)], **admission(PROMPT)))
    if point in ("step", "prefill"):
        return
    await coordinator.expect(StepDone, 0)
    coordinator.send(0, step(1, [1]))


async def test_a_step_is_hit_from_its_number_on_and_joining_only_in_the_first_epoch(
    forkserver: ForkServerProcess, coordinator: CoordinatorEnd, checkpoints: Checkpoints
) -> None:
    pid, _ = await start_one(forkserver, coordinator, checkpoints("qwen3-moe"), fault_injection=True)
    coordinator.send(0, Inject(1, (Injection(1, 0, "kill", "joining"), Injection(2, 0, "exit", "decode", step=3))))
    await coordinator.leave([0], 2)
    await coordinator.configure([0], placement(1), epoch=2)
    coordinator.send(0, step(0, [len(PROMPT)], epoch=2, **admission(PROMPT)))
    for number in (1, 2, 3):
        assert (await coordinator.expect(StepDone, 0)).step == number - 1
        coordinator.send(0, step(number, [1], epoch=2))
    await told(coordinator, 2, "exit at decode from step 3 on")
    code, ended, tail = forkserver.expect_exit(pid, 5.0)
    assert (code, ended) == (1, 0)
    assert "WARNING injected fault 2: exit at decode from step 3 on" in tail


async def test_a_rank_raises_and_stays(
    forkserver: ForkServerProcess, coordinator: CoordinatorEnd, checkpoints: Checkpoints
) -> None:
    pid, _ = await start_one(forkserver, coordinator, checkpoints("qwen3-moe"), fault_injection=True)
    coordinator.send(0, Inject(1, (Injection(1, 0, "raise", "idle"), Injection(2, 0, "raise", "regroup"))))
    for number, epoch, point in ((1, 1, "idle"), (2, 2, "regroup")):
        await told(coordinator, number, f"raise at {point}")
        fault = await coordinator.expect(Fault, 0)
        assert (fault.epoch, fault.error.kind) == (epoch, "internal")
        assert fault.error.text == f"InjectedError: injected fault {number}"
        await coordinator.leave([0], epoch + 1)
        await coordinator.configure([0], placement(1), epoch=epoch + 1, wait=epoch == 2)
    coordinator.send(0, step(0, [len(PROMPT)], epoch=3, **admission(PROMPT)))
    await coordinator.expect(StepDone, 0)
    await stop(forkserver, coordinator, [pid])


async def test_logits_are_nan_once_and_their_row_is_named(
    forkserver: ForkServerProcess, coordinator: CoordinatorEnd, checkpoints: Checkpoints
) -> None:
    pid, _ = await start_one(forkserver, coordinator, checkpoints("qwen3-moe"), fault_injection=True)
    coordinator.send(0, Inject(1, (Injection(1, 0, "nan"),)))
    coordinator.send(0, step(0, [len(PROMPT)], **admission(PROMPT, row=3)))
    await told(coordinator, 1, "nan at step")
    fault = await coordinator.expect(Fault, 0)
    assert (fault.error.kind, fault.rows, fault.error.step) == ("numeric", (3,), 0)
    await coordinator.leave([0], 2)
    await coordinator.configure([0], placement(1), epoch=2)
    coordinator.send(0, step(0, [len(PROMPT)], epoch=2, **admission(PROMPT, row=3)))
    assert len((await coordinator.expect(StepDone, 0)).tokens) == 1
    await stop(forkserver, coordinator, [pid])


async def test_a_rank_that_hangs_beats_on_and_obeys_no_leave(
    forkserver: ForkServerProcess, coordinator: CoordinatorEnd, checkpoints: Checkpoints
) -> None:
    options = {"fault_injection": True, "beat_interval_s": 0.1}
    pid, _ = await start_one(forkserver, coordinator, checkpoints("qwen3-moe"), **options)
    coordinator.send(0, Inject(1, (Injection(1, 0, "hang", "step"),)))
    coordinator.send(0, step(0, [len(PROMPT)], **admission(PROMPT)))
    await told(coordinator, 1, "hang at step")
    coordinator.send(0, Leave(1, 2))
    await coordinator.expect_beats(5)
    assert (coordinator.beats[-1].step, coordinator.beats[-1].inside) == (0, False)
    assert not coordinator.holds(Left)
    start = time.monotonic()
    coordinator.send(0, Shutdown(1))
    assert forkserver.expect_exit(pid, 5.0)[:2] == (0, 0)
    assert time.monotonic() - start < 2.0


async def test_a_rank_is_slow_for_a_while_and_leaves_as_quickly_as_ever(
    forkserver: ForkServerProcess, coordinator: CoordinatorEnd, checkpoints: Checkpoints
) -> None:
    pid, _ = await start_one(forkserver, coordinator, checkpoints("qwen3-moe"), fault_injection=True)
    await generate(coordinator, [PROMPT], 3)
    coordinator.send(0, Inject(1, (Injection(1, 0, "slow", "decode", seconds=0.3, factor=50.0),)))
    times = []
    for number in range(3, 23):
        start = time.monotonic()
        coordinator.send(0, step(number, [1]))
        await coordinator.expect(StepDone, 0)
        times.append(time.monotonic() - start)
    await told(coordinator, 1, "slow at decode")
    print(f"slow: {1e3 * times[0]:.0f} ms a step, then {1e3 * min(times):.1f} ms")
    assert times[0] > 10 * min(times)
    assert sum(times[-5:]) < 0.5 * sum(times[:5])
    coordinator.send(0, Inject(1, (Injection(2, 0, "slow", factor=1e5),)))
    await told(coordinator, 2, "slow at now")
    coordinator.send(0, step(23, [1]))
    await asyncio.sleep(0.2)
    assert not coordinator.holds(StepDone)
    start = time.monotonic()
    await coordinator.leave([0], 2)
    assert time.monotonic() - start < 0.1
    await stop(forkserver, coordinator, [pid])


async def test_a_rank_stops_until_somebody_lets_it_go_on(
    forkserver: ForkServerProcess, coordinator: CoordinatorEnd, checkpoints: Checkpoints
) -> None:
    pid, _ = await start_one(forkserver, coordinator, checkpoints("qwen3-moe"), fault_injection=True)
    coordinator.send(0, Inject(1, (Injection(1, 0, "stop", "prefill", seconds=20.0),)))
    coordinator.send(0, step(0, [len(PROMPT)], **admission(PROMPT)))
    await told(coordinator, 1, "stop at prefill")
    await asyncio.sleep(0.1)
    assert proc_file(pid, "stat").rpartition(") ")[2][:1] == "T"
    os.kill(pid, signal.SIGCONT)
    assert len((await coordinator.expect(StepDone, 0)).tokens) == 1
    await stop(forkserver, coordinator, [pid])


async def test_a_fault_that_has_come_does_not_come_again(
    forkserver: ForkServerProcess, coordinator: CoordinatorEnd, checkpoints: Checkpoints
) -> None:
    """The coordinator may not have heard of it when it sends its list anew."""
    pids = await start_two(forkserver, coordinator, checkpoints("qwen3-moe"), fault_injection=True)
    both = (Injection(1, 0, "raise"), Injection(2, 0, "what", "now"), Injection(3, 0, "kill", "never"))
    for _ in range(3):
        coordinator.send(0, Inject(1, both))
    await told(coordinator, 1, "raise at now")
    await coordinator.expect(Fault, 0)
    await coordinator.leave([0, 1], 2)
    await form_two(coordinator, 2)
    assert not coordinator.holds(Injected)
    assert (await stats_of(coordinator, 2))["injections_refused"] == 6
    await stop(forkserver, coordinator, pids)


async def test_orders_are_refused_by_ranks_that_were_not_made_for_them(
    forkserver: ForkServerProcess, coordinator: CoordinatorEnd, checkpoints: Checkpoints
) -> None:
    pid, _ = await start_one(forkserver, coordinator, checkpoints("qwen3-moe"))
    coordinator.send(0, Inject(1, (Injection(1, 0, "kill"), Injection(2, 0, "exit", "step"))))
    await generate(coordinator, [PROMPT], 2)
    assert (await stats_of(coordinator))["injections_refused"] == 1
    assert not coordinator.holds(Injected)
    await stop(forkserver, coordinator, [pid])
