"""What each replica of a lockstep group computes in the next step.

Rows that decode compute one token each. What is left of the token budget goes to sequences in prefill and then to
waiting ones, lowest priority number first, then earliest arrival. Where blocks are short, the least deserving sequence
is preempted by recompute.
"""

from __future__ import annotations

import numpy as np

from drumline.engine.core.batch_table import DECODE, DRAIN, PREFILL
from drumline.engine.core.block_pool import I64
from drumline.engine.core.config import CoreConfig
from drumline.engine.core.plan import NO_BLOCKS, Admission, Chunk, Plan
from drumline.engine.core.request import Place, Sequence
from drumline.engine.core.residence import Residence
from drumline.engine.core.waiting import WaitingQueue


class Scheduler:
    """The queues of one lockstep group and the rules. Counts what happened in plain attributes."""

    def __init__(self, config: CoreConfig, residence: Residence) -> None:
        self._config = config
        self._residence = residence
        self._table = residence.table
        self._pool = residence.pool
        replicas = residence.table.replicas
        self.waiting = [WaitingQueue() for _ in range(replicas)]
        self._prefilling: list[list[Sequence]] = [[] for _ in range(replicas)]
        self._busy: set[int] = set()
        self._blocked: dict[int, tuple[Sequence, int]] = {}
        self.preemptions = 0
        self.chunked_prefills = 0
        self.admitted = 0

    def add(self, sequence: Sequence) -> None:
        """The sequence waits from now on."""
        self.waiting[sequence.replica].push(sequence)
        self._busy.add(sequence.replica)

    def drop(self, sequence: Sequence, was: Place) -> None:
        """The sequence has ended; ``was`` is where it stood before."""
        if was is Place.WAITING:
            self.waiting[sequence.replica].discard()
        elif sequence in self._prefilling[sequence.replica]:
            self._prefilling[sequence.replica].remove(sequence)

    def plan(self) -> Plan | None:
        """The next step, its blocks allocated and its admissions in their rows; None when nobody has anything to
        compute.

        :meth:`book` must follow with the number of the step.
        """
        preempted, grown, grown_bounds = self._make_room()
        decoding, bounds = self._table.decoding()
        blocks = NO_BLOCKS
        if len(grown):
            blocks = self._pool.allocate_each(grown // self._table.rows_per_replica, _counts(grown_bounds))
        tokens = _counts(bounds).astype(np.int32)
        plan = Plan(tokens, decoding, bounds, grown, grown_bounds, blocks)
        for replica in sorted(self._busy):
            self._fill_budget(plan, replica, admit=replica not in preempted)
        return plan if plan.tokens.any() else None

    def book(self, plan: Plan, step: int) -> tuple[I64, dict[int, list[tuple[int, int]]]]:
        """Moves the table to where it will stand after ``step``.

        Returns the rows that sample in it, ascending, and by replica (row, KV entries after the step) of those that
        prefill. Rows whose last token by length it computes are evicted by the step after.
        """
        table = self._table
        rows = plan.decoding
        lengths = table.length[rows] + 1
        table.length[rows] = lengths
        table.last_step[rows] = step
        if len(plan.grown):
            table.append_blocks(plan.grown, plan.blocks)
        full = rows[lengths >= table.max_length[rows]]
        if len(full):
            self._drain(full)
        fills: dict[int, list[tuple[int, int]]] = {}
        sampling: list[int] = []
        for by_replica in (plan.chunks, plan.admissions):
            for replica, chunks in by_replica.items():
                for chunk in chunks:
                    sequence = chunk.sequence
                    sequence.computed += chunk.count
                    table.last_step[sequence.row] = step
                    fills.setdefault(replica, []).append((sequence.row, sequence.computed))
                    if self._finish_prefill(sequence):
                        sampling.append(sequence.row)
        if sampling:
            rows = np.sort(np.concatenate([rows, np.asarray(sampling, dtype=np.int64)]))
        return rows, fills

    # ---------------------------------------------------------------------------------------------------- token budget

    def _fill_budget(self, plan: Plan, replica: int, admit: bool) -> None:
        budget = self._config.max_num_batched_tokens - int(plan.tokens[replica])
        chunks: list[Chunk] = []
        for sequence, count in self._chunks(replica, budget):
            blocks = self._pool.allocate(replica, self._blocks_missing(sequence, count))
            self._table.extend_prefill(sequence.row, sequence.tokens, blocks)
            chunks.append(Chunk(sequence, count, blocks))
            self.chunked_prefills += 1
            budget -= count
        admissions = self._admit(replica, budget) if admit else []
        if chunks:
            plan.chunks[replica] = chunks
        if admissions:
            plan.admissions[replica] = admissions
        plan.tokens[replica] += sum(chunk.count for chunk in chunks) + sum(chunk.count for chunk in admissions)
        if not self._prefilling[replica] and not self.waiting[replica]:
            self._busy.discard(replica)

    def _chunks(self, replica: int, budget: int) -> list[tuple[Sequence, int]]:
        """Sequences in prefill, the most deserving first, and how much of each the budget lets compute."""
        chunks: list[tuple[Sequence, int]] = []
        for sequence in sorted(self._prefilling[replica], key=_order):
            count = min(len(sequence.tokens) - sequence.computed, budget)
            if count == 0:
                break
            chunks.append((sequence, count))
            budget -= count
        return chunks

    def _admit(self, replica: int, budget: int) -> list[Admission]:
        """Waiting sequences, as long as there are tokens, rows and blocks. One is let in only if the whole of its known
        text fits the free blocks, or it would soon be preempted for its own prefill."""
        admissions: list[Admission] = []
        queue = self.waiting[replica]
        while budget > 0 and self._residence.has_room(replica):
            sequence = queue.head()
            if sequence is None or sequence.row >= 0:
                break
            available = self._pool.available(replica)
            if self._blocked.get(replica, (None, 0)) == (sequence, available):
                break
            sequence.fold_late_tokens()
            admission = self._admission(sequence, budget, available)
            if admission is None:
                break
            self._blocked.pop(replica, None)
            admissions.append(admission)
            budget -= admission.count
        return admissions

    def _admission(self, sequence: Sequence, budget: int, available: int) -> Admission | None:
        size = self._config.block_size
        replica, length = sequence.replica, len(sequence.tokens)
        cached = self._cached_prefix(sequence)
        start = len(cached) * size
        count = length - start
        if count > budget:
            if not self._config.enable_chunked_prefill:
                return None
            count = budget
        if -(-length // size) - len(cached) > available - self._pool.idle_among(cached):
            # Looking the prefix up again in every step would cost more than it could find.
            self._blocked[replica] = (sequence, available)
            return None
        self.waiting[replica].pop()
        row = self._residence.enter(sequence, cached)
        blocks = self._pool.allocate(replica, self._blocks_missing(sequence, count))
        self._table.extend_prefill(row, sequence.tokens, blocks)
        self._prefilling[replica].append(sequence)
        self.admitted += 1
        if count < length - start:
            self.chunked_prefills += 1
        if self._residence.cache is not None:
            self._residence.cache.queried_tokens += length
            self._residence.cache.hit_tokens += start
        if sequence.num_cached < 0:
            sequence.num_cached = min(start, len(sequence.request.prompt))
        return Admission(sequence, count, blocks, cached)

    def _cached_prefix(self, sequence: Sequence) -> I64:
        """At least the last token is always computed, since its logits are needed."""
        cache = self._residence.cache
        if cache is None:
            return NO_BLOCKS
        tokens = sequence.tokens
        states = sequence.request.prefix
        if states is None or len(tokens) > len(sequence.request.prompt):
            states = cache.hasher.states(tokens)
        return cache.lookup(sequence.replica, tokens, states[: (len(tokens) - 1) // self._config.block_size])

    def _blocks_missing(self, sequence: Sequence, count: int) -> int:
        needed = -(-(sequence.computed + count) // self._config.block_size)
        return needed - int(self._table.num_blocks[sequence.row])

    def _finish_prefill(self, sequence: Sequence) -> bool:
        """Whether the row's known text is computed by now, so that it samples; then it decodes from the next step
        on."""
        row, length = sequence.row, len(sequence.tokens)
        if sequence.computed < length:
            return False
        self._prefilling[sequence.replica].remove(sequence)
        self._table.length[row] = length + 1
        if length + 1 >= sequence.max_length:
            self._drain(np.asarray([row]))
        else:
            self._table.set_status(row, DECODE)
        return True

    def _drain(self, rows: I64) -> None:
        self._table.set_statuses(rows, DRAIN)
        for row in rows.tolist():
            self._residence.say_eviction(row)

    # --------------------------------------------------------------------------------------------------------- blocks

    def _make_room(self) -> tuple[set[int], I64, I64]:
        """Preempts until what runs can compute its next tokens.

        Returns the replicas that had to, and the decoding rows that need one more block with where each replica's
        begin.
        """
        preempted: set[int] = set()
        grown, bounds = self._growing()
        suspects = {replica for replica in self._busy if self._prefilling[replica]}
        if len(grown):
            suspects.update(np.flatnonzero(_counts(bounds) > self._pool.available_everywhere()).tolist())
        for replica in suspects:
            if self._make_room_on(replica):
                preempted.add(replica)
        if preempted:
            grown, bounds = self._growing()
        return preempted, grown, bounds

    def _growing(self) -> tuple[I64, I64]:
        rows = self._table.crossing(self._table.decoding()[0])
        return rows, self._table.bounds(rows)

    def _make_room_on(self, replica: int) -> bool:
        preempted = False
        while self._needed(replica) > self._pool.available(replica):
            if not self._detach_draining(replica):
                self._preempt(self._victim(replica))
                preempted = True
        return preempted

    def _needed(self, replica: int) -> int:
        decoding, bounds = self._table.decoding()
        own = decoding[bounds[replica] : bounds[replica + 1]]
        chunks = self._chunks(replica, self._config.max_num_batched_tokens - len(own))
        grown = len(self._table.crossing(own))
        return grown + sum(self._blocks_missing(sequence, count) for sequence, count in chunks)

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
        """Recomputed later from all its tokens, the one in flight included, once no step in flight computes its row."""
        if sequence in self._prefilling[sequence.replica]:
            self._prefilling[sequence.replica].remove(sequence)
        self._residence.detach(sequence)
        sequence.place = Place.WAITING
        self.preemptions += 1
        self.add(sequence)

    def _rows_in(self, replica: int, statuses: tuple[int, ...]) -> list[int]:
        start = replica * self._table.rows_per_replica
        status = self._table.status[start : start + self._table.rows_per_replica]
        rows: list[int] = (np.flatnonzero(np.isin(status, statuses)) + start).tolist()
        return rows

    def requeue(self, sequences: list[Sequence]) -> None:
        """A new epoch: sequences that were in rows and have not ended wait again."""
        for running in self._prefilling:
            running.clear()
        self._blocked.clear()
        for sequence in sequences:
            if sequence.place is Place.RUNNING:
                sequence.place = Place.WAITING
                self.add(sequence)


def _counts(bounds: I64) -> I64:
    """How many there are between each bound and the next. (``np.diff`` takes three times as long.)"""
    return bounds[1:] - bounds[:-1]


def _order(sequence: Sequence) -> tuple[int, int]:
    return sequence.order
