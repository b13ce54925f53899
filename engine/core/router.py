"""Which replica serves a new request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

WAITING_WEIGHT = 4
"""A sequence that waits says more about a replica than one that runs: its rows or blocks are used up."""


@dataclass(frozen=True, slots=True)
class Route:
    """The decision and why it fell."""

    replica: int
    reason: str


class Router:
    """Least loaded first, ties in rotation, so that a burst onto idle replicas spreads evenly.

    The load of a replica is ``4 * waiting + running + unacknowledged``: sequences that wait, that hold a row, and that
    were sent in steps whose results have not come back (their prefill is still ahead of what comes after them).
    """

    def __init__(self, replicas: int) -> None:
        self._turn = 0
        self._replicas = replicas

    def choose(
        self,
        waiting: npt.NDArray[np.int64],
        running: npt.NDArray[np.int64],
        unacknowledged: npt.NDArray[np.int64],
        fits: npt.NDArray[np.bool_],
        cached_tokens: Sequence[int] | None = None,
    ) -> Route:
        """All arrays have one entry per replica. At least one replica must fit the request.

        ``cached_tokens``: how much of the prompt each replica holds; the replica with most of it is taken while it has
        at most one waiting sequence more than the least loaded one. Raises ``LookupError`` if no replica fits.
        """
        candidates = np.flatnonzero(fits)
        if len(candidates) == 0:
            raise LookupError("no replica fits the request")
        load = WAITING_WEIGHT * waiting + running + unacknowledged
        least = load[candidates].min()
        if cached_tokens is not None:
            hits = np.asarray(cached_tokens)[candidates]
            best = int(candidates[hits.argmax()])
            if hits.max() > 0 and load[best] <= least + WAITING_WEIGHT:
                return Route(best, f"holds {int(hits.max())} tokens of the prompt")
        tied = candidates[load[candidates] == least]
        after = tied[tied >= self._turn]
        chosen = int(after[0] if len(after) else tied[0])
        self._turn = (chosen + 1) % self._replicas
        return Route(chosen, f"least loaded: {int(least)}")
