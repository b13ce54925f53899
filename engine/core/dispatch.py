"""Which replica has which request: when it is submitted, and again when its replica serves no longer.

All sequences of a request are on one replica. A pin (``data_parallel_rank``) is a wish: where the replica does not
serve, the request goes elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence as Ordered
from typing import Any

import numpy as np
import numpy.typing as npt

from drumline.engine.core.config import CoreConfig
from drumline.engine.core.lockstep import LockstepGroup
from drumline.engine.core.request import Place, Request
from drumline.engine.core.router import Router

U64 = np.ndarray[Any, np.dtype[np.uint64]]
Flags = npt.NDArray[np.bool_]


class Dispatch:
    """Replicas are counted over all groups. ``kv_tokens``: int64 (replicas,), how many tokens the KV blocks of each
    hold."""

    def __init__(self, config: CoreConfig, groups: Ordered[LockstepGroup]) -> None:
        self.kv_tokens = np.concatenate([group.pool.num_blocks for group in groups]).astype(np.int64)
        self.kv_tokens *= config.block_size
        self._config = config
        self._groups = groups
        self._together = groups[0].replicas
        self._router = Router(config.num_replicas)

    def wished(self, dp_rank: int) -> slice:
        """The attention replicas that a request asks for: those of engine replica ``dp_rank``, all for -1."""
        if dp_rank < 0:
            return slice(0, self._config.num_replicas)
        size = self._config.attention_data_parallel_size
        return slice(dp_rank * size, (dp_rank + 1) * size)

    def choose(self, prompt: npt.NDArray[np.int32], states: U64 | None, dp_rank: int) -> int:
        """The replica for a new request: one that it asks for and that serves, else any that serves, else one that it
        will wait for. ``states``: hash states of the prompt's prefixes. At least one that it asks for must fit it."""
        fits = self.kv_tokens >= len(prompt)
        wished = np.zeros(len(fits), dtype=np.bool_)
        wished[self.wished(dp_rank)] = True
        serving = self._serving()
        for candidates in (fits & wished & serving, fits & serving, fits & wished):
            if candidates.any():
                break
        found = np.flatnonzero(candidates)
        if len(found) == 1:
            return int(found[0])
        return self._router.choose(*self._loads(), candidates, self._cached(prompt, states)).replica

    def resettle(self) -> None:
        """Requests on replicas that do not serve go to replicas that do, each to one that fits the longest it may
        become. Those that fit none wait where they are. In the order of their turns; rows were given up before."""
        serving = self._serving()
        if not serving.any():
            return
        waiting, running, unacknowledged = self._loads()
        for group in self._groups:
            moves: list[tuple[Request, int]] = []
            for request in self._homeless(group):
                longest = max(one.max_length for one in request.sequences if one.place is not Place.ENDED)
                fits = serving & (self.kv_tokens + 1 >= longest)
                if not fits.any():
                    continue
                cached = self._cached(request.prompt, request.prefix)
                replica = self._router.choose(waiting, running, unacknowledged, fits, cached).replica
                waiting[replica] += request.unended
                moves.append((request, replica))
            self._move(group, moves)

    def _homeless(self, group: LockstepGroup) -> list[Request]:
        waiting = (one for replica in sorted(group.away) for one in group.scheduler.waiting[replica].all())
        return list(dict.fromkeys(sequence.request for sequence in waiting))

    def _move(self, group: LockstepGroup, moves: list[tuple[Request, int]]) -> None:
        """The sequences of each request of the group, none of which holds a row, wait for that replica."""
        group.leave(frozenset(one for request, _ in moves for one in request.sequences if one.place is Place.WAITING))
        for request, replica in moves:
            request.group, place = divmod(replica, self._together)
            for sequence in request.sequences:
                sequence.replica = place
                if sequence.place is Place.WAITING:
                    self._groups[request.group].add(sequence)

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
