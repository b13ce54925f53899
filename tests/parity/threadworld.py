"""The ranks of a world as threads, over several epochs: ranks go, come back and park, and experts move."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
import torch

from drumline.engine.core.cover import cover
from drumline.engine.core.fetches import fetches
from drumline.engine.core.slots import choose_slots
from drumline.protocol.messages import I32, NO_FETCHES, NO_NUMBERS, I32Matrix
from drumline.protocol.modelspec import ModelSpec
from drumline.protocol.placement import PlacementMaps
from drumline.protocol.shards import layer_split
from drumline.workers.epoch_place import EpochPlace
from drumline.workers.model_runner import ModelRunner
from tests.parity.stepdriver import StepDriver, first_experts, worker_config
from tests.parity.threadranks import ThreadGroups, step_groups

REFIT_DEADLINE_S = 30.0
Plan = tuple[I32Matrix, I32, I32Matrix]
"""Placement, slots and fetches, as in Configure."""


def nothing_new() -> None:
    """No newer epoch has been ordered."""


class ThreadWorld:
    """``runners``: the ranks that live, by their number in the whole world. ``plan``: of the newest epoch."""

    def __init__(self, folder: Path, **sizes: Any) -> None:
        self.config = worker_config(folder, **sizes)
        self.layout = self.config.layout
        self.spec = ModelSpec.from_folder(str(folder))
        self.runners: dict[int, ModelRunner] = {}
        self.start(*range(self.layout.num_ranks))
        self.plan: Plan

    def start(self, *ranks: int) -> None:
        """New processes for ``ranks``, with the experts that they have at the engine's start."""
        for rank in ranks:
            runner = ModelRunner(self.config, self.spec, torch.device("cpu"), self.layout, rank)
            runner.load(first_experts(self.config, self.spec, rank)[1])
            runner.init_kv_cache()
            self.runners[rank] = runner

    def epoch(self, members: Sequence[int], parked: Sequence[int] = (), *, seed: int = 0) -> StepDriver:
        """Form an epoch and return what drives its steps. Ranks that are in neither list are gone."""
        everyone = (*members, *parked)
        self.runners = {rank: self.runners[rank] for rank in everyone}
        self.plan = self.planned(members, parked)
        groups = ThreadGroups()

        def enter(rank: int) -> None:
            runner, place = self.runners[rank], EpochPlace.of(self.layout, members, rank)
            runner.part()
            runner.reset()
            transfer = groups.member("transfer", everyone, rank) if len(everyone) > 1 else None
            runner.refit(place, *self.plan, transfer, nothing_new)
            if not place.parked:
                backend, moe = self.config.all2all_backend, self.spec.is_moe
                runner.meet(step_groups(groups, place.layout, place.rank, backend=backend, moe=moe))

        on_each(everyone, enter)
        layout = EpochPlace.of(self.layout, members, members[0]).layout
        replicas = [layout.ranks_of_replica(replica) for replica in range(layout.num_replicas)]
        runners = [[self.runners[members[place]] for place in replica] for replica in replicas]
        reporting = [places.index(layout.reporting_rank(r)) for r, places in enumerate(replicas)]
        return StepDriver(runners, seed=seed, evict_chance=0.05, share_prefixes=True, reporting=reporting)

    def planned(self, members: Sequence[int], parked: Sequence[int] = ()) -> Plan:
        """What the coordinator would order."""
        placement, _ = first_experts(self.config, self.spec, 0)
        if not self.layout.enable_expert_parallel:
            return placement, NO_NUMBERS, NO_FETCHES
        layout, stages = self.layout, range(self.layout.pipeline_parallel_size)
        spans = layer_split(self.spec.num_layers, len(stages), layout.pipeline_partition)
        layer_stage = [next(s for s in stages if layer < spans[s][1]) for layer in self.spec.moe_layers]
        stage_of = {rank: layout.coordinates(rank).pp_rank for rank in (*members, *parked)}
        by_stage = [[rank for rank in members if stage_of[rank] == stage] for stage in stages]
        maps = PlacementMaps.build(placement, self.spec.num_experts, layout.ep_size)
        initial = [len(maps.local_slots(layout.ep_rank(rank))) for rank in by_stage[0]]
        slots = choose_slots(self.spec.num_experts, initial, [self.spec.num_experts] * len(initial))
        assert slots is not None
        held = {rank: self.runners[rank].held() for rank in (*members, *parked)}
        joined = [_joined([held[stage[place]] for stage in by_stage]) for place in range(len(initial))]
        wanted = cover(joined, slots, self.spec.num_experts)
        todo = fetches(held, wanted, slots, by_stage, layer_stage, stage_of)
        return wanted, np.array(slots, dtype=np.int32), todo


def _joined(of_stages: Sequence[I32Matrix]) -> I32Matrix:
    """Each stage knows its own layers, and says -1 of others."""
    width = max(held.shape[1] for held in of_stages)
    padded = [np.pad(held, ((0, 0), (0, width - held.shape[1])), constant_values=-1) for held in of_stages]
    joined: I32Matrix = np.max(padded, axis=0)
    return joined


def on_each(ranks: Sequence[int], function: Callable[[int], None]) -> None:
    """``function`` on a thread for each of ``ranks``; the first error of any is raised."""
    with ThreadPoolExecutor(len(ranks), initializer=torch.set_num_threads, initargs=(1,)) as threads:
        runs = [threads.submit(function, rank) for rank in ranks]
        done, _ = wait(runs, REFIT_DEADLINE_S, FIRST_EXCEPTION)
        for run in done:
            run.result()
        for run in runs:
            run.result(REFIT_DEADLINE_S)
