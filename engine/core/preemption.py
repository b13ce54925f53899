"""Blocks for what runs: where they are short, the least deserving sequence of the replica is preempted by recompute."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from drumline.engine.core.batch_table import DECODE, DRAIN, PREFILL
from drumline.engine.core.block_pool import I64
from drumline.engine.core.prefills import Prefills
from drumline.engine.core.request import Place, Sequence
from drumline.engine.core.residence import Residence


class Preemption:
    """Makes room for the rows of a lane; who gives way may be of any lane. ``requeue`` takes a sequence that waits
    again. ``budget``: tokens of a step. ``count``: sequences preempted so far."""

    def __init__(
        self, residence: Residence, prefills: Prefills, requeue: Callable[[Sequence], None], budget: int
    ) -> None:
        self.count = 0
        self._residence = residence
        self._table = residence.table
        self._pool = residence.pool
        self._prefills = prefills
        self._requeue = requeue
        self._budget = budget

    def make_room(self, lane: int, busy: Iterable[int]) -> tuple[set[int], I64, I64]:
        """Preempts until the rows of the lane can compute their next tokens. ``busy``: replicas that may have rows in
        prefill.

        Returns the replicas that had to, and the decoding rows of the lane that need one more block with where each
        replica's begin.
        """
        preempted: set[int] = set()
        grown, bounds = self._growing(lane)
        suspects = {replica for replica in busy if self._prefills.any(replica)}
        if len(grown):
            suspects.update(np.flatnonzero(bounds[1:] - bounds[:-1] > self._pool.available_everywhere()).tolist())
        for replica in suspects:
            if self._make_room_on(replica, lane):
                preempted.add(replica)
        if preempted:
            grown, bounds = self._growing(lane)
        return preempted, grown, bounds

    def _growing(self, lane: int) -> tuple[I64, I64]:
        rows = self._table.crossing(self._table.decoding(lane)[0])
        return rows, self._table.bounds(rows)

    def _make_room_on(self, replica: int, lane: int) -> bool:
        preempted = False
        while self._needed(replica, lane) > self._pool.available(replica):
            if not self._detach_draining(replica):
                self._preempt(self._victim(replica))
                preempted = True
        return preempted

    def _needed(self, replica: int, lane: int) -> int:
        decoding, bounds = self._table.decoding(lane)
        own = decoding[bounds[replica] : bounds[replica + 1]]
        chunks = self._prefills.chunks(replica, lane, self._budget - len(own))
        grown = len(self._table.crossing(own))
        return grown + sum(self._prefills.blocks_missing(sequence, count) for sequence, count in chunks)

    def _detach_draining(self, replica: int) -> bool:
        """Rows whose last token is in flight need their blocks no longer: the coming step evicts them anyway."""
        rows = self._rows_in(replica, (DRAIN,))
        for row in rows:
            sequence = self._table.sequences[row]
            if sequence is not None:
                self._residence.detach(sequence)
        return bool(rows)

    def _victim(self, replica: int) -> Sequence:
        """The least deserving sequence of the replica: highest priority number, then latest arrival."""
        rows = np.asarray(self._rows_in(replica, (PREFILL, DECODE)))
        if len(rows) == 0:
            raise LookupError(f"replica {replica} lacks blocks while nothing runs on it")
        order = np.lexsort((self._table.arrival[rows], self._table.priority[rows]))
        sequence = self._table.sequences[int(rows[order[-1]])]
        if sequence is None:
            raise LookupError(f"row {rows[order[-1]]} runs without a sequence")
        return sequence

    def _preempt(self, sequence: Sequence) -> None:
        """Recomputed later from all its tokens, those in flight included, once no step in flight computes its row."""
        self._prefills.remove(sequence)
        self._residence.detach(sequence)
        sequence.place = Place.WAITING
        self.count += 1
        self._requeue(sequence)

    def _rows_in(self, replica: int, statuses: tuple[int, ...]) -> list[int]:
        start = replica * self._table.rows_per_replica
        status = self._table.status[start : start + self._table.rows_per_replica]
        rows: list[int] = (np.flatnonzero(np.isin(status, statuses)) + start).tolist()
        return rows
