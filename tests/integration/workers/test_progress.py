"""What ranks tell of themselves without being asked."""

from __future__ import annotations

import os
import signal
import time

import pytest

from drumline.protocol.messages import Shutdown, StepDone
from tests.checkpoints import Checkpoints
from tests.integration.workers.driving import PROMPT, start_one, start_two, stop
from tests.integration.workers.processes import CoordinatorEnd, ForkServerProcess, admission, step


async def test_first_steps_ask_for_time_and_later_ones_do_not(
    forkserver: ForkServerProcess, coordinator: CoordinatorEnd, checkpoints: Checkpoints
) -> None:
    """The interval is so long that no beat comes by itself."""
    pid, _ = await start_one(forkserver, coordinator, checkpoints("qwen3-moe"), beat_interval_s=300.0)
    coordinator.send(0, step(0, [0]))
    await coordinator.expect(StepDone, 0)
    assert [beat.lease_s for beat in coordinator.beats] in ([], [0.0])  # the one that greets
    coordinator.beats.clear()
    for number in range(1, 6):
        parts = admission(PROMPT) if number == 1 else {}
        coordinator.send(0, step(number, [len(PROMPT) if number == 1 else 1], **parts))
        await coordinator.expect(StepDone, 0)
    told = [(beat.step, beat.lease_s) for beat in coordinator.beats]
    assert told[-1][1] == 0.0
    asking = [one for one in told if one[1]]
    assert {number for number, _ in asking} <= {1, 2, 3}
    assert asking[0][0] == 1
    assert all(50.0 < lease_s <= 60.0 for _, lease_s in asking)
    await stop(forkserver, coordinator, [pid])


async def test_who_waits_for_another_says_so_before_the_next_beat_is_due(
    forkserver: ForkServerProcess, coordinator: CoordinatorEnd, checkpoints: Checkpoints
) -> None:
    pids = await start_two(forkserver, coordinator, checkpoints("qwen3-moe"), beat_interval_s=300.0)
    os.kill(pids[1], signal.SIGSTOP)
    coordinator.beats.clear()
    start = time.monotonic()
    coordinator.send(0, step(0, [0, 0]))
    coordinator.send(0, step(1, [len(PROMPT), 0], **admission(PROMPT)))
    while not (coordinator.beats and coordinator.beats[-1].inside):
        await coordinator.expect_beats(1, timeout_s=5.0)
    told = coordinator.beats[-1]
    print(f"told {time.monotonic() - start:.2f} s after the step was sent: {told}")
    assert told.step == 1
    assert 50.0 < told.lease_s < 60.0  # what is left of it
    assert told.collective >= 1
    with pytest.raises(TimeoutError):
        await coordinator.expect_beats(1, timeout_s=1.0)
    os.kill(pids[1], signal.SIGKILL)
    forkserver.expect_exit(pids[1])
    coordinator.send(0, Shutdown(1))
    assert forkserver.expect_exit(pids[0], 5.0)[:2] == (0, 0)
