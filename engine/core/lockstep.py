"""One lockstep group: its table, its scheduler, its wave, its steps in flight."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Set
from collections.abc import Sequence as Ordered

import numpy as np

from drumline.engine.core.balance.carrier import Carrier
from drumline.engine.core.batch_table import DETACHED, LEFT, BatchTable
from drumline.engine.core.block_pool import I32, BlockPool
from drumline.engine.core.config import CoreConfig
from drumline.engine.core.gather_counts import GatherCounts
from drumline.engine.core.prefix_cache import PrefixCache, PrefixHasher
from drumline.engine.core.request import Place, Sequence
from drumline.engine.core.residence import Residence
from drumline.engine.core.results import Emission, Ending, InFlight, settle
from drumline.engine.core.scheduler import Scheduler
from drumline.engine.core.step_messages import StepHeader, StepMessages
from drumline.engine.core.wave import Wave
from drumline.protocol.errors import ErrorInfo, ProtocolError
from drumline.protocol.messages import Step, StepDone


class LockstepGroup:
    """The attention replicas whose steps go together. They are numbered from 0 within the group.

    ``hasher`` is None when prefix caching is off.
    """

    def __init__(self, config: CoreConfig, num_blocks: list[int], term: int, hasher: PrefixHasher | None) -> None:
        self.config = config
        self.replicas = len(num_blocks)
        self.term = term
        self.epoch = -1
        # Which replicas compute in the open epoch, ascending: nobody while none is open.
        self.serving: tuple[int, ...] = ()
        # Replicas without rows, whose sequences had better go elsewhere: they do not serve, or have lost their KV.
        self.away = frozenset(range(len(num_blocks)))
        self.held = False
        # What rides on the steps, if anything does.
        self.carrier: Carrier | None = None
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
        self._messages = StepMessages(self.table, self.pool)
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

    def close_epoch(self, lost: Collection[int]) -> list[Sequence]:
        """What is in flight is void; every row stands at its last acknowledged token. What plans have decided stands:
        what they preempted waits, and blocks that they gave away are not given back. The KV of the replicas ``lost`` is
        gone, so their sequences leave their rows and wait.

        Answers that have come must have been settled. Returns the sequences that held rows and do so no longer.
        """
        self._check_replicas(lost)
        self.serving = ()
        self.away |= frozenset(lost)
        self.next_step = 0
        self.in_flight.clear()
        self._acknowledged = [-1] * self.replicas
        self.answers_wait = False
        freed = self._step_back(frozenset(lost))
        self._forget_prefixes(lost)
        self.scheduler.serve(())
        self.update_wave()
        return freed

    def open_epoch(self, epoch: int, serving: Collection[int], kept: Collection[int]) -> list[Sequence]:
        """Steps are planned from here on, numbered anew, for the replicas ``serving``. Of those only ``kept`` still
        have the KV that they had: the first plan states their rows anew. Everything else starts without rows, its
        sequences waiting.

        Returns the sequences that held rows and do so no longer. Raises ``ValueError`` unless ``epoch`` is newer and
        the replicas exist, serve if they are kept, and are at least one.
        """
        if epoch <= self.epoch:
            raise ValueError(f"epoch {epoch} after epoch {self.epoch}")
        self._check_replicas(serving)
        if not serving or not set(kept) <= set(serving):
            raise ValueError(f"replicas {sorted(serving)} serve, of which {sorted(kept)} are kept")
        freed = self.close_epoch(())
        rowless = frozenset(range(self.replicas)) - frozenset(kept)
        freed += self._step_back(rowless)
        self._forget_prefixes(rowless & frozenset(serving))
        self.epoch = epoch
        self.serving = tuple(sorted(serving))
        self.away = frozenset(range(self.replicas)) - frozenset(serving)
        self.scheduler.serve(serving)
        self._cache_due = True
        return freed

    def _forget_prefixes(self, replicas: Collection[int]) -> None:
        if self.cache is not None:
            for replica in replicas:
                self.cache.forget(replica)

    def _step_back(self, lost: Collection[int]) -> list[Sequence]:
        freed = self.residence.void(lost)
        self.scheduler.restart(self.residence.step_back(), freed)
        return freed

    def _check_replicas(self, replicas: Collection[int]) -> None:
        if not set(replicas) <= set(range(self.replicas)):
            raise ValueError(f"replicas {sorted(replicas)} of {self.replicas}")

    # ------------------------------------------------------------------------------------------------------------ step

    @property
    def may_plan(self) -> bool:
        """Whether an epoch is open, nobody holds it, and fewer steps than allowed lack an answer."""
        return bool(self.serving) and not self.held and self.unanswered < self.config.steps_in_flight

    @property
    def unanswered(self) -> int:
        """Steps in flight that some replica has not answered."""
        return sum(1 for record in self.in_flight if record.missing)

    def plan(self, now: float) -> list[tuple[int, Step]]:
        """The next step for every replica that serves, as (replica, step), or nothing: too many in flight, or nobody
        has work.

        A replica without work gets a dummy step while any other has some, or what the carrier demands needs one.
        """
        carrier = self.carrier
        demands = carrier is not None and carrier.demands
        if (self.unfinished == 0 and not demands) or not self.may_plan:
            return []
        plan = self.scheduler.plan()
        if plan is None:
            if not demands:
                return []
            plan = self.scheduler.nothing()
        number = self.next_step
        evictions = self.residence.evictions
        self.residence.evictions = [[] for _ in range(self.replicas)]
        if number == 0:
            # No worker has a row yet, so there is nothing to evict.
            evictions = [[] for _ in range(self.replicas)]
        prefilling = self.scheduler.prefills
        restated = {replica: prefilling.of(replica) for replica in self.serving} if number == 0 else {}
        rows, fills = self.scheduler.book(plan, number)
        serving = self.serving
        tokens = plan.tokens if len(serving) == self.replicas else plan.tokens[list(serving)]
        tokens.setflags(write=False)
        shuffle = carrier.next(number, now) if carrier is not None else None
        header = StepHeader(self.term, self.epoch, self.wave.step(), number, tokens, shuffle)
        self._messages.begin(plan)
        steps = [
            (replica, self._messages.step(header, plan, replica, evictions[replica], restated.get(replica)))
            for replica in serving
        ]
        admitted = [len(plan.admissions.get(replica, ())) for replica in range(self.replicas)]
        bounds: list[int] = self.table.bounds(rows).tolist() if rows is not plan.decoding else plan.bounds.tolist()
        sampled = np.empty(len(rows), dtype=np.int32)
        self.in_flight.append(InFlight(number, rows, bounds, fills, admitted, sampled, len(serving), len(serving)))
        self.next_step += 1
        self.steps += 1
        self.dummy_steps += len(serving) - int(np.count_nonzero(tokens))
        attn_dp = self.config.attention_data_parallel_size
        if attn_dp > 1:
            self.gathers.note(tokens, attn_dp, self.config.attention_tensor_parallel_size)
        return steps

    # --------------------------------------------------------------------------------------------------------- results

    def apply(self, replica: int, done: StepDone) -> None:
        """Acknowledges a replica's step. Raises :class:`ProtocolError` when it is not the one that is due, or does not
        fit.

        The answers of all replicas that have come are booked together by :meth:`settle`, in a few array operations.
        """
        due = self._acknowledged[replica] + 1
        if replica in self.away or not self.serving:
            text = f"rank {done.rank}: step {done.step} came back from a replica that does not serve"
            raise ProtocolError(text, ErrorInfo(kind=ProtocolError.kind, text=text, rank=done.rank, epoch=done.epoch))
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

    def leave(self, sequences: Set[Sequence]) -> None:
        """Waiting sequences that hold no rows go to another replica, of this group or another."""
        self.unfinished -= len(sequences)
        self.scheduler.remove(sequences)

    def take_out(self, sequences: Ordered[Sequence]) -> None:
        """These sequences, none of which has ended, run and wait no longer. Tokens in flight still count."""
        self.scheduler.remove(frozenset(one for one in sequences if one.place is Place.WAITING))
        for sequence in sequences:
            if sequence.place is Place.RUNNING and self.table.status[sequence.row] != DETACHED:
                self.scheduler.prefills.remove(sequence)
                self.residence.detach(sequence)
            sequence.place = Place.HELD

    def put_back(self, sequence: Sequence) -> None:
        """What is in flight for the sequence is discarded, so that its tokens may be changed; it waits to be computed
        anew."""
        running = sequence.place is Place.RUNNING
        if running:
            self.scheduler.prefills.remove(sequence)
        self.residence.leave(sequence)
        if running:
            sequence.place = Place.WAITING
            self.scheduler.add(sequence)

    def rows_in_flight(self) -> set[int]:
        """Rows that steps compute which some replica has not answered."""
        rows: set[int] = set()
        for record in self.in_flight:
            if record.missing:
                rows.update(record.rows.tolist())
                rows.update(row for fills in record.fills.values() for row, _ in fills)
        return rows

    def request_ids(self, rows: Iterable[int]) -> tuple[str, ...]:
        """Whose sequences are in these rows, each request once."""
        found = (self.table.sequences[row] for row in sorted(rows) if 0 <= row < len(self.table.sequences))
        return tuple(dict.fromkeys(one.request.request_id for one in found if one is not None))

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

    def num_known(self, sequence: Sequence) -> int:
        """How many :meth:`known_tokens` there are."""
        row = sequence.row
        if row < 0 or self.table.status[row] in (DETACHED, LEFT):
            return len(sequence.tokens) + len(sequence.late)
        return max(int(self.table.known[row]), len(sequence.tokens))

    def unacknowledged(self, replica: int) -> int:
        """Sequences admitted in steps that the replica has not answered."""
        return sum(r.admitted[replica] for r in self.in_flight if r.step > self._acknowledged[replica])
