"""KV blocks: who uses them, which are free, and in which order cached ones are given away.

Blocks have one number over all replicas of the group, so that whole steps are booked with a few array operations.
Number 0 belongs to nobody: tables start out as zeros, and a write to a block that a row does not have lands there.
Replica ``r`` owns ``first[r]`` to ``first[r + 1] - 1``; on the wire a block is its number less ``first[r]``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]


class RecencyQueue:
    """Cached blocks that nobody uses, least recently freed first.

    A block is taken out of the middle by forgetting its place; the dead entry is skipped when it reaches the head, so
    every operation is a few array operations however many blocks it moves.
    """

    def __init__(self, first: int, capacity: int) -> None:
        self._first = first
        self._entries = np.zeros(2 * capacity, dtype=np.int64)
        self._place = np.full(capacity, -1, dtype=np.int64)
        self._head = 0
        self._tail = 0
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def push(self, blocks: I64) -> None:
        """Appends blocks that are not in the queue; the first of them will be the first to go."""
        count = len(blocks)
        if self._tail + count > len(self._entries):
            self._compact()
        places = np.arange(self._tail, self._tail + count)
        self._entries[places] = blocks
        self._place[blocks - self._first] = places
        self._tail += count
        self._size += count

    def remove(self, blocks: I64) -> None:
        """Takes out those of ``blocks`` (each named once) that are in the queue."""
        held = blocks[self._place[blocks - self._first] >= 0]
        self._place[held - self._first] = -1
        self._size -= len(held)

    def pop(self, count: int) -> I64:
        """The ``count`` least recently freed blocks; there must be as many."""
        taken: list[I64] = []
        missing = count
        while missing > 0:
            end = min(self._head + missing, self._tail)
            chunk = self._entries[self._head : end]
            alive = chunk[self._place[chunk - self._first] == np.arange(self._head, end)]
            self._place[alive - self._first] = -1
            taken.append(alive)
            self._head = end
            missing -= len(alive)
            if missing > 0 and self._head == self._tail:
                raise LookupError(f"{count} blocks asked of {self._size} in the recency queue")
        self._size -= count
        return np.concatenate(taken) if taken else np.zeros(0, dtype=np.int64)

    def clear(self) -> I64:
        """Empties the queue; returns what it held."""
        return self.pop(self._size)

    def _compact(self) -> None:
        entries = self._entries[self._head : self._tail]
        alive = entries[self._place[entries - self._first] == np.arange(self._head, self._tail)]
        self._entries[: len(alive)] = alive
        self._place[alive - self._first] = np.arange(len(alive))
        self._head, self._tail = 0, len(alive)


class BlockPool:
    """Blocks of every replica of one group. Free blocks without cached content are given out before cached ones.

    ``keyed[b]`` says that block ``b`` is in the prefix cache, ``keys[b]`` (uint32, 4) under which key; a block that is
    given out for new content loses its key, and the loss is told in ``lost`` until the cache's index has been purged.
    """

    def __init__(self, num_blocks: Sequence[int]) -> None:
        self.first: list[int] = [1]
        for count in num_blocks:
            self.first.append(self.first[-1] + count)
        total = self.first[-1]
        self.num_blocks = tuple(num_blocks)
        self.refs = np.zeros(total, dtype=np.int32)
        self.keyed = np.zeros(total, dtype=np.bool_)
        self.keys = np.zeros((total, 4), dtype=np.uint32)
        self.lost: list[tuple[I64, npt.NDArray[np.uint32]]] = []
        self._stack = np.zeros(total, dtype=np.int64)
        self._base = np.asarray(self.first[:-1], dtype=np.int64)
        self._top = np.asarray(num_blocks, dtype=np.int64)
        self._cached = [RecencyQueue(self.first[r], count) for r, count in enumerate(num_blocks)]
        self._num_cached = np.zeros(len(num_blocks), dtype=np.int64)
        for r, count in enumerate(num_blocks):
            low = self.first[r]
            self._stack[low : low + count] = np.arange(low + count - 1, low - 1, -1)

    def available(self, replica: int) -> int:
        """Blocks that can be given out."""
        return int(self._top[replica] + self._num_cached[replica])

    def available_everywhere(self) -> I64:
        """int64 (replicas,): :meth:`available` of each."""
        return self._top + self._num_cached

    def cached(self, replica: int) -> int:
        """Blocks that nobody uses and that keep their content for a later prompt."""
        return int(self._num_cached[replica])

    def allocate(self, replica: int, count: int) -> I64:
        """``count`` blocks for one row, ascending where the pool is fresh."""
        self._refill(replica, count)
        top = int(self._top[replica])
        base = int(self._base[replica])
        blocks = self._stack[base + top - count : base + top][::-1].copy()
        self._top[replica] = top - count
        self.refs[blocks] = 1
        return blocks

    def allocate_each(self, replicas: I64, counts: I64) -> I64:
        """One block per entry of ``replicas`` (ascending); ``counts`` (replicas of the group,) is its histogram."""
        for replica in np.flatnonzero(counts > self._top):
            self._refill(int(replica), int(counts[replica]))
        starts = np.cumsum(counts) - counts
        nth = np.arange(len(replicas)) - starts[replicas]
        blocks: I64 = self._stack[self._base[replicas] + self._top[replicas] - 1 - nth]
        self._top -= counts
        self.refs[blocks] = 1
        return blocks

    def share(self, replica: int, blocks: I64) -> None:
        """Another row uses these cached blocks."""
        idle = blocks[self.refs[blocks] == 0]
        self._cached[replica].remove(idle)
        self._num_cached[replica] -= len(idle)
        self.refs[blocks] += 1

    def idle_among(self, blocks: I64) -> int:
        """How many of these cached blocks count as available now and would not, once shared."""
        return int(np.count_nonzero(self.refs[blocks] == 0))

    def release(self, replica: int, blocks: I64) -> None:
        """One row lets go of its blocks, given in order. The last ones are the first to be given away."""
        self.refs[blocks] -= 1
        idle = blocks[self.refs[blocks] == 0][::-1]
        keyed = self.keyed[idle]
        kept = idle[keyed]
        if len(kept):
            self._cached[replica].push(kept)
            self._num_cached[replica] += len(kept)
        self._push(replica, idle[~keyed] if len(kept) else idle)

    def forget_cached(self, replica: int) -> None:
        """Every block of the replica loses its key: what its rank held in those blocks is gone."""
        self._push(replica, self._cached[replica].clear())
        self._num_cached[replica] = 0
        self.keyed[self.first[replica] : self.first[replica + 1]] = False

    def _refill(self, replica: int, count: int) -> None:
        missing = count - int(self._top[replica])
        if missing <= 0:
            return
        blocks = self._cached[replica].pop(missing)
        self._num_cached[replica] -= missing
        self.keyed[blocks] = False
        self.lost.append((blocks, self.keys[blocks]))
        self._push(replica, blocks[::-1])

    def _push(self, replica: int, blocks: I64) -> None:
        start = int(self._base[replica] + self._top[replica])
        self._stack[start : start + len(blocks)] = blocks
        self._top[replica] += len(blocks)
