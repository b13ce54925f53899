"""Which worker processes live, with which launch token each was started; no I/O."""

from __future__ import annotations

from collections import defaultdict, deque

from drumline.protocol.messages import Exited, Spawned, Started


class Roster:
    """What a supervisor tells a coordinator that follows another one. Of a start that the one before had ordered, and
    of which nothing was known when it was lost, the process has no place: the next one orders a start of its own."""

    def __init__(self) -> None:
        self._members: dict[int, Started] = {}
        self._ordered: defaultdict[int, deque[tuple[int, str]]] = defaultdict(deque)
        self._term = 0

    @property
    def members(self) -> tuple[Started, ...]:
        """The living processes, by rank."""
        return tuple(sorted(self._members.values(), key=lambda one: one.rank))

    def next_coordinator(self) -> None:
        """What was ordered so far and has not started is of no use any more."""
        self._term += 1

    def ordered(self, rank: int, token: str) -> None:
        """The coordinator has ordered a start."""
        self._ordered[rank].append((self._term, token))

    def spawned(self, message: Spawned) -> bool:
        """A process was started. Whether the coordinator is to be told; else it is to be killed."""
        term, token = self._next_order(message.rank)
        if term != self._term:
            return False
        self._members[message.pid] = Started(message.rank, message.pid, token)
        return True

    def exited(self, message: Exited) -> bool:
        """A process ended, or could not be started (its pid is 0). Whether the coordinator is to be told."""
        if message.pid == 0:
            return self._next_order(message.rank)[0] == self._term
        return self._members.pop(message.pid, None) is not None

    def is_process_of(self, rank: int, pid: int) -> bool:
        """Whether ``pid`` is a living process of ``rank``."""
        found = self._members.get(pid)
        return found is not None and found.rank == rank

    def _next_order(self, rank: int) -> tuple[int, str]:
        orders = self._ordered[rank]
        return orders.popleft() if orders else (-1, "")
