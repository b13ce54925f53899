"""Experts that move between the steps of real processes: whole, in their places, at the price of what was missing."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from drumline.engine.core.balance.places import ExpertPlaces
from drumline.engine.core.balance.shuffle import Pace, ShuffleRun, layer_plans
from drumline.protocol.layout import slots_per_rank
from drumline.protocol.messages import (
    NO_FETCHES,
    Call,
    CallResult,
    CancelStage,
    Fault,
    I32Matrix,
    Load,
    Shuffle,
    Staged,
    StageExperts,
    StepDone,
)
from drumline.protocol.modelspec import ModelSpec
from drumline.protocol.placement import initial_placement
from tests.checkpoints import Checkpoints
from tests.integration.workers.driving import EXPERTS, MOE_LAYERS, PROMPT, placement, stats_of, stop
from tests.integration.workers.processes import (
    CoordinatorEnd,
    ForkServerProcess,
    admission,
    i32,
    step,
    worker_config,
)

DIGESTS = "tests.faults.expert_digests.ExpertDigests"
TOKENS = 110


class MovingRanks:
    """Real ranks in one epoch, whose steps carry what a run of the coordinator has them carry. ``tokens``: what the row
    of rank 0 has said. ``loads``: the reports of each step, by step and rank. ``received``: bytes, as ranks said."""

    def __init__(self, forkserver: ForkServerProcess, coordinator: CoordinatorEnd, ranks: int, redundant: int) -> None:
        self.forkserver, self.coordinator, self.ranks = forkserver, coordinator, tuple(range(ranks))
        self.placement = initial_placement(MOE_LAYERS, EXPERTS, ranks, "linear", redundant)
        self.slots = slots_per_rank(EXPERTS + redundant, ranks)
        self.starts = np.cumsum([0, *self.slots]).tolist()
        self.places = ExpertPlaces(
            (self.ranks,), np.array(self.slots, np.int32), np.zeros(ranks, np.int32), (0,) * MOE_LAYERS
        )
        self.run: ShuffleRun | None = None
        self.epoch, self.step, self.generation = 1, 0, 1
        self.tokens: list[int] = []
        self.loads: dict[int, list[Any]] = {}
        self.received = 0
        self.pids: list[int] = []

    async def start(self, model: Path) -> None:
        config = worker_config(
            model,
            dp=len(self.ranks),
            expert_parallel=True,
            enable_eplb=True,
            load_interval=4,
            worker_extension_cls=DIGESTS,
        )
        self.pids = [self.forkserver.spawn(rank, self.coordinator.endpoint) for rank in self.ranks]
        for rank in self.ranks:
            await self.coordinator.welcome(rank, config)
        for rank in self.ranks:
            own = np.ascontiguousarray(self.placement[:, self.starts[rank] : self.starts[rank + 1]])
            self.coordinator.send(rank, Load(1, own))
        await self.form()

    async def form(self) -> None:
        store = await self.coordinator.open_store(self.ranks[0], self.epoch)
        await self.coordinator.configure(list(self.ranks), self.placement, epoch=self.epoch, store=store)
        self.step = 0

    # ----------------------------------------------------------------------------------------------------------- plans

    def move_to(self, target: I32Matrix, parts: int = 2) -> int:
        """Have the steps from here on bring ``target`` about. Returns how many experts ranks lack for that."""
        rows = []
        for layer, (before, after) in enumerate(zip(self.placement, target, strict=True)):
            for slot in np.flatnonzero(before != after).tolist():
                rank = self.places.slot_rank[slot]
                copies = np.flatnonzero(before == after[slot]).tolist()
                copy = min(copies, key=lambda one: (self.places.slot_rank[one] != rank, one))
                rows.append((layer, slot, int(self.places.slot_rank[copy]), copy))
        moves = np.array(rows, dtype=np.int32)
        plans = layer_plans(target, moves, self.places)
        self.run = ShuffleRun(plans, self.places, Pace(100, -(-100 // parts), 30.0), 1, self.epoch, self.generation)
        self.say()
        return int((self.places.slot_rank[moves[:, 1]] != moves[:, 2]).sum())

    def say(self) -> None:
        """What the run has to say."""
        if self.run is not None:
            for one in self.run.take():
                self.coordinator.send(one.rank, one.message)
            self.generation = self.run.generation

    async def compute(self) -> None:
        """One step, in which the row of rank 0 says a token, and the others are idle."""
        shuffle, committed = self.run.next(self.step, 0.0) if self.run is not None else (None, None)
        self.send_step(shuffle)
        self.say()
        if committed is not None:
            self.placement[committed[0]] = committed[1]
        for rank in self.ranks:
            done = await self.coordinator.expect(StepDone, rank)
            assert (done.epoch, done.step) == (self.epoch, self.step)
            self.tokens += done.tokens.tolist()
            if done.load.size:
                self.loads.setdefault(self.step, []).append((done.load, done.load_steps))
            if self.run is not None:
                self.run.step_done(rank, self.step)
        self.step += 1
        await self.hear()

    def send_step(self, shuffle: Shuffle | None) -> None:
        first = not self.tokens
        across = [len(PROMPT) if first else 1, *[0] * (len(self.ranks) - 1)]
        for rank in self.ranks:
            parts = admission(PROMPT, 0, tuple(range(8))) if first and rank == 0 else {}
            self.coordinator.send(rank, step(self.step, across, epoch=self.epoch, shuffle=shuffle, **parts))

    async def hear(self) -> None:
        """Ranks that have all that they get say so, also when nothing else is said to them."""
        run = self.run
        while run is not None and run.due_at is not None and run.late()[1]:
            staged = await self.coordinator.expect(Staged)
            assert run.staged(staged)
            self.received += staged.bytes_received
            self.say()

    async def rest(self) -> None:
        """Steps until the plan has been carried out."""
        assert self.run is not None
        for _ in range(200):
            if self.run.over:
                return
            await self.compute()
        raise AssertionError("the plan does not come to an end")

    # ---------------------------------------------------------------------------------------------------------- checks

    async def call(self, rank: int, method: str) -> Any:
        self.coordinator.send(rank, Call(1, self.epoch, 5, method))
        answer = await self.coordinator.expect(CallResult, rank)
        assert answer.ok, answer.error
        return msgspec.msgpack.decode(answer.value)

    async def check(self, digests: dict[tuple[int, int], int]) -> None:
        """Every slot of every rank holds its expert, by its canary and by its bytes. ``digests``: what the bytes of
        each (layer, expert) are known to be; those that are not are learned."""
        for rank in self.ranks:
            weights = await self.call(rank, "expert_digests")
            state = await self.call(rank, "expert_state")
            for (number, _, held, canaries), (_, found) in zip(state, weights, strict=True):
                assert held == self.placement[number, self.starts[rank] : self.starts[rank + 1]].tolist()
                assert canaries == [(number << 32) + expert for expert in held]
                for expert, digest in zip(held, found, strict=True):
                    assert digests.setdefault((number, expert), digest) == digest, (rank, number, expert)


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


async def test_a_commit_of_what_is_not_whole_is_a_fault_before_anything_is_changed(
    forkserver: ForkServerProcess, coordinator: CoordinatorEnd, checkpoints: Checkpoints
) -> None:
    moving = MovingRanks(forkserver, coordinator, 2, 0)
    await moving.start(checkpoints("qwen3-moe"))
    digests: dict[tuple[int, int], int] = {}
    await moving.check(digests)
    moving.move_to(turned(moving.placement, 4), parts=1)
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
    moving = MovingRanks(forkserver, coordinator, 2, 0)
    await moving.start(checkpoints("qwen3-moe"))
    digests: dict[tuple[int, int], int] = {}
    await moving.check(digests)
    moving.move_to(turned(moving.placement, 4), parts=1)
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
