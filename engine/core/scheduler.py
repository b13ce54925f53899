"""What each replica of a lockstep group computes in the next step.

A step is one lane's: its rows that decode compute one token each. What is left of the token budget goes to its
sequences in prefill and then to waiting ones, lowest priority number first, then earliest arrival. Where blocks are
short, the least deserving sequence is preempted by recompute.
"""

from __future__ import annotations

from collections.abc import Iterable, Set

import numpy as np

from drumline.engine.core.batch_table import DECODE, DRAIN
from drumline.engine.core.block_pool import I64
from drumline.engine.core.config import CoreConfig
from drumline.engine.core.lanes import LaneTurns, share_of_lane
from drumline.engine.core.plan import NO_BLOCKS, Admission, Chunk, Plan
from drumline.engine.core.preemption import Preemption
from drumline.engine.core.prefills import Prefills
from drumline.engine.core.request import Place, Sequence
from drumline.engine.core.residence import Residence
from drumline.engine.core.waiting import WaitingQueue


class Scheduler:
    """The queues of one lockstep group and the rules. Counts what happened in plain attributes. ``prefills``: the rows
    that are in prefill."""

    def __init__(self, config: CoreConfig, residence: Residence) -> None:
        self._config = config
        self._residence = residence
        self._table = residence.table
        self._pool = residence.pool
        self.waiting = [WaitingQueue() for _ in range(residence.table.replicas)]
        self._turns = LaneTurns(residence.table.lanes)
        self.prefills = Prefills(residence.table, config.enable_chunked_prefill)
        self._preemption = Preemption(residence, self.prefills, self.add, config.max_num_batched_tokens)
        self._serving: frozenset[int] = frozenset()
        self._busy: set[int] = set()
        self._blocked: dict[int, tuple[Sequence, int]] = {}
        self.chunked_prefills = 0
        self.admitted = 0

    @property
    def preemptions(self) -> int:
        """Sequences that were preempted."""
        return self._preemption.count

    def add(self, sequence: Sequence) -> None:
        """The sequence waits from now on."""
        self.waiting[sequence.replica].push(sequence)
        if sequence.replica in self._serving:
            self._busy.add(sequence.replica)

    def remove(self, sequences: Set[Sequence]) -> None:
        """Sequences that wait for one replica are nothing to the group any more, or are added again."""
        for replica in {sequence.replica for sequence in sequences}:
            self.waiting[replica].remove(sequences)
            self._blocked.pop(replica, None)

    def serve(self, replicas: Iterable[int]) -> None:
        """Only these compute from now on; what waits for others goes on waiting."""
        self._serving = frozenset(replicas)
        self._busy = set(self._serving)

    def drop(self, sequence: Sequence, was: Place) -> None:
        """The sequence has ended; ``was`` is where it stood before."""
        if was is Place.WAITING:
            self.waiting[sequence.replica].discard()
        else:
            self.prefills.remove(sequence)

    def plan(self) -> Plan | None:
        """The next step, its blocks allocated and its admissions in their rows; None when nobody has anything to
        compute. A lane that has nothing to compute on any replica is passed over.

        :meth:`book` must follow with the number of the step.
        """
        for lane in self._turns.order():
            plan = self._plan_lane(lane)
            if plan is not None:
                self._turns.took(lane)
                return plan
        return None

    def nothing(self) -> Plan:
        """A step in which nobody computes."""
        replicas = self._table.replicas
        bounds = np.zeros(replicas + 1, dtype=np.int64)
        return Plan(0, np.zeros(replicas, dtype=np.int32), NO_BLOCKS, bounds, NO_BLOCKS, bounds, NO_BLOCKS)

    def _plan_lane(self, lane: int) -> Plan | None:
        preempted, grown, grown_bounds = self._preemption.make_room(lane, self._busy)
        decoding, bounds = self._table.decoding(lane)
        blocks = NO_BLOCKS
        if len(grown):
            blocks = self._pool.allocate_each(grown // self._table.rows_per_replica, _counts(grown_bounds))
        tokens = _counts(bounds).astype(np.int32)
        plan = Plan(lane, tokens, decoding, bounds, grown, grown_bounds, blocks)
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
        for sequence, count in self.prefills.chunks(replica, plan.lane, budget):
            blocks = self._pool.allocate(replica, self.prefills.blocks_missing(sequence, count))
            self._table.extend_prefill(sequence.row, sequence.tokens, blocks)
            chunks.append(Chunk(sequence, count, blocks))
            self.chunked_prefills += 1
            budget -= count
        if not self._config.enable_chunked_prefill and len(chunks) < self.prefills.count(replica, plan.lane):
            admit = False
        admissions = self._admit(replica, plan.lane, budget) if admit else []
        if chunks:
            plan.chunks[replica] = chunks
        if admissions:
            plan.admissions[replica] = admissions
        plan.tokens[replica] += sum(chunk.count for chunk in chunks) + sum(chunk.count for chunk in admissions)
        if not self.prefills.any(replica) and not self.waiting[replica]:
            self._busy.discard(replica)

    def _admit(self, replica: int, lane: int, budget: int) -> list[Admission]:
        """Waiting sequences, as long as there are tokens, rows and blocks. One is let in only if the whole of its known
        text fits the free blocks, or it would soon be preempted for its own prefill."""
        admissions: list[Admission] = []
        queue = self.waiting[replica]
        room = self._room(replica, lane)
        while budget > 0 and len(admissions) < room:
            sequence = queue.head()
            if sequence is None or sequence.row >= 0:
                break
            available = self._pool.available(replica)
            if self._blocked.get(replica, (None, 0)) == (sequence, available):
                break
            sequence.fold_late_tokens()
            admission = self._admission(sequence, lane, budget, available)
            if admission is None:
                break
            self._blocked.pop(replica, None)
            admissions.append(admission)
            budget -= admission.count
        return admissions

    def _room(self, replica: int, lane: int) -> int:
        """How many waiting sequences the lane may take in: all that find a free row, or with several lanes its share of
        them. The others wait for the turns of theirs."""
        free = self._residence.free_rows(replica)
        head = self.waiting[replica].head() if self._table.lanes > 1 else None
        if head is None:
            return free
        # Those that will find blocks, if all are like the first.
        fit = self._pool.available(replica) // -(-len(head.tokens) // self._config.block_size)
        coming = min(free, len(self.waiting[replica]), max(fit, 1))
        return share_of_lane(self._residence.in_lane[replica], lane, coming)

    def _admission(self, sequence: Sequence, lane: int, budget: int, available: int) -> Admission | None:
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
        row = self._residence.enter(sequence, cached, lane)
        blocks = self._pool.allocate(replica, self.prefills.blocks_missing(sequence, count))
        self._table.extend_prefill(row, sequence.tokens, blocks)
        self.prefills.add(sequence)
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

    def _finish_prefill(self, sequence: Sequence) -> bool:
        """Whether the row's known text is computed by now, so that it samples; then it decodes from the next step
        on."""
        row, length = sequence.row, len(sequence.tokens)
        if sequence.computed < length:
            return False
        self.prefills.remove(sequence)
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

    def restart(self, computed: list[Sequence], freed: list[Sequence]) -> None:
        """What is in flight is void: of the sequences that were in rows, those ``computed`` in part go on in them, and
        those ``freed`` that have not ended wait again."""
        self.prefills.restart(computed)
        self._blocked.clear()
        for sequence in freed:
            if sequence.place is Place.RUNNING:
                sequence.place = Place.WAITING
                self.add(sequence)


def _counts(bounds: I64) -> I64:
    """How many there are between each bound and the next. (``np.diff`` takes three times as long.)"""
    return bounds[1:] - bounds[:-1]
