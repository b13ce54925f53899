"""How a plan becomes a message to each replica: rows and blocks as the replica's workers count them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from drumline.engine.core.batch_table import BatchTable
from drumline.engine.core.block_pool import I32, I64, BlockPool
from drumline.engine.core.plan import Admission, Plan
from drumline.engine.core.request import Sequence
from drumline.protocol.messages import NO_NUMBERS, Admit, Shuffle, Step


@dataclass(slots=True)
class StepHeader:
    """What is the same in the messages to all replicas. ``tokens``: int32 (replicas that serve,)."""

    term: int
    epoch: int
    wave: int
    number: int
    tokens: I32
    shuffle: Shuffle | None = None


class StepMessages:
    """Makes the messages of one lockstep group. :meth:`begin`, then :meth:`step` for each replica that serves."""

    def __init__(self, table: BatchTable, pool: BlockPool) -> None:
        self._table = table
        self._pool = pool
        self._first = np.asarray(pool.first)
        self._rows = NO_NUMBERS
        self._blocks = NO_NUMBERS
        self._bounds: list[int] = []

    def begin(self, plan: Plan) -> None:
        """Sorts out what all replicas get in common operations."""
        per = self._table.rows_per_replica
        owner = plan.grown // per
        self._rows = (plan.grown - owner * per).astype(np.int32)
        self._blocks = (plan.blocks - self._first[owner]).astype(np.int32)
        self._bounds = plan.grown_bounds.tolist()

    def step(
        self, header: StepHeader, plan: Plan, replica: int, evicted: list[int], restated: Iterable[Sequence] | None
    ) -> Step:
        """The message to ``replica``, once the plan is booked. ``evicted``: rows of the group. ``restated``, in the
        first step of an epoch: every sequence in a row of the replica, new ones included."""
        span = slice(self._bounds[replica], self._bounds[replica + 1])
        appended, blocks = self._rows[span], self._blocks[span]
        admissions = plan.admissions.get(replica, ())
        admitted: tuple[Admit, ...] = ()
        prefill_rows = prefill_counts = NO_NUMBERS
        if restated is not None:
            admitted = tuple(self._restate(replica, sequence) for sequence in restated)
        elif admissions:
            admitted = tuple(self._admit(replica, admission) for admission in admissions)
        if replica in plan.chunks or admissions:
            if restated is None:
                appended, blocks = self._with_chunks(plan, replica, appended, blocks)
            prefill_rows, prefill_counts = self._prefills(plan, replica)
        return Step(
            header.term,
            header.epoch,
            header.wave,
            header.number,
            header.tokens,
            np.asarray([self._local(row) for row in evicted], dtype=np.int32) if evicted else NO_NUMBERS,
            admitted,
            appended,
            blocks,
            prefill_rows,
            prefill_counts,
            plan.lane,
            header.shuffle,
        )

    def _restate(self, replica: int, sequence: Sequence) -> Admit:
        """A row with the blocks that it has by the plan, whatever its lane."""
        table, row = self._table, sequence.row
        blocks = table.blocks[row, : table.num_blocks[row]]
        return self._state(replica, sequence, int(table.filled[row]), blocks)

    def _admit(self, replica: int, admission: Admission) -> Admit:
        cached = len(admission.cached) * self._table.block_size
        blocks = np.concatenate([admission.cached, admission.blocks])
        return self._state(replica, admission.sequence, cached, blocks)

    def _state(self, replica: int, sequence: Sequence, num_cached: int, blocks: I32 | I64) -> Admit:
        return Admit(
            self._local(sequence.row),
            sequence.tokens,
            len(sequence.request.prompt),
            num_cached,
            self._local_blocks(replica, blocks),
            sequence.request.spec(sequence.index),
            sequence.lane,
        )

    def _with_chunks(self, plan: Plan, replica: int, rows: I32, blocks: I32) -> tuple[I32, I32]:
        more_rows, more_blocks = [rows], [blocks]
        for chunk in plan.chunks.get(replica, ()):
            more_rows.append(np.full(len(chunk.blocks), self._local(chunk.sequence.row), dtype=np.int32))
            more_blocks.append(self._local_blocks(replica, chunk.blocks))
        return np.concatenate(more_rows), np.concatenate(more_blocks)

    def _prefills(self, plan: Plan, replica: int) -> tuple[I32, I32]:
        chunks = [*plan.chunks.get(replica, ()), *plan.admissions.get(replica, ())]
        rows = [self._local(chunk.sequence.row) for chunk in chunks]
        return np.asarray(rows, dtype=np.int32), np.asarray([chunk.count for chunk in chunks], dtype=np.int32)

    def _local(self, row: int) -> int:
        return row % self._table.rows_per_replica

    def _local_blocks(self, replica: int, blocks: I32 | I64) -> I32:
        local: I32 = (blocks - self._pool.first[replica]).astype(np.int32)
        return local
