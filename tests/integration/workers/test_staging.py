"""Experts that move between the steps of real processes: whole, in their places, at the price of what was missing."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest

from drumline.protocol.messages import (
    NO_FETCHES,
    CancelStage,
    Fault,
    I32Matrix,
    Shuffle,
    Staged,
    StageExperts,
    StepDone,
)
from drumline.protocol.modelspec import ModelSpec
from tests.checkpoints import Checkpoints
from tests.integration.workers.driving import EXPERTS, MOE_LAYERS, PROMPT, placement, stats_of, stop
from tests.integration.workers.moving_ranks import MovingRanks
from tests.integration.workers.processes import (
    CoordinatorEnd,
    ForkServerProcess,
    i32,
)

TOKENS = 110


def turned(placement: I32Matrix, by: int) -> I32Matrix:
    """Each slot gets another expert, no rank one twice."""
    return ((placement + by) % EXPERTS).astype(np.int32)


async def say_tokens(moving: MovingRanks, count: int) -> list[int]:
    """The first tokens of an epoch in which nothing moves."""
    for _ in range(count):
        await moving.compute()
    said, moving.tokens = moving.tokens, []
    moving.epoch += 1
    await moving.form()
    return said


@pytest.mark.parametrize(("ranks", "redundant"), [(2, 3), (3, 4)])
async def test_ranks_say_the_same_while_experts_move_and_each_gets_only_what_it_lacks(
    ranks: int,
    redundant: int,
    forkserver: ForkServerProcess,
    coordinator: CoordinatorEnd,
    checkpoints: Checkpoints,
) -> None:
    model = checkpoints("qwen3-moe")
    spec = ModelSpec.from_folder(str(model))
    assert spec.moe is not None
    expert_bytes = 3 * spec.hidden_size * spec.moe.moe_intermediate_size * 4
    moving = MovingRanks(forkserver, coordinator, ranks, redundant)
    await moving.start(model)
    digests: dict[tuple[int, int], int] = {}
    await moving.check(digests)
    assert len(digests) == len(set(digests.values())) == MOE_LAYERS * EXPERTS
    alone = await say_tokens(moving, TOKENS)
    moving.loads.clear()
    lacking = 0
    for by in (3, 1):
        target = turned(moving.placement, by)
        lacking += moving.move_to(target, parts=by)
        await moving.rest()
        assert (moving.placement == target).all()
        await moving.check(digests)
    assert moving.received == lacking * expert_bytes
    assert moving.tokens == alone[: len(moving.tokens)]
    # A report every fourth step, and in each that commits: of all ranks together, of all tokens.
    reported = sum(int(load.sum()) for reports in moving.loads.values() for load, _ in reports)
    assert {step for step in range(4, moving.step) if step % 4 == 0} < set(moving.loads)
    assert all(len(reports) == ranks for reports in moving.loads.values())
    last = max(moving.loads)
    assert reported == MOE_LAYERS * 2 * (len(PROMPT) + last - 1)
    assert sum(steps for reports in moving.loads.values() for _, steps in reports[:1]) == last
    await stop(forkserver, coordinator, moving.pids)


async def test_a_stage_is_given_up_and_orders_that_come_too_late_or_again_are_counted(
    forkserver: ForkServerProcess, coordinator: CoordinatorEnd, checkpoints: Checkpoints
) -> None:
    moving = MovingRanks(forkserver, coordinator, 2, 2)
    await moving.start(checkpoints("qwen3-moe"))
    digests: dict[tuple[int, int], int] = {}
    before = moving.placement.copy()
    moving.move_to(turned(before, 2), parts=2)
    run = moving.run
    assert run is not None
    await moving.compute()
    run.cancel("the test says so", 0.0)
    moving.say()
    await moving.hear()
    assert run.over
    assert run.cancelled
    assert (moving.placement == before).all()
    await moving.check(digests)
    coordinator.send(0, StageExperts(1, 0, 9, 0, moving.placement[0], NO_FETCHES, i32(0)))
    coordinator.send(0, CancelStage(1, 0, 9))
    coordinator.send(0, CancelStage(1, 1, 1))
    await moving.check(digests)  # the main thread has come past them
    assert (await stats_of(coordinator))["stale"] == 3
    target = turned(before, 1)
    moving.move_to(target)
    await moving.rest()
    assert (moving.placement == target).all()
    await moving.check(digests)
    await stop(forkserver, coordinator, moving.pids)


async def test_a_layer_that_no_rank_lacks_anything_of_is_staged_at_once_and_nothing_is_asked_when_nothing_moves(
    forkserver: ForkServerProcess, coordinator: CoordinatorEnd, checkpoints: Checkpoints
) -> None:
    moving = MovingRanks(forkserver, coordinator, 2, 0)
    await moving.start(checkpoints("qwen3-moe"))
    for rank in (0, 1):
        coordinator.send(rank, StageExperts(1, 1, 4, 1, moving.placement[1], NO_FETCHES, i32(0)))
        staged = await coordinator.expect(Staged, rank, 2.0)
        assert (staged.generation, staged.dropped, staged.bytes_received) == (4, False, 0)
    moving.send_step(Shuffle(4, commit=True))
    for rank in (0, 1):
        assert (await coordinator.expect(StepDone, rank)).load.shape == (MOE_LAYERS, 4)
    assert [layer[1] for layer in await moving.call(0, "expert_state")] == [0, 4, 0]
    await stop(forkserver, coordinator, moving.pids)


async def on_the_move(
    forkserver: ForkServerProcess, coordinator: CoordinatorEnd, checkpoints: Checkpoints
) -> tuple[MovingRanks, dict[tuple[int, int], int]]:
    """Two ranks that are about to change places in every layer, and the digests of their experts."""
    moving = MovingRanks(forkserver, coordinator, 2, 0)
    await moving.start(checkpoints("qwen3-moe"))
    digests: dict[tuple[int, int], int] = {}
    await moving.check(digests)
    moving.move_to(turned(moving.placement, 4), parts=1)
    return moving, digests


async def test_a_commit_of_what_is_not_whole_is_a_fault_before_anything_is_changed(
    forkserver: ForkServerProcess, coordinator: CoordinatorEnd, checkpoints: Checkpoints
) -> None:
    moving, digests = await on_the_move(forkserver, coordinator, checkpoints)
    await moving.compute()
    moving.send_step(Shuffle(1, commit=True))
    for rank in (0, 1):
        fault = await coordinator.expect(Fault, rank)
        assert fault.error.text == "generation 1 is to be committed and is not whole"
    lefts = await coordinator.leave([0, 1], 2)
    assert [left.held[0, : len(left.held[0]) - left.spare].tolist() for left in lefts] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    moving.run, moving.tokens, moving.epoch = None, [], 2
    await moving.form()
    await moving.check(digests)
    moving.move_to(turned(moving.placement, 4))
    await moving.rest()
    await moving.check(digests)
    await stop(forkserver, coordinator, moving.pids)


async def test_what_has_come_from_a_rank_that_is_killed_is_kept_and_serves_the_next_epoch(
    forkserver: ForkServerProcess, coordinator: CoordinatorEnd, checkpoints: Checkpoints
) -> None:
    moving, digests = await on_the_move(forkserver, coordinator, checkpoints)
    run = moving.run
    assert run is not None
    while run.due_at is None:
        moving.send_step(run.next(moving.step, 0.0)[0])
        for rank in (0, 1):
            await coordinator.expect(StepDone, rank)
        moving.tokens, moving.step = [0], moving.step + 1
    for rank in (0, 1):
        await coordinator.expect(Staged, rank)
    os.kill(moving.pids[1], signal.SIGKILL)
    assert forkserver.expect_exit(moving.pids[1])[:2] == (0, signal.SIGKILL)
    (left,) = await coordinator.leave([0], 2)
    assert (left.spare, left.held.shape) == (4, (MOE_LAYERS, 8))
    staged = int(np.flatnonzero((left.held[:, 4:] >= 0).any(axis=1))[0])
    assert left.held[staged].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    # All experts of the layer that was staged are there; those of the others are read.
    rows = [
        (layer, slot, 0 if layer == staged else -1, slot if layer == staged else 0)
        for layer in range(MOE_LAYERS)
        for slot in range(4, 8)
    ]
    await coordinator.configure([0], placement(1), epoch=2, fetches=np.array(rows, dtype=np.int32))
    moving.ranks, moving.placement, moving.starts, moving.epoch = (0,), placement(1), [0, EXPERTS], 2
    await moving.check(digests)
    (left,) = await coordinator.leave([0], 3)
    assert (left.spare, left.held.shape) == (0, (MOE_LAYERS, 8))
    await stop(forkserver, coordinator, moving.pids[:1])
