"""What a member of a group has left in the store, until it knows that it was read. Opens nothing, reads no clock."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

MAX_UNREAD = 64
"""How many objects a member leaves in the store for one reader, or for all, before it waits for them to be read."""


class Left(NamedTuple):
    """One object in the store: its sequence number, its key, and when it was written (monotonic seconds)."""

    seq: int
    key: str
    written_at: float


class Lane:
    """The objects of one stream, to one member or to all, oldest first. Numbers only grow."""

    def __init__(self) -> None:
        self.last = 0
        """The number of the newest object that was ever added."""
        self.left: deque[Left] = deque()

    @property
    def full(self) -> bool:
        """Whether the next object must wait."""
        return len(self.left) >= MAX_UNREAD

    def add(self, seq: int, key: str, now: float) -> None:
        """An object is about to be written."""
        self.last = seq
        self.left.append(Left(seq, key, now))

    def drop_to(self, seq: int) -> list[str]:
        """Forget the objects with numbers up to ``seq``. Returns their keys."""
        keys = []
        while self.left and self.left[0].seq <= seq:
            keys.append(self.left.popleft().key)
        return keys

    def written_before(self, when: float) -> list[Left]:
        """The objects that were written before ``when``, oldest first; they stay."""
        due = []
        for entry in self.left:
            if entry.written_at >= when:
                break
            due.append(entry)
        return due
