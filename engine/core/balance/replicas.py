"""How many copies each expert has: one after the other goes from an expert that needs it least to the heaviest."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from drumline.engine.core.balance.grid import F32, Bool, Grid, Index

HEAVY = 0.3
"""Copies that take more than this share of the mean rank's load are worth dividing; lighter ones can be packed."""
WORTH = 0.8
"""The expert that gives a copy has copies lighter than this share of the heaviest, also after."""
CROWDED = 1.1
"""A rank that would take more than this times the mean is no place for a new copy; another expert makes room."""
MOST = 64


def share_copies(grid: Grid, rows: Index, budget: Index, changed: Callable[[], Index]) -> None:
    """Change the copies of layers ``rows`` until none is worth it, or a layer has changed ``budget`` (layers,) places.
    ``changed`` counts them, (layers,)."""
    for _ in range(max(MOST, int(grid.copies[:, :-1].sum(axis=1).max()) - grid.experts)):
        rows = rows[changed()[rows] + 2 <= budget[rows]]
        if not len(rows):
            return
        rows = _Exchange(grid, rows).make()


class _Exchange:
    """One copy in each layer of ``rows``: ``taker`` gets it, and a place whose expert has other copies is taken."""

    def __init__(self, grid: Grid, rows: Index) -> None:
        each, copies, demand = grid.each[rows], grid.copies[rows], grid.demand[rows]
        gain = np.where(copies < grid.num_ranks, each, np.float32(0))
        gain[:, -1] = 0
        taker = gain.argmax(axis=1)
        top = gain[np.arange(len(rows)), taker]
        loss = np.where(copies > 1, demand / np.maximum(copies - 1, 1).astype(np.float32), np.float32(np.inf))
        loss[np.arange(len(rows)), taker] = np.inf
        loss[:, -1] = np.inf
        least = loss.min(axis=1)
        go = (top > HEAVY * grid.mean[rows]) & (least < WORTH * top)
        self._grid, self._rows, self._taker, self._k = grid, rows[go], taker[go], np.arange(int(go.sum()))
        self._mean = grid.mean[self._rows]
        self._limit = np.maximum(least[go], 0.5 * HEAVY * self._mean)
        self._loss = loss[go]

    def make(self) -> Index:
        """Returns the layers in which a copy went."""
        if not len(self._rows):
            return self._rows
        grid, rows, taker = self._grid, self._rows, self._taker
        experts = grid.expert[rows]
        loss = np.take_along_axis(self._loss, experts.reshape(len(rows), -1), axis=1).reshape(experts.shape)
        spare = (loss <= self._limit[:, None, None]) & ~self._needed_on_node(experts)
        lacking = ~grid.held[rows, :, taker] & self._spreads()
        share = grid.demand[rows, taker] / (grid.copies[rows, taker] + 1).astype(np.float32)
        without = np.where(spare, grid.load[rows][:, :, None] - grid.weight[rows], np.float32(np.inf))
        direct, place = self._lightest(np.where(lacking[:, :, None], without, np.float32(np.inf)))
        direct = direct + share
        rank = np.where(lacking, grid.load[rows], np.float32(np.inf)).argmin(axis=1)
        other = (np.arange(grid.num_ranks)[None, :] != rank[:, None])[:, :, None]
        base, gap = self._lightest(np.where(other, without, np.float32(np.inf)))
        indirect, moved = self._make_room(rank, gap, base, share)
        indirect[~lacking[self._k, rank]] = np.inf
        second = (direct > CROWDED * self._mean) & (indirect < direct)
        first = ~second & np.isfinite(direct)
        self._put(first, place)
        self._shift(second, rank, moved, gap)
        done = first | second
        grid.count(rows[done])
        return rows[done]

    def _needed_on_node(self, experts: Index) -> Bool:
        """Places whose copy is the only one on its node while another node has several."""
        grid, rows = self._grid, self._rows
        crowd = grid.copies[rows] > grid.spread[rows]
        if not (crowd & np.isfinite(self._loss)).any():
            return np.zeros((1, 1, 1), dtype=np.bool_)
        crowded = np.take_along_axis(crowd, experts.reshape(len(rows), -1), axis=1).reshape(experts.shape)
        alone = grid.on_node[rows[:, None, None], grid.nodes[None, :, None], experts] == 1
        needed: Bool = crowded & alone
        return needed

    def _spreads(self) -> Bool:
        """(rows, ranks): whether a copy of ``taker`` there is on as many nodes as can be."""
        there = self._grid.on_node[self._rows[:, None], self._grid.nodes[None, :], self._taker[:, None]] > 0
        everywhere: Bool = ~there | there.all(axis=1, keepdims=True)
        return everywhere

    def _lightest(self, cost: F32) -> tuple[F32, Index]:
        """The least of each row, and its (rows, 2) rank and place."""
        flat = cost.reshape(len(cost), -1)
        best = flat.argmin(axis=1)
        return flat[self._k, best], np.stack(np.divmod(best, cost.shape[2]), axis=1)

    def _make_room(self, rank: Index, gap: Index, base: F32, share: F32) -> tuple[F32, Index]:
        """The best place of ``rank`` to move to ``gap``: the load of the busier rank of the two then, and the place."""
        grid, rows, k = self._grid, self._rows, self._k
        experts, weight = grid.expert[rows, rank], grid.weight[rows, rank]
        left = self._grid.load[rows, rank][:, None] - weight + share[:, None]
        after = np.maximum(left, base[:, None] + weight)
        row, end = rows[:, None], gap[:, :1]
        stuck = (experts == grid.experts) | grid.held[row, end, experts]
        stuck |= experts == experts_at(grid, rows, gap)[:, None]
        stuck |= grid.crowds(row, experts, rank[:, None], end)
        after = np.where(stuck, np.float32(np.inf), after)
        moved = after.argmin(axis=1)
        return after[k, moved], moved

    def _put(self, which: Bool, at: Index) -> None:
        rows, taker = self._rows[which], self._taker[which]
        self._take(rows, at[which])
        self._grid.come(rows, *at[which].T, taker)
        self._grid.copies[rows, taker] += 1

    def _shift(self, which: Bool, rank: Index, moved: Index, gap: Index) -> None:
        grid, rows, rank, moved, gap = self._grid, self._rows[which], rank[which], moved[which], gap[which]
        self._take(rows, gap)
        expert = grid.expert[rows, rank, moved]
        grid.leave(rows, rank, expert)
        grid.come(rows, *gap.T, expert)
        grid.come(rows, rank, moved, self._taker[which])
        grid.copies[rows, self._taker[which]] += 1

    def _take(self, rows: Index, at: Index) -> None:
        expert = experts_at(self._grid, rows, at)
        self._grid.leave(rows, at[:, 0], expert)
        self._grid.copies[rows, expert] -= 1


def experts_at(grid: Grid, rows: Index, at: Index) -> Index:
    """(rows,): the experts in places ``at``, (rows, 2) rank and place."""
    experts: Index = grid.expert[rows, at[:, 0], at[:, 1]]
    return experts
