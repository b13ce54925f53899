"""Two experts change places where the busier of their ranks has less to do then; many ranks and layers at once."""

from __future__ import annotations

import numpy as np

from drumline.engine.core.balance.grid import F32, Bool, Grid, Index

EVEN = 0.0025
"""A rank that takes this share more than the mean is left as it is."""
BUSY = 0.5
"""A rank is busy if it takes this share of what the busiest takes above the mean."""
LIGHT = 0.4
"""The share of the ranks, the lightest, that are partners while swaps with them are found."""
LEAST = 0.0005
"""A swap takes this share of the mean off the busier rank, or is not worth it."""
FAR = 0.3
"""What a swap between nodes brings counts for so much less."""


def swap_once(grid: Grid, rows: Index, turn: int, budget: Index, stalled: Bool) -> Index:
    """One swap at most for each rank of layers ``rows``, and ``budget`` (layers,) swaps in each. ``turn``: which
    partners each busy rank has, a number that goes up by one. ``stalled`` (layers,): where only the busiest rank has
    partners, all others. Returns the layers that still have a busy rank."""
    load, mean = grid.load[rows], grid.mean[rows]
    bound = np.maximum(mean * np.float32(EVEN), (load.max(axis=1) - mean) * np.float32(BUSY))
    busy = np.minimum((load - mean[:, None] > bound[:, None]).sum(axis=1), grid.num_ranks // 2)
    busy = np.where(stalled[rows], np.minimum(busy, 1), busy)
    rows, load, busy = rows[busy > 0], load[busy > 0], busy[busy > 0]
    if len(rows):
        _Swap(grid, rows, load, busy, turn, bool(stalled[rows].any())).make(budget)
    return rows


class _Swap:
    """Each rank that is not busy is the partner of a busy one; a busy rank takes the best of its partners."""

    def __init__(self, grid: Grid, rows: Index, load: F32, busy: Index, turn: int, wide: bool) -> None:
        order = np.argsort(load, axis=1, kind="stable")
        # The lightest ranks, unless nothing was found for the busiest with those.
        few = max(int(busy.max()), int(LIGHT * grid.num_ranks))
        count = grid.num_ranks - int(busy.min())
        count = count if wide else min(count, few)
        partner = np.arange(count)[None, :]
        which = (partner + turn) % busy[:, None]
        self._real = partner < grid.num_ranks - busy[:, None]
        self._grid, self._rows, self._row = grid, rows, rows[:, None]
        self._which = which
        self._busy = np.take_along_axis(order, grid.num_ranks - 1 - which, axis=1)
        self._partner = order[:, :count]
        self._mean = grid.mean[rows][:, None]

    def make(self, budget: Index) -> None:
        grid, rows = self._grid, self._row
        most, place, other = self._best_places()
        far = grid.nodes[self._busy] != grid.nodes[self._partner]
        worth = self._real & (most < grid.load[rows, self._busy] - LEAST * self._mean)
        high, low = grid.load[rows, self._busy] / self._mean, grid.load[rows, self._partner] / self._mean
        off, half = most / self._mean - (high + low) / 2, (high - low) / 2
        # By how much the squares of the loads fall.
        cost = off**2 - half**2 + np.where(far, np.float32(FAR), np.float32(0)) * half**2
        layer, pair = self._choose(np.where(worth, cost, np.float32(np.inf)), budget)
        at = (layer, pair)
        chosen = rows[layer, 0]
        self._change(chosen, self._busy[at], place[at], self._partner[at], other[at])

    def _best_places(self) -> tuple[F32, Index, Index]:
        """(rows, pairs) each: the load of the busier rank after the best swap, and the two places of it."""
        grid, row = self._grid, self._row
        high, low = grid.load[row, self._busy], grid.load[row, self._partner]
        give = np.where(self._stuck(self._busy, self._partner), np.float32(np.inf), grid.weight[row, self._busy])
        take = np.where(self._stuck(self._partner, self._busy), np.float32(np.inf), grid.weight[row, self._partner])
        give = give - ((high - low) * np.float32(0.5))[:, :, None]
        off = give[:, :, :, None] - np.where(np.isfinite(take), take, np.float32(-np.inf))[:, :, None, :]
        off = np.abs(off, out=off).reshape(*off.shape[:2], -1)
        best = off.argmin(axis=2)
        least = np.take_along_axis(off, best[:, :, None], axis=2)[:, :, 0]
        place, other = np.divmod(best, grid.expert.shape[2])
        return (high + low) * np.float32(0.5) + least, place, other

    def _stuck(self, start: Index, end: Index) -> Bool:
        """(rows, pairs, places): whether the expert there cannot go to the other rank."""
        grid, row = self._grid, self._row[:, :, None]
        experts = grid.expert[self._row, start]
        stuck: Bool = grid.holds(row, end[:, :, None], experts) | (experts == grid.experts)
        stuck |= grid.crowds(row, experts, start[:, :, None], end[:, :, None])
        return stuck

    def _choose(self, cost: F32, budget: Index) -> tuple[Index, Index]:
        """Row and pair of the best swap of each busy rank, the busiest first, no more than ``budget``."""
        order = np.lexsort((cost, self._which), axis=1)
        which = np.take_along_axis(self._which, order, axis=1)
        first = np.ones(which.shape, dtype=np.bool_)
        first[:, 1:] = which[:, 1:] != which[:, :-1]
        first &= np.isfinite(np.take_along_axis(cost, order, axis=1))
        first &= np.cumsum(first, axis=1) <= budget[self._rows][:, None]
        layer, place = np.nonzero(first)
        return layer, order[layer, place]

    def _change(self, rows: Index, busy: Index, place: Index, partner: Index, other: Index) -> None:
        """An expert that is to move twice in one layer moves once, so that its copies do not meet."""
        grid = self._grid
        given, taken = grid.expert[rows, busy, place], grid.expert[rows, partner, other]
        number = np.arange(len(rows))
        mover = np.empty((len(grid.expert), grid.experts + 1), dtype=np.int64)
        # The last to write stays: backwards, that is the first swap which moves the expert.
        backwards = np.repeat(number[::-1], 2)
        mover[rows[backwards], np.stack([given, taken], axis=1)[::-1].ravel()] = backwards
        alone = (mover[rows, given] == number) & (mover[rows, taken] == number)
        rows, busy, place, partner, other = rows[alone], busy[alone], place[alone], partner[alone], other[alone]
        given, taken = given[alone], taken[alone]
        more, less = grid.weight[rows, busy, place], grid.weight[rows, partner, other]
        grid.leave(rows, busy, given)
        grid.leave(rows, partner, taken)
        grid.come(rows, busy, place, taken)
        grid.come(rows, partner, other, given)
        grid.weight[rows, busy, place], grid.weight[rows, partner, other] = less, more
        grid.load[rows, busy] += less - more
        grid.load[rows, partner] += more - less
