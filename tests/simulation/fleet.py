"""The workers of all groups and the epochs that they are in: who serves, who has kept its KV, what is on its way."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Collection, Iterable

from drumline.engine.core.config import CoreConfig
from drumline.protocol.messages import Step
from tests.simulation.worker import SimWorker


class Fleet:
    """One simulated worker per attention replica; ``serving[group]`` are those of its open epoch, counted over all
    groups, nobody while it is closed. ``epochs[group]`` is its newest epoch."""

    def __init__(self, config: CoreConfig, num_blocks: list[int], rng: random.Random) -> None:
        self._config = config
        self._num_blocks = num_blocks
        self._random = rng
        self._together = config.replicas_per_group
        groups = len(num_blocks) // self._together
        self.epochs = [0] * groups
        self.serving: list[tuple[int, ...]] = [()] * groups
        self.workers: list[SimWorker | None] = [None] * len(num_blocks)
        self.inbox: list[deque[Step]] = [deque() for _ in num_blocks]
        self.running: set[int] = set()

    def members(self, group: int) -> range:
        """All replicas of the group."""
        return range(group * self._together, (group + 1) * self._together)

    def whole(self, group: int) -> list[int]:
        """The replicas of the group whose KV is still that of the rows they had."""
        return [replica for replica in self.members(group) if self.workers[replica] is not None]

    def close(self, group: int, lost: Iterable[int]) -> None:
        """The epoch ends in the middle of whatever runs: some replicas get through their step, and nobody hears."""
        for replica in self.serving[group]:
            worker = self.workers[replica]
            if worker is not None and self.inbox[replica] and self._random.random() < 0.3:
                worker.execute(self.inbox[replica][0])
        for replica in lost:
            self.workers[replica] = None
        for replica in self.members(group):
            self.inbox[replica].clear()
        self.running.discard(group)
        self.serving[group] = ()

    def open(self, group: int, epoch: int, serving: Collection[int]) -> list[int]:
        """Workers with empty tables. Returns those that have kept their KV."""
        kept = [replica for replica in self.whole(group) if replica in serving]
        self.epochs[group] = epoch
        self.serving[group] = tuple(sorted(serving))
        for replica in self.serving[group]:
            place = self.serving[group].index(replica)
            fresh = SimWorker(self._config, replica, place, self._num_blocks[replica], 1, epoch)
            before = self.workers[replica]
            if before is not None:
                fresh.slots, fresh.wave = before.slots, before.wave
            self.workers[replica] = fresh
        return kept

    def may_start(self, group: int) -> bool:
        """Whether every replica that serves has the next step and none runs another: their collectives meet."""
        serving = self.serving[group]
        return bool(serving) and group not in self.running and all(self.inbox[replica] for replica in serving)
