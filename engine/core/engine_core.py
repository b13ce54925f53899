"""The core as the coordinator sees it: messages in, steps and outputs out. No socket, no clock, no task."""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Sequence as Ordered

import numpy as np

from drumline.engine.core.balance.carrier import Carrier
from drumline.engine.core.config import CoreConfig
from drumline.engine.core.confinement import Confinement
from drumline.engine.core.core_status import counters, group_status, replica_status
from drumline.engine.core.lockstep import LockstepGroup
from drumline.engine.core.notes import Notes
from drumline.engine.core.outputs import ConnectionOutput
from drumline.engine.core.prefix_cache import PrefixHasher
from drumline.engine.core.request_book import RequestBook
from drumline.engine.core.restored import RestoredRequest
from drumline.protocol.errors import ErrorInfo, InvalidConfig
from drumline.protocol.messages import Accepted, Cancel, Rejected, Resume, Resumed, Step, StepDone, Stop, Submit
from drumline.protocol.status import GroupStatus, ReplicaStatus, RequestCounts


class EngineCore:
    """Requests of all connections over all replicas.

    Replicas are attention replicas. ``num_blocks``: KV blocks of each. ``seed`` is where the seeds of requests without
    one come from. ``hash_key`` seeds the hashes of the prefix cache: a shell that serves others draws one that nobody
    can guess. Call :meth:`plan` until it returns nothing after every :meth:`apply` and every :meth:`submit`, send what
    it returns, then call :meth:`maintain`. Raises :class:`InvalidConfig` unless every replica has blocks.
    """

    def __init__(self, config: CoreConfig, num_blocks: Ordered[int], term: int, seed: int, hash_key: int = 0) -> None:
        if len(num_blocks) != config.num_replicas or min(num_blocks, default=0) < 1:
            raise InvalidConfig("num_blocks", list(num_blocks), f"{config.num_replicas} counts of 1 or more")
        self.config = config
        self.term = term
        hasher: PrefixHasher | None = None
        if config.enable_prefix_caching:
            hasher = PrefixHasher(config.block_size, config.max_model_len, np.random.default_rng(hash_key))
        together = self._per_group = config.replicas_per_group
        self._groups = [
            LockstepGroup(config, list(num_blocks[i : i + together]), term, hasher)
            for i in range(0, len(num_blocks), together)
        ]
        random = np.random.default_rng([seed & (2**64 - 1), term])
        self._book = RequestBook(config, self._groups, hasher, random)
        # Groups that may have something to plan: what changed since they last had nothing.
        self._ready: set[int] = set()

    # -------------------------------------------------------------------------------------------------------- requests

    def submit(self, connection: int, msg: Submit, now: float) -> Accepted | Rejected:
        """Takes a request in, or says why not. Its sequences wait for rows of the replica that the router chose."""
        self._settle()
        answer = self._book.submit(connection, msg)
        self._ready.update(range(len(self._groups)))
        return answer

    def stop(self, connection: int, msg: Stop) -> None:
        """Ends a sequence after ``num_tokens`` generated tokens, if it has not ended yet. Anything that does not name
        tokens which this connection has been given is ignored and counted."""
        self._settle()
        self._book.stop(connection, msg)
        self._release()

    def cancel(self, connection: int, msg: Cancel, now: float) -> None:
        """Ends what is left of a request with reason abort. Confirmed, among the outputs, once all its rows are free
        and its blocks are back; at once for a request that is not known or has ended."""
        self._settle()
        self._book.cancel(connection, msg)
        self._release()

    def drop_connection(self, connection: int, now: float) -> None:
        """The client is gone: its requests are cancelled and forgotten, but for durable ones, which go on for
        ``resume_window_s`` without a reader."""
        self._settle()
        self._book.drop_connection(connection, now)
        self._release()

    def tick(self, now: float) -> None:
        """Cancels and forgets requests that nobody has come back for in time. Due about once a second."""
        self._settle()
        self._book.tick(now)
        self._release()

    def resume(self, connection: int, msg: Resume) -> Resumed | Rejected:
        """Delivery goes on to ``connection``, after every acknowledged token so far. On a connection that did not have
        the request before, its streams get new handles."""
        self._settle()
        return self._book.readers.resume(connection, msg)

    def connection_of(self, request_id: str) -> int:
        """Who reads the request, 0 for nobody."""
        request = self._book.register.by_id.get(request_id)
        return 0 if request is None else request.connection

    def adopt(self, connection: int, msg: Resume, now: float) -> Resumed | Rejected:
        """:meth:`resume` for a client that may know more than this core: what the core lacks, the request itself or
        its newest tokens, is taken from ``msg``. Rejected as ``diverged``, and the request fails with it, where its
        tokens are others than those known here."""
        self._settle()
        answer = self._book.takeover.adopt(connection, msg)
        self._release()
        return answer

    def forget(self, request_id: str) -> None:
        """The client has acknowledged the end of a request: its id may be used again. One that has not ended stays."""
        self._book.forget(request_id)

    # --------------------------------------------------------------------------------------------------------- journal

    def restore(self, requests: Ordered[RestoredRequest], now: float) -> None:
        """Takes over what another coordinator had accepted, before anything is submitted. The requests wait for
        replicas; nobody reads them until they are resumed, for ``resume_window_s`` at most."""
        self._book.takeover.restore(requests, now)
        self._release()

    def take_notes(self) -> Notes | None:
        """What a journal must know of requests beside the outputs, since the last call; None for nothing. It comes
        before the outputs that are taken with it."""
        return self._book.notes.take()

    def snapshot(self) -> tuple[RestoredRequest, ...]:
        """Every request that has not been forgotten, as notes and outputs taken so far have told it."""
        self._settle()
        return self._book.takeover.snapshot()

    def fail_all(self) -> list[tuple[int, str]]:
        """Gives up every request that has not ended. Returns (connection, request id) of each,
        for the caller to tell why.

        Outputs collected before may still be taken; the requests are forgotten.
        """
        self._settle()
        failed = self._book.fail_all()
        self._release()
        return failed

    # ----------------------------------------------------------------------------------------------------------- steps

    def close_epoch(self, group: int, lost: Collection[int], now: float) -> None:
        """The group's epoch has ended: what is in flight is void, and no step of it is planned until
        :meth:`open_epoch`. ``lost``: replicas, counted within the group, whose KV is gone. Their sequences go on
        elsewhere where any replica serves that they fit, a pinned one too: a pin is a wish, that nothing is lost is the
        promise. Else they wait. May be called again while the group is closed."""
        self._settle()
        self._book.rows_freed(self._groups[group].close_epoch(lost))
        self._resettle()

    def open_epoch(
        self, group: int, epoch: int, serving: Collection[int] | None = None, kept: Collection[int] = ()
    ) -> None:
        """The workers of the replicas ``serving`` (counted within the group, None: all) are ready, with empty tables.
        Steps are numbered from 0 again. ``kept``: those that still have the KV of every row that they had.

        Raises ``ValueError`` unless ``epoch`` is newer and ``kept`` are among ``serving``."""
        self._settle()
        one = self._groups[group]
        self._book.rows_freed(one.open_epoch(epoch, range(one.replicas) if serving is None else serving, kept))
        self._book.dispatch.opened()
        self._moved()

    def hold(self, group: int, held: bool) -> None:
        """While held the group plans no step; those in flight finish."""
        self._groups[group].held = held
        self._ready.add(group)

    def carry(self, group: int, carrier: Carrier | None) -> None:
        """What rides on the steps of the group."""
        self._groups[group].carrier = carrier
        self.wake(group)

    def wake(self, group: int) -> None:
        """The carrier of the group may demand a step now."""
        self._ready.add(group)

    def in_flight(self, group: int) -> int:
        """Steps of the group that some replica has not answered."""
        return self._groups[group].unanswered

    @property
    def serving(self) -> frozenset[int]:
        """The replicas that compute now, by their numbers over all groups."""
        together = self._per_group
        return frozenset(i * together + one for i, group in enumerate(self._groups) for one in group.serving)

    def plan(self, now: float) -> list[tuple[int, Step]]:
        """One step of one group, for all its replicas, as (replica, step); nothing when none may or need be planned."""
        while self._ready:
            index = next(iter(self._ready))
            group = self._groups[index]
            if group.may_plan:
                self._settle_group(group)
                steps = group.plan(now)
                if steps:
                    first = index * self._per_group
                    return [(first + replica, step) for replica, step in steps]
            self._ready.discard(index)
        return []

    def apply(self, replica: int, done: StepDone, now: float) -> None:
        """A replica's answer to its oldest unacknowledged step. Raises :class:`ProtocolError` when it is not that, or
        has the wrong number of tokens, or tokens outside the vocabulary; nothing has changed then."""
        index = replica // self._per_group
        self._groups[index].apply(replica % self._per_group, done)
        self._ready.add(index)

    def maintain(self, now: float) -> None:
        """Work that no step waits for: enters filled blocks into the prefix cache."""
        self._settle()
        for group in self._groups:
            group.cache_filled()

    def outputs(self) -> list[ConnectionOutput]:
        """What is new for each connection since the last call."""
        self._settle()
        return self._book.outbox.take()

    @property
    def idle(self) -> bool:
        """Whether no request is unfinished and no step is in flight."""
        self._settle()
        return all(group.unfinished == 0 and not group.in_flight for group in self._groups)

    # ------------------------------------------------------------------------------------------------------- suspicion

    def suspects(self, group: int) -> tuple[str, ...]:
        """Ids of the requests with a row in a step that some replica that serves has not answered."""
        self._settle()
        one = self._groups[group]
        return one.request_ids(one.rows_in_flight())

    def requests_in_rows(self, group: int, replica: int, rows: Ordered[int]) -> tuple[str, ...]:
        """Ids of the requests in ``rows`` of a replica, both as its worker counts them: within the replica, and the
        replica within its group. Rows that are empty or do not exist have none."""
        one = self._groups[group]
        per = one.table.rows_per_replica
        if not 0 <= replica < one.replicas:
            return ()
        return one.request_ids(replica * per + row for row in rows if 0 <= row < per)

    def told_tokens(self, request_ids: Collection[str]) -> dict[str, int]:
        """How many tokens each of these requests was told, of those that have not ended; of several sequences the one
        with fewest counts."""
        self._settle()
        return self._book.told_tokens(request_ids)

    def fail(self, request_id: str, error: ErrorInfo) -> None:
        """Ends one request with ``error``, which its client is told. One that has ended stays as it is."""
        self._settle()
        self._book.fail(request_id, error)
        self._release()

    def confine(self, active: Collection[str], held: Collection[str], replica: int | None) -> None:
        """From now on requests ``active`` run on ``replica`` (counted over all groups) alone, and nobody else there;
        ``held`` ones run nowhere. Whoever must leave a row is computed anew where it may run; who may run nowhere
        waits. Empty, empty and None end it. Raises ``ValueError`` for a replica without active requests, or none with
        them."""
        self._settle()
        self._book.confine(Confinement(active, held, replica))
        self._release()
        self._resettle()

    # ---------------------------------------------------------------------------------------------------------- status

    def group_status(self) -> tuple[GroupStatus, ...]:
        """Every lockstep group, by ascending id."""
        self._settle()
        return group_status(self.config, self._groups)

    def replica_status(self) -> tuple[ReplicaStatus, ...]:
        """Every attention replica, by ascending dp rank and attention rank."""
        self._settle()
        return replica_status(self.config, self._groups, self._book.dispatch)

    def request_counts(self) -> RequestCounts:
        """Requests accepted, finished, cancelled and failed since the start of the term."""
        return self._book.counts()

    def counters(self) -> dict[str, int]:
        """Counts since the start of the term, by name."""
        return counters(self.config, self._groups) | {"ignored_stops": self._book.ignored_stops}

    # ---------------------------------------------------------------------------------------------------------- inside

    def _settle(self) -> None:
        """Books the answers that :meth:`apply` has kept since the last call. Every reader comes through here first."""
        for group in self._groups:
            if group.answers_wait:
                self._settle_group(group)

    def _settle_group(self, group: LockstepGroup) -> None:
        emissions, endings = group.settle()
        self._book.outbox.add_tokens(emissions)
        self._book.endings(endings)
        if self._book.rows_freed(group.release()):
            self._moved()
        group.update_wave()

    def _resettle(self) -> None:
        self._book.dispatch.resettle()
        self._moved()

    def _moved(self) -> None:
        """Requests have gone from group to group, perhaps."""
        for group in self._groups:
            group.update_wave()
        self._ready.update(range(len(self._groups)))

    def _release(self) -> None:
        """Frees what can be freed after sequences were ended from outside."""
        for index, group in enumerate(self._groups):
            self._book.rows_freed(group.release())
            group.update_wave()
            self._ready.add(index)
