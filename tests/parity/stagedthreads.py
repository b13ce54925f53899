"""The ranks of a world as threads, whose experts move between the steps that they compute together."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from drumline.engine.core.balance.places import ExpertPlaces
from drumline.engine.core.balance.shuffle import Pace, ShuffleRun, layer_plans
from drumline.engine.core.fetches import fetches
from drumline.protocol.layout import slots_per_rank
from drumline.protocol.messages import I32, NO_NUMBERS, CancelStage, I32Matrix, Shuffle, StageExperts, Step
from drumline.protocol.modelspec import ModelSpec
from drumline.protocol.placement import initial_placement
from drumline.workers.epoch_place import EpochPlace
from drumline.workers.experts.parts import expert_bytes
from drumline.workers.experts.shuffler import Shuffler
from drumline.workers.model_runner import ModelRunner, StepOutput
from tests.parity.stepdriver import StepDriver, worker_config
from tests.parity.threadranks import ThreadGroups, step_groups
from tests.parity.threadworld import nothing_new, on_each


class StagedThreads:
    """``runners`` by rank; all of them compute. ``placement``: int32 (layers, slots), shared out as ``slots`` says."""

    def __init__(self, folder: Path, ranks: int, redundant: int, **sizes: Any) -> None:
        sizes = {"data_parallel_size": ranks, "enable_expert_parallel": True, "enable_eplb": True} | sizes
        self.config = worker_config(folder, **sizes)
        self.layout = self.config.layout
        self.spec = ModelSpec.from_folder(str(folder))
        self.num_layers = len(self.spec.moe_layers)
        self.placement = initial_placement(self.num_layers, self.spec.num_experts, ranks, "linear", redundant)
        self.slots: tuple[int, ...] = tuple(slots_per_rank(self.placement.shape[1], ranks))
        self.runners: dict[int, ModelRunner] = {}
        self.run: ShuffleRun | None = None
        self.generation, self.committed = 1, 0
        self._lock = threading.Lock()
        self._shuffles: dict[int, Shuffle | None] = {}
        self.start(*range(ranks))

    def start(self, *ranks: int) -> None:
        """New processes for ``ranks``."""
        bounds = np.cumsum([0, *self.slots])
        for rank in ranks:
            runner = ModelRunner(self.config, self.spec, torch.device("cpu"), self.layout, rank)
            runner.load(np.ascontiguousarray(self.placement[:, bounds[rank] : bounds[rank + 1]]))
            runner.init_kv_cache()
            self.runners[rank] = runner

    def shuffler(self, rank: int) -> Shuffler:
        shuffler = self.runners[rank].experts.shuffler
        assert shuffler is not None
        return shuffler

    # --------------------------------------------------------------------------------------------------------- epochs

    def leave(self, *ranks: int) -> dict[int, tuple[I32Matrix, I32Matrix]]:
        """The epoch is over for all, and ``ranks`` are left: what each has in its slots, and outside of them."""
        self.run = None
        held = {}
        for rank in ranks:
            runner = self.runners[rank]
            runner.part()
            width = runner.held().shape[1] - runner.experts.num_spare
            held[rank] = runner.held()[:, :width], runner.held()[:, width:]
        return held

    def epoch(self, placement: I32Matrix, todo: I32Matrix, slots: Sequence[int], members: Sequence[int]) -> StepDriver:
        """Form an epoch of ``members``, who fetch ``todo`` first; what drives its steps."""
        self.placement, self.slots, self.members = placement, tuple(slots), tuple(members)
        groups, shares = ThreadGroups(), np.array(slots, dtype=np.int32)

        def enter(rank: int) -> None:
            runner, place = self.runners[rank], EpochPlace.of(self.layout, members, rank)
            runner.reset()
            transfer = groups.member("transfer", self.members, rank) if len(members) > 1 else None
            runner.refit(place, placement, shares, todo, transfer, nothing_new, NO_NUMBERS)
            runner.meet(step_groups(groups, place.layout, place.rank))
            shuffle: Any = groups.member("shuffle", self.members, rank) if len(members) > 1 else None
            self.shuffler(rank).open(place, self.slots, (), shuffle)

        on_each(self.members, enter)
        self._shuffles.clear()
        hosts = np.zeros(len(members), dtype=np.int32)
        self.places = ExpertPlaces((self.members,), shares, hosts, (0,) * self.num_layers)
        steppers: list[list[Any]] = [[_Stepper(self, rank)] for rank in members]
        return StepDriver(steppers, seed=1, evict_chance=0.05, share_prefixes=True)

    def fetched(self, held: dict[int, tuple[I32Matrix, I32Matrix]], placement: I32Matrix, slots: Sequence[int]) -> Any:
        """The fetches that the coordinator orders, int32 (n, 4)."""
        inside = {rank: one for rank, (one, _) in held.items()}
        spare: dict[int, I32] = {rank: other for rank, (_, other) in held.items()}
        stage_of = dict.fromkeys(held, 0)
        return fetches(inside, placement, slots, [sorted(held)], [0] * self.num_layers, stage_of, spare)

    # ----------------------------------------------------------------------------------------------------------- plans

    def move_to(self, target: I32Matrix, parts: int = 2) -> None:
        """Have the steps from here on bring ``target`` about."""
        nbytes = expert_bytes(self.runners[self.members[0]].experts.layers[0].row(0))
        rows = []
        for layer, (before, after) in enumerate(zip(self.placement, target, strict=True)):
            for slot in np.flatnonzero(before != after).tolist():
                rank = self.places.slot_rank[slot]
                copies = np.flatnonzero(before == after[slot]).tolist()
                copy = min(copies, key=lambda one: (self.places.slot_rank[one] != rank, one))
                rows.append((layer, slot, int(self.places.slot_rank[copy]), copy))
        plans = layer_plans(target, np.array(rows, dtype=np.int32).reshape(-1, 4), self.places)
        pace = Pace(nbytes, -(-nbytes // parts) * 4, 30.0)
        self.run = ShuffleRun(plans, self.places, pace, 1, 1, self.generation)

    def shuffle_of(self, step: int) -> Shuffle | None:
        """What ``step`` carries: decided when the first rank comes to it, when all have done the one before."""
        with self._lock:
            if step not in self._shuffles:
                self._shuffles[step] = self._next(step)
            return self._shuffles[step]

    def _next(self, step: int) -> Shuffle | None:
        run = self.run
        if run is None:
            return None
        for rank in self.members:
            run.step_done(rank, step - 1)
            staged = self.shuffler(rank).poll(1, 1)
            if staged is not None:
                run.staged(staged)
        for one in run.take():
            if isinstance(one.message, StageExperts):
                self.shuffler(one.rank).stage(one.message)
            elif isinstance(one.message, CancelStage):
                self.shuffler(one.rank).cancel(one.message)
        self.generation = run.generation
        shuffle, committed = run.next(step, 0.0)
        if committed is not None:
            self.placement[committed[0]] = committed[1]
            self.committed += 1
        return shuffle

    def steps(self, driver: StepDriver, count: int) -> None:
        """So many steps, and what has come by their end is taken in."""
        with ThreadPoolExecutor(len(self.members), initializer=torch.set_num_threads, initargs=(1,)) as threads:
            for _ in range(count):
                driver._run_step(threads)
        for rank in self.members:
            staged = self.shuffler(rank).poll(1, 1)
            if staged is not None and self.run is not None:
                self.run.staged(staged)

    @property
    def resting(self) -> bool:
        """Whether nothing is under way."""
        return self.run is None or self.run.over


class _Stepper:
    """A runner whose steps carry what the world has them carry."""

    def __init__(self, world: StagedThreads, rank: int) -> None:
        self._world, self._rank, self._runner = world, rank, world.runners[rank]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def execute(self, step: Step) -> StepOutput:
        shuffle = self._world.shuffle_of(step.step)
        if shuffle is not None:
            self._world.shuffler(self._rank).begin_step(shuffle, lambda _: None)
        return self._runner.execute(step)
