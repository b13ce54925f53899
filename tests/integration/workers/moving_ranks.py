"""Real ranks whose steps carry what a run of the coordinator has them carry."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from drumline.engine.core.balance.places import ExpertPlaces
from drumline.engine.core.balance.shuffle import Pace, ShuffleRun, layer_plans
from drumline.protocol.layout import slots_per_rank
from drumline.protocol.messages import (
    Call,
    CallResult,
    I32Matrix,
    Load,
    Shuffle,
    Staged,
    StepDone,
)
from drumline.protocol.placement import initial_placement
from tests.integration.workers.driving import EXPERTS, MOE_LAYERS, PROMPT
from tests.integration.workers.processes import (
    CoordinatorEnd,
    ForkServerProcess,
    admission,
    step,
    worker_config,
)

DIGESTS = "tests.faults.expert_digests.ExpertDigests"


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
