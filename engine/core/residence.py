"""How sequences enter rows and leave them: rows, blocks and evictions stay consistent here and nowhere else.

A worker runs steps in order. So blocks are free for later steps the moment their row is taken out, because the next
step says the eviction before it gives them to another row. The row itself is reused only once no step in flight
computes it, since results are read by row.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection

import numpy as np

from drumline.engine.core.batch_table import DETACHED, DRAIN, FREE, LEFT, PREFILL, BatchTable
from drumline.engine.core.block_pool import I64, BlockPool
from drumline.engine.core.prefix_cache import PrefixCache
from drumline.engine.core.request import Place, Sequence


class Residence:
    """The rows of one lockstep group and who lives in them. ``cache`` is None when prefix caching is off.

    ``running[r]`` counts the sequences of replica ``r`` that are in a row with their blocks, ``in_lane[r][l]`` those of
    lane ``l``; ``evictions[r]`` holds rows (of the group) that the next step must evict, whatever its lane.
    """

    def __init__(self, table: BatchTable, pool: BlockPool, cache: PrefixCache | None) -> None:
        self.table = table
        self.pool = pool
        self.cache = cache
        self.running = np.zeros(table.replicas, dtype=np.int64)
        self.in_lane = [[0] * table.lanes for _ in range(table.replicas)]
        self.evictions: list[list[int]] = [[] for _ in range(table.replicas)]
        self._leaving: list[list[int]] = [[] for _ in range(table.replicas)]
        per = table.rows_per_replica
        self._free = [list(range(r * per, (r + 1) * per)) for r in range(table.replicas)]

    def free_rows(self, replica: int) -> int:
        """How many rows of the replica are free."""
        return len(self._free[replica])

    def enter(self, sequence: Sequence, cached: I64, lane: int) -> int:
        """Gives the sequence the lowest free row of its replica, with the cached blocks shared. Returns the row."""
        row = heapq.heappop(self._free[sequence.replica])
        sequence.lane = lane
        self.pool.share(sequence.replica, cached)
        self.table.enter(row, sequence, cached)
        states = sequence.request.prefix
        if self.cache is not None:
            count = len(cached)
            known = 0 if states is None else len(states)
            if count > known:
                states = self.cache.hasher.states(sequence.tokens[: count * self.table.block_size])
            self.table.prefix_state[row] = 0 if count == 0 or states is None else states[count - 1]
        sequence.row = row
        sequence.place = Place.RUNNING
        sequence.computed = len(cached) * self.table.block_size
        sequence.request.rows_held += 1
        self.running[sequence.replica] += 1
        self.in_lane[sequence.replica][lane] += 1
        return row

    def say_eviction(self, row: int) -> None:
        """The next step evicts the row, unless one did already."""
        if not self.table.eviction_said[row]:
            self.table.eviction_said[row] = True
            self.evictions[row // self.table.rows_per_replica].append(row)

    def detach(self, sequence: Sequence) -> None:
        """The sequence loses its blocks but not its tokens in flight: those still count when they come."""
        self._vacate(sequence, DETACHED)

    def leave(self, sequence: Sequence) -> None:
        """The sequence has ended. Whatever is in flight for its row is discarded."""
        if sequence.row < 0:
            sequence.fold_late_tokens()
        elif self.table.status[sequence.row] in (DETACHED, LEFT):
            sequence.fold_late_tokens()
            self.table.set_status(sequence.row, LEFT)
        else:
            self._vacate(sequence, LEFT)

    def release(self, acknowledged: list[int]) -> list[Sequence]:
        """Frees the rows that no step in flight computes; ``acknowledged[r]`` is the replica's last acknowledged step.

        Returns the sequences that held them.
        """
        freed: list[Sequence] = []
        for replica, rows in enumerate(self._leaving):
            if not rows:
                continue
            done = [row for row in rows if self.table.last_step[row] <= acknowledged[replica]]
            if not done:
                continue
            self._leaving[replica] = [row for row in rows if self.table.last_step[row] > acknowledged[replica]]
            freed.extend(self._free_row(replica, row) for row in done)
        return freed

    def void(self, lost: Collection[int]) -> list[Sequence]:
        """Nothing is in flight any more, and no worker has a row in its table.

        Everything in rows of the replicas ``lost`` leaves them, keeping its known tokens; rows that had been left are
        free. Returns the sequences that held those.
        """
        for row in np.flatnonzero(self.table.status != FREE).tolist():
            sequence = self.table.sequences[row]
            if sequence is None or self.table.status[row] in (DETACHED, LEFT):
                continue
            if row // self.table.rows_per_replica in lost:
                self.detach(sequence)
        self.table.last_step[:] = -1
        freed = self.release([-1] * self.table.replicas)
        for evictions in self.evictions:
            evictions.clear()
        return freed

    def step_back(self) -> list[Sequence]:
        """Every row that has its blocks stands at its last acknowledged token again, to be computed from the last KV
        entry that an acknowledged step has written. Blocks beyond that entry go back to the pool.

        Due after :meth:`void`. Returns the sequences in those rows.
        """
        table = self.table
        found: list[Sequence] = []
        for row in np.flatnonzero(table.status != FREE).tolist():
            sequence = table.sequences[row]
            if sequence is None:
                raise LookupError(f"row {row} is taken by nobody")
            self._keep_known_text(sequence)
            kept = -(-int(table.filled[row]) // table.block_size)
            self.pool.release(sequence.replica, table.take_blocks(row, kept))
            table.length[row] = table.known[row]
            table.eviction_said[row] = False
            table.set_status(row, PREFILL)
            sequence.computed = int(table.filled[row])
            found.append(sequence)
        return found

    def cache_filled(self, rows: I64) -> None:
        """Enters into the prefix cache the blocks of ``rows`` (ascending) that acknowledged steps have filled since."""
        table, cache = self.table, self.cache
        if cache is None:
            return
        full = table.filled[rows] // table.block_size
        missing = (full - table.hashed[rows]).astype(np.int64)
        due = missing > 0
        if not due.any():
            return
        rows, full, missing = rows[due], full[due], missing[due]
        starts = np.cumsum(missing) - missing
        each = np.repeat(rows, missing)
        index = np.arange(len(each)) - np.repeat(starts - table.hashed[rows], missing)
        blocks = table.blocks[each, index].astype(np.int64)
        sums = np.cumsum(cache.hasher.block_sums(table.history[blocks], index), axis=0, dtype=np.uint64)
        before = np.zeros((len(rows), sums.shape[1]), dtype=np.uint64)
        before[1:] = sums[starts[1:] - 1]
        states = np.repeat(table.prefix_state[rows] - before, missing, axis=0) + sums
        table.prefix_state[rows] = states[starts + missing - 1]
        table.hashed[rows] = full
        cache.insert(each // table.rows_per_replica, blocks, states)

    def cache_all(self) -> None:
        """:meth:`cache_filled` for every row that needs it."""
        if self.cache is None:
            return
        self.cache.purge()
        table = self.table
        due = (table.filled // table.block_size > table.hashed) & (table.status != FREE) & (table.status <= DRAIN)
        self.cache_filled(np.flatnonzero(due))

    def _vacate(self, sequence: Sequence, status: int) -> None:
        row, table = sequence.row, self.table
        self._keep_known_text(sequence)
        self.cache_filled(np.asarray([row]))
        self.pool.release(sequence.replica, table.take_blocks(row))
        table.set_status(row, status)
        self.say_eviction(row)
        self._leaving[sequence.replica].append(row)
        self.running[sequence.replica] -= 1
        self.in_lane[sequence.replica][sequence.lane] -= 1

    def _keep_known_text(self, sequence: Sequence) -> None:
        generated = self.table.text(sequence.row, len(sequence.tokens))
        if len(generated):
            sequence.tokens = np.concatenate([sequence.tokens, generated])

    def _free_row(self, replica: int, row: int) -> Sequence:
        sequence = self.table.sequences[row]
        if sequence is None:
            raise LookupError(f"row {row} is freed twice")
        self.table.clear(row)
        heapq.heappush(self._free[replica], row)
        sequence.row = -1
        sequence.request.rows_held -= 1
        return sequence
