"""One lockstep group: its table, its scheduler, its wave, its steps in flight."""

from __future__ import annotations

from collections import deque

import numpy as np

from drumline.engine.core.batch_table import DETACHED, LEFT, BatchTable
from drumline.engine.core.block_pool import I32, I64, BlockPool
from drumline.engine.core.config import CoreConfig
from drumline.engine.core.gather_counts import GatherCounts
from drumline.engine.core.plan import Plan
from drumline.engine.core.prefix_cache import PrefixCache, PrefixHasher
from drumline.engine.core.request import Place, Sequence
from drumline.engine.core.residence import Residence
from drumline.engine.core.results import Emission, Ending, InFlight, settle
from drumline.engine.core.scheduler import Scheduler
from drumline.engine.core.wave import Wave
from drumline.protocol.errors import ErrorInfo, ProtocolError
from drumline.protocol.messages import Admit, Step, StepDone

_NONE = np.zeros(0, dtype=np.int32)
_NONE.setflags(write=False)


class LockstepGroup:
    """The attention replicas whose steps go together. They are numbered from 0 within the group.

    ``hasher`` is None when prefix caching is off.
    """

    def __init__(self, config: CoreConfig, num_blocks: list[int], term: int, hasher: PrefixHasher | None) -> None:
        self.config = config
        self.replicas = len(num_blocks)
        self.term = term
        self.epoch = -1
        self.pool = BlockPool(num_blocks)
        self.table = BatchTable(
            self.replicas,
            config.max_num_seqs,
            config.max_model_len,
            config.block_size,
            self.pool,
            config.pipeline_parallel_size,
        )
        cache = None if hasher is None else PrefixCache(self.pool, self.table.history, hasher)
        self.cache = cache
        self.residence = Residence(self.table, self.pool, cache)
        self.scheduler = Scheduler(config, self.residence)
        self.wave = Wave()
        self.gathers = GatherCounts()
        self.unfinished = 0
        self.next_step = 0
        self.steps = 0
        self.dummy_steps = 0
        self.in_flight: deque[InFlight] = deque()
        self._acknowledged = [-1] * self.replicas
        self.answers_wait = False
        self._cache_due = False

    # ----------------------------------------------------------------------------------------------------------- epoch

    def open_epoch(self, epoch: int) -> list[Sequence]:
        """Starts numbering steps anew. What is in flight is void; every unfinished sequence is recomputed from its
        last acknowledged token, by workers that hold nothing.

        Returns the sequences that held rows. Raises ``ValueError`` unless ``epoch`` is newer.
        """
        if epoch <= self.epoch:
            raise ValueError(f"epoch {epoch} after epoch {self.epoch}")
        self.epoch = epoch
        self.next_step = 0
        self.in_flight.clear()
        self._acknowledged = [-1] * self.replicas
        self.answers_wait = False
        freed = self.residence.reset()
        self.scheduler.requeue(freed)
        if self.cache is not None:
            for replica in range(self.replicas):
                self.cache.forget(replica)
        self.update_wave()
        return freed

    # ------------------------------------------------------------------------------------------------------------ step

    @property
    def may_plan(self) -> bool:
        """Whether an epoch is open and fewer steps than allowed lack an answer."""
        unanswered = sum(1 for record in self.in_flight if record.missing)
        return self.epoch >= 0 and unanswered < self.config.steps_in_flight

    def plan(self) -> list[Step]:
        """The next step for every replica of the group, or nothing: too many in flight, or nobody has work.

        A replica without work gets a dummy step while any other has some.
        """
        if self.unfinished == 0 or not self.may_plan:
            return []
        plan = self.scheduler.plan()
        if plan is None:
            return []
        number = self.next_step
        evictions = self.residence.evictions
        self.residence.evictions = [[] for _ in range(self.replicas)]
        rows, fills = self.scheduler.book(plan, number)
        steps = self._messages(plan, number, evictions)
        admitted = [len(plan.admissions.get(replica, ())) for replica in range(self.replicas)]
        bounds: list[int] = self.table.bounds(rows).tolist() if rows is not plan.decoding else plan.bounds.tolist()
        tokens = np.empty(len(rows), dtype=np.int32)
        self.in_flight.append(InFlight(number, rows, bounds, fills, admitted, tokens, self.replicas))
        self.next_step += 1
        self.steps += 1
        self.dummy_steps += self.replicas - int(np.count_nonzero(plan.tokens))
        attn_dp = self.config.attention_data_parallel_size
        if attn_dp > 1:
            self.gathers.note(plan.tokens, attn_dp, self.config.attention_tensor_parallel_size)
        return steps

    def _messages(self, plan: Plan, number: int, evictions: list[list[int]]) -> list[Step]:
        rows_per_replica = self.table.rows_per_replica
        wave = self.wave.step()
        owner = plan.grown // rows_per_replica
        grown_rows = (plan.grown - owner * rows_per_replica).astype(np.int32)
        grown_blocks = (plan.blocks - np.asarray(self.pool.first)[owner]).astype(np.int32)
        bounds: list[int] = plan.grown_bounds.tolist()
        plan.tokens.setflags(write=False)
        steps: list[Step] = []
        for replica in range(self.replicas):
            span = slice(bounds[replica], bounds[replica + 1])
            appended, blocks = grown_rows[span], grown_blocks[span]
            admitted: tuple[Admit, ...] = ()
            prefill_rows = prefill_counts = _NONE
            if replica in plan.chunks or replica in plan.admissions:
                appended, blocks = self._with_chunks(plan, replica, appended, blocks)
                admitted = self._admits(plan, replica)
                prefill_rows, prefill_counts = self._prefills(plan, replica)
            gone = evictions[replica]
            evicted = np.asarray([self._local(row) for row in gone], dtype=np.int32) if gone else _NONE
            steps.append(
                Step(
                    self.term,
                    self.epoch,
                    wave,
                    number,
                    plan.tokens,
                    evicted,
                    admitted,
                    appended,
                    blocks,
                    prefill_rows,
                    prefill_counts,
                    plan.lane,
                )
            )
        return steps

    def _with_chunks(self, plan: Plan, replica: int, rows: I32, blocks: I32) -> tuple[I32, I32]:
        more_rows, more_blocks = [rows], [blocks]
        for chunk in plan.chunks.get(replica, ()):
            more_rows.append(np.full(len(chunk.blocks), self._local(chunk.sequence.row), dtype=np.int32))
            more_blocks.append(self._local_blocks(replica, chunk.blocks))
        return np.concatenate(more_rows), np.concatenate(more_blocks)

    def _admits(self, plan: Plan, replica: int) -> tuple[Admit, ...]:
        return tuple(
            Admit(
                self._local(admission.sequence.row),
                admission.sequence.tokens,
                len(admission.sequence.request.prompt),
                len(admission.cached) * self.config.block_size,
                self._local_blocks(replica, np.concatenate([admission.cached, admission.blocks])),
                admission.sequence.request.spec(admission.sequence.index),
                plan.lane,
            )
            for admission in plan.admissions.get(replica, ())
        )

    def _prefills(self, plan: Plan, replica: int) -> tuple[I32, I32]:
        chunks = [*plan.chunks.get(replica, ()), *plan.admissions.get(replica, ())]
        rows = [self._local(chunk.sequence.row) for chunk in chunks]
        return np.asarray(rows, dtype=np.int32), np.asarray([chunk.count for chunk in chunks], dtype=np.int32)

    def _local(self, row: int) -> int:
        return row % self.table.rows_per_replica

    def _local_blocks(self, replica: int, blocks: I64) -> I32:
        return (blocks - self.pool.first[replica]).astype(np.int32)

    # --------------------------------------------------------------------------------------------------------- results

    def apply(self, replica: int, done: StepDone) -> None:
        """Acknowledges a replica's step. Raises :class:`ProtocolError` when it is not the one that is due, or does not
        fit.

        The answers of all replicas that have come are booked together by :meth:`settle`, in a few array operations.
        """
        due = self._acknowledged[replica] + 1
        if (done.term, done.epoch, done.step) != (self.term, self.epoch, due) or due >= self.next_step:
            found = f"term {done.term}, epoch {done.epoch}, step {done.step}"
            valid = f"step {due}" if due < self.next_step else f"none before step {due} is sent"
            text = f"rank {done.rank}: {found} came back; valid: term {self.term}, epoch {self.epoch}, {valid}"
            info = ErrorInfo(kind=ProtocolError.kind, text=text, rank=done.rank, epoch=done.epoch, step=done.step)
            raise ProtocolError(text, info)
        record = self.in_flight[due - self.in_flight[0].step]
        record.store(replica, done, self.config.vocab_size)
        self._acknowledged[replica] = due
        self.answers_wait = True

    def settle(self) -> tuple[list[Emission], list[Ending]]:
        """Books the answers that have come since. The endings returned are still to be carried out by :meth:`end`."""
        if not self.answers_wait:
            return [], []
        self.answers_wait = False
        self._cache_due = True
        emissions: list[Emission] = []
        endings: list[Ending] = []
        for record in self.in_flight:
            if not record.arrived:
                continue
            emission, ended = settle(record, self.table)
            if emission is not None:
                emissions.append(emission)
            endings.extend(ended)
            for ending in ended:
                self.end(ending.sequence)
        while self.in_flight and self.in_flight[0].missing == 0:
            self.in_flight.popleft()
        return emissions, endings

    def add(self, sequence: Sequence) -> None:
        """A new sequence waits for its turn."""
        self.unfinished += 1
        self.scheduler.add(sequence)

    def end(self, sequence: Sequence) -> None:
        """Takes the sequence out. Its blocks are free for the next step; its row follows with :meth:`release`."""
        was, sequence.place = sequence.place, Place.ENDED
        self.scheduler.drop(sequence, was)
        self.residence.leave(sequence)
        self.unfinished -= 1

    def release(self) -> list[Sequence]:
        """Frees the rows that no step in flight computes any more; returns the sequences that held them."""
        return self.residence.release(self._acknowledged)

    def cache_filled(self) -> None:
        """Enters blocks that acknowledged steps have filled into the prefix cache."""
        if self._cache_due:
            self._cache_due = False
            self.residence.cache_all()

    def update_wave(self) -> None:
        """Tells the wave how many sequences are unfinished and steps in flight. Due whenever either may have fallen."""
        self.wave.settle(self.unfinished, len(self.in_flight))

    def known_tokens(self, sequence: Sequence) -> I32:
        """int32: prompt and every token that a worker has acknowledged."""
        sequence_row = sequence.row
        if sequence_row < 0 or self.table.status[sequence_row] in (DETACHED, LEFT):
            late = np.asarray(sequence.late, dtype=np.int32)
            return np.concatenate([sequence.tokens, late])
        return np.concatenate([sequence.tokens, self.table.text(sequence_row, len(sequence.tokens))])

    def unacknowledged(self, replica: int) -> int:
        """Sequences admitted in steps that the replica has not answered."""
        return sum(r.admitted[replica] for r in self.in_flight if r.step > self._acknowledged[replica])
