"""Sequences that wait for a row of one replica."""

from __future__ import annotations

import heapq
from collections.abc import Set

from drumline.engine.core.request import Place, Sequence

_COMPACT_ABOVE = 64


class WaitingQueue:
    """Lowest priority number first, then earliest arrival. A preempted sequence keeps its arrival, so it comes first.

    A sequence that ends while it waits is dropped when it reaches the head, or when dead entries outnumber the living.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, Sequence]] = []
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def push(self, sequence: Sequence) -> None:
        """``sequence`` waits, at the place that its priority and arrival give it."""
        heapq.heappush(self._heap, (*sequence.order, sequence))
        self._size += 1

    def head(self) -> Sequence | None:
        """The sequence whose turn it is."""
        while self._heap:
            sequence = self._heap[0][2]
            if sequence.place is Place.WAITING:
                return sequence
            heapq.heappop(self._heap)
        return None

    def pop(self) -> Sequence:
        """Takes out :meth:`head`. Raises ``IndexError`` when nothing waits."""
        sequence = self.head()
        if sequence is None:
            raise IndexError("nothing waits")
        heapq.heappop(self._heap)
        self._size -= 1
        return sequence

    def all(self) -> list[Sequence]:
        """Everything that waits here, by turn."""
        return [entry[2] for entry in sorted(self._heap) if entry[2].place is Place.WAITING]

    def remove(self, gone: Set[Sequence]) -> None:
        """Takes out sequences that wait from now on elsewhere."""
        self._heap = [entry for entry in self._heap if entry[2].place is Place.WAITING and entry[2] not in gone]
        heapq.heapify(self._heap)
        self._size = len(self._heap)

    def discard(self) -> None:
        """One of the sequences here is no longer waiting: its place says so already."""
        self._size -= 1
        if len(self._heap) > max(_COMPACT_ABOVE, 2 * self._size):
            self._heap = [entry for entry in self._heap if entry[2].place is Place.WAITING]
            heapq.heapify(self._heap)
