"""The ranks of a layout as threads of one process, each with its own runner and groups: no sockets, no processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from drumline.protocol.layout import Layout
from drumline.protocol.modelspec import ModelSpec
from drumline.workers.epoch_groups import StepGroups
from drumline.workers.experts.all_to_all import AllToAllExchange
from drumline.workers.layers import ExpertExchange, LocalExchange
from drumline.workers.pipeline import Pipeline
from tests.parity.stepdriver import StepDriver, loaded_runner, worker_config
from tests.parity.threadexchange import ThreadExchange
from tests.parity.threadgroup import ThreadGroup, ThreadMember


class ThreadGroups:
    """Every group of a layout's world, made when first asked for."""

    def __init__(self) -> None:
        self._groups: dict[tuple[str, tuple[int, ...]], ThreadGroup] = {}

    def member(self, name: str, ranks: tuple[int, ...], rank: int) -> ThreadMember:
        key = (name, ranks)
        if key not in self._groups:
            self._groups[key] = ThreadGroup(ranks)
        return self._groups[key].member(rank)


def step_groups(groups: ThreadGroups, layout: Layout, rank: int, *, backend: str = "", moe: bool = True) -> StepGroups:
    """What ``rank`` meets in. ``backend``: all_to_all for that exchange of experts."""
    experts = groups.member("ep", layout.expert_group(rank) if moe else (rank,), rank)
    exchange: ExpertExchange = LocalExchange()
    if moe and layout.ep_size > 1:
        exchange = (
            AllToAllExchange(experts, torch.device("cpu")) if backend == "all_to_all" else ThreadExchange(experts)
        )
    pp = layout.pp_group(rank)
    pipeline = Pipeline(groups.member("pp", pp, rank), groups.member("pp_tokens", pp, rank)) if len(pp) > 1 else None
    return StepGroups(
        tp=groups.member("tp", layout.tp_group(rank), rank),
        attn_tp=groups.member("attn_tp", layout.attn_tp_group(rank), rank),
        experts=experts,
        exchange=exchange,
        pipeline=pipeline,
    )


def thread_driver(folder: Path, *, seed: int = 5, evict_chance: float = 0.05, **sizes: Any) -> StepDriver:
    """A driver of all attention replicas of the layout that ``sizes`` (fields of WorkerConfig) make."""
    config = worker_config(folder, **sizes)
    layout = config.layout
    spec = ModelSpec.from_folder(str(folder))
    groups = ThreadGroups()
    runners = [
        [
            loaded_runner(
                config,
                rank,
                groups=step_groups(groups, layout, rank, backend=config.all2all_backend, moe=spec.is_moe),
            )
            for rank in layout.ranks_of_replica(replica)
        ]
        for replica in range(layout.num_replicas)
    ]
    reporting = [layout.ranks_of_replica(r).index(layout.reporting_rank(r)) for r in range(layout.num_replicas)]
    return StepDriver(runners, seed=seed, evict_chance=evict_chance, share_prefixes=True, reporting=reporting)
