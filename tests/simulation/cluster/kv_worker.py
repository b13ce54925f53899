"""A replica's batch table and KV cache in one epoch; the cache outlives the epoch in the processes that hold it."""

from __future__ import annotations

import random

from drumline.engine.core.config import CoreConfig
from drumline.protocol.messages import Step
from tests.simulation.worker import SimWorker

HALF_WRITTEN = -2


class EpochWorker(SimWorker):
    """``slots``: the KV cache as the replica's processes have it. The table starts empty."""

    def __init__(
        self, config: CoreConfig, rank: int, place: int, slots: list[int], term: int, epoch: int, num_blocks: int
    ) -> None:
        super().__init__(config, rank, place, num_blocks, term, epoch)
        self.slots = slots

    def computing(self, step: Step) -> list[tuple[int, int]]:
        """(row, seed) of each row that ``step`` computes, without running it."""
        found = [(row, self.rows[row].sampling.seed) for row in step.prefill_rows.tolist() if row in self.rows]
        admitted = {admit.row: admit.sampling.seed for admit in step.admitted}
        evicted = set(step.evicted.tolist())
        found = [(row, admitted.get(row, seed)) for row, seed in found]
        known = {row for row, _ in found}
        found += [(row, admitted[row]) for row in step.prefill_rows.tolist() if row in admitted and row not in known]
        found += [
            (number, row.sampling.seed)
            for number, row in self.rows.items()
            if row.has_sampled and row.lane == step.lane and number not in evicted and number not in admitted
        ]
        return sorted(found)

    def abandon(self, step: Step, chance: random.Random) -> None:
        """The step was given up half-way: what it would have written may be anything. No more steps come."""
        for row in step.evicted.tolist():
            self.rows.pop(row, None)
        for admit in step.admitted:
            self._admit(step, admit)
        self._append(step)
        size = self.config.block_size
        for number, count in self._counts(step).items():
            row = self.rows[number]
            for position in range(row.computed, row.computed + count):
                if chance.random() < 0.7:
                    self.slots[row.blocks[position // size] * size + position % size] = HALF_WRITTEN
