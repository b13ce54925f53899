"""Which replica has which request: when it is submitted, and again when it may not run there any longer.

All sequences of a request are on one replica. A pin (``data_parallel_rank``) is a wish: where the replica does not
serve, the request goes elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Ordered
from typing import Any

import numpy as np
import numpy.typing as npt

from drumline.engine.core.config import CoreConfig
from drumline.engine.core.confinement import Confinement, Flags
from drumline.engine.core.lockstep import LockstepGroup
from drumline.engine.core.request import Place, Request
from drumline.engine.core.router import Router
from drumline.engine.core.waiting import WaitingQueue
from drumline.protocol.messages import Submit

U64 = np.ndarray[Any, np.dtype[np.uint64]]


class Dispatch:
    """Replicas are counted over all groups. ``kv_tokens``: int64 (replicas,), how many tokens the KV blocks of each
    hold. ``confinement``: who may run where."""

    def __init__(self, config: CoreConfig, groups: Ordered[LockstepGroup]) -> None:
        self.kv_tokens = np.concatenate([group.pool.num_blocks for group in groups]).astype(np.int64)
        self.kv_tokens *= config.block_size
        self.confinement = Confinement()
        self._config = config
        self._groups = groups
        self._together = groups[0].replicas
        self._router = Router(config.num_replicas)
        # Who served when an epoch opened last.
        self._served = np.zeros(config.num_replicas, dtype=np.bool_)
        # Requests in no queue, in the order of their arrival.
        self._held: dict[str, Request] = {}

    @property
    def held_sequences(self) -> int:
        """Sequences that wait in no queue."""
        return sum(request.unended for request in self._held.values())

    def held_on(self, replica: int) -> int:
        """Those of them whose request is on the replica."""
        return sum(request.unended for request in self._held.values() if self._replica_of(request) == replica)

    def wished(self, dp_rank: int) -> slice:
        """The attention replicas that a request asks for: those of engine replica ``dp_rank``, all for -1."""
        if dp_rank < 0:
            return slice(0, self._config.num_replicas)
        size = self._config.attention_data_parallel_size
        return slice(dp_rank * size, (dp_rank + 1) * size)

    def choose(self, msg: Submit, states: U64 | None, length: int) -> int:
        """The replica for a new request whose text is ``length`` tokens: one that it asks for and may run on, else any
        that it may run on, else one that it will wait for. ``states``: hash states of the prompt's prefixes."""
        fits = self.kv_tokens >= length
        wished = np.zeros(len(fits), dtype=np.bool_)
        wished[self.wished(msg.data_parallel_rank)] = True
        allowed = self.confinement.allowed(msg.request_id, self._serving(), fits)
        for candidates in (allowed & wished, allowed, fits & wished, fits, wished):
            if candidates.any():
                break
        found = np.flatnonzero(candidates)
        if len(found) == 1:
            return int(found[0])
        return self._router.choose(*self._loads(), candidates, self._cached(msg.prompt, states)).replica

    def enqueue(self, request: Request) -> None:
        """A new request waits on its replica, or where it may not run, in no queue."""
        group = self._groups[request.group]
        replica = self._replica_of(request)
        group.unfinished += request.unended
        place = Place.HELD if self._must_leave(request, replica) else Place.WAITING
        if place is Place.HELD:
            self._held[request.request_id] = request
        for sequence in request.live:
            sequence.place = place
            if place is Place.WAITING:
                group.scheduler.add(sequence)

    # --------------------------------------------------------------------------------------------------------- moving

    def confine(self, confinement: Confinement, requests: Iterable[Request]) -> None:
        """Who may run where has changed, for all of ``requests``. Rows that must be left are; :meth:`resettle` finds
        other places."""
        self.confinement = confinement
        for request in requests:
            if request.unended and self._must_leave(request, self._replica_of(request)):
                self._hold(request)

    def resettle(self) -> bool:
        """Requests on replicas that do not serve, and those in no queue, go to replicas where they may run, each to one
        that fits the longest it may become. Those that fit none wait where they are. In the order of their arrival.
        Whether any goes."""
        serving = self._serving()
        homeless = self._rowless(
            group.scheduler.waiting[replica] for group in self._groups for replica in sorted(group.away)
        )
        homeless += [request for request in self._held.values() if request.rows_held == 0]
        if not homeless:
            return False
        return self._settle(homeless, serving)

    def opened(self) -> None:
        """An epoch has opened: :meth:`resettle`, and where replicas serve that did not before, they get their share of
        all that waits without a row."""
        serving = self._serving()
        gained = serving & ~self._served
        self._served = serving.copy()
        if gained.any() and not self.confinement:
            self._settle(self._rowless(queue for group in self._groups for queue in group.scheduler.waiting), serving)
        else:
            self.resettle()

    def _rowless(self, queues: Iterable[WaitingQueue]) -> list[Request]:
        """Requests that wait in ``queues``, none of whose sequences holds a row."""
        found = dict.fromkeys(sequence.request for queue in queues for sequence in queue.all())
        return [request for request in found if request.rows_held == 0]

    def _settle(self, requests: list[Request], serving: Flags) -> bool:
        requests.sort(key=lambda request: request.sequences[0].arrival)
        loads = self._loads()
        for request in requests:
            if request.request_id not in self._held:
                loads[0][self._replica_of(request)] -= request.unended
        moves: list[tuple[Request, int]] = []
        for request in requests:
            replica = self._find_place(request, serving, loads)
            if replica is None:
                continue
            loads[0][replica] += request.unended
            if replica != self._replica_of(request) or request.request_id in self._held:
                moves.append((request, replica))
        self._move(moves)
        return bool(moves)

    def rows_freed(self) -> bool:
        """Requests in no queue may have given up their last rows. Whether any has found its place."""
        return bool(self._held) and self.resettle()

    def _find_place(self, request: Request, serving: Flags, loads: tuple[npt.NDArray[np.int64], ...]) -> int | None:
        """Where the request goes or stays, None for nowhere: a replica that it asked for if that may be."""
        here = self._replica_of(request)
        allowed = self.confinement.allowed(request.request_id, serving, self._fits(request))
        if not allowed.any():
            return None if self._must_leave(request, here) else here
        wished = np.zeros_like(allowed)
        wished[self.wished(request.submit.data_parallel_rank)] = True
        if (allowed & wished).any():
            allowed &= wished
        waiting, running, unacknowledged = loads
        cached = self._cached(request.prompt, request.prefix)
        return self._router.choose(waiting, running, unacknowledged, allowed, cached).replica

    def _move(self, moves: list[tuple[Request, int]]) -> None:
        """The sequences of each request, none of which holds a row, wait for that replica."""
        for index, group in enumerate(self._groups):
            group.leave(frozenset(one for request, _ in moves if request.group == index for one in request.live))
        for request, replica in moves:
            self._held.pop(request.request_id, None)
            request.group, place = divmod(replica, self._together)
            for sequence in request.sequences:
                sequence.replica = place
            for sequence in request.live:
                sequence.place = Place.WAITING
                self._groups[request.group].add(sequence)

    def _hold(self, request: Request) -> None:
        self._groups[request.group].take_out(request.live)
        self._held[request.request_id] = request

    def ended(self, request: Request) -> None:
        """The request has ended, wherever it waited."""
        self._held.pop(request.request_id, None)

    # ----------------------------------------------------------------------------------------------------------- facts

    def _replica_of(self, request: Request) -> int:
        return request.group * self._together + request.sequences[0].replica

    def _fits(self, request: Request) -> Flags:
        longest = max((sequence.max_length for sequence in request.live), default=0)
        fits: Flags = self.kv_tokens + 1 >= longest
        return fits

    def _must_leave(self, request: Request, replica: int) -> bool:
        return bool(self.confinement) and self.confinement.must_leave(request.request_id, replica, self._fits(request))

    def _serving(self) -> Flags:
        serving = np.zeros(self._config.num_replicas, dtype=np.bool_)
        for index, group in enumerate(self._groups):
            serving[[index * self._together + replica for replica in group.serving]] = True
        return serving

    def _loads(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """int64 (replicas,) each: sequences that wait, that run, and that steps without an answer have admitted."""
        waiting: list[int] = []
        running: list[int] = []
        unacknowledged: list[int] = []
        for group in self._groups:
            for replica in range(group.replicas):
                waiting.append(len(group.scheduler.waiting[replica]))
                running.append(int(group.residence.running[replica]))
                unacknowledged.append(group.unacknowledged(replica))
        return np.asarray(waiting), np.asarray(running), np.asarray(unacknowledged)

    def _cached(self, prompt: npt.NDArray[np.int32], states: U64 | None) -> list[int] | None:
        if not self._config.prefix_affinity or states is None:
            return None
        return [
            len(group.cache.lookup(replica, prompt, states)) * self._config.block_size
            for group in self._groups
            if group.cache is not None
            for replica in range(group.replicas)
        ]
