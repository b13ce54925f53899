"""How many copies each expert has: some go from experts that need them least to the heaviest."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from drumline.engine.core.balance.grid import F32, Bool, Grid, Index
from drumline.protocol.messages import I32

HEAVY = 0.3
"""Copies that take more than this share of the mean rank's load are worth dividing; lighter ones can be packed."""
WORTH = 0.97
"""The expert that gives a copy has copies lighter than this share of the heaviest, also after."""
CROWDED = 1.1
"""A rank that would take more than this times the mean is no place for a new copy; another expert makes room."""
LOOK = 4
"""A state is kept after so many copies."""


def share_copies(grid: Grid, rows: Index, budget: Index, note: Callable[[bool], Index]) -> None:
    """Change the copies of layers ``rows`` where that is worth it, until a layer has changed ``budget`` (layers,)
    places. ``note`` counts those, (layers,), and keeps the state if it is told so."""
    wanted = grid.copies.copy()
    wanted[rows] = _targets(grid, rows)
    more = wanted - grid.copies
    rows = rows[more[rows].any(axis=1)]
    if not len(rows):
        return
    # From here on places take what they will take when all copies are there.
    grid.copies[rows] = wanted[rows]
    grid.count(rows)
    todo, turn = rows, 0
    while len(todo):
        todo = todo[(more[todo].max(axis=1) > 0) & (note(turn % LOOK == 0)[todo] + 2 <= budget[todo])]
        if len(todo):
            _Exchange(grid, todo, more).make()
        turn += 1
    grid.copies[rows] = grid.on_node[rows].sum(axis=1)
    grid.count(rows)


def _targets(grid: Grid, rows: Index) -> I32:
    """int32 (rows, experts + 1): how many copies each expert should have; as many in all as there are."""
    copies: I32 = grid.copies[rows]
    demand = grid.demand[rows]
    heaviest = np.where(copies < grid.num_ranks, grid.each[rows], np.float32(0))
    heaviest[:, -1] = 0
    loss = np.where(copies > 1, demand / np.maximum(copies - 1, 1).astype(np.float32), np.float32(np.inf))
    loss[:, -1] = np.inf
    limit, k = HEAVY * grid.mean[rows], np.arange(len(rows))
    while len(k):
        taker, giver = heaviest[k].argmax(axis=1), loss[k].argmin(axis=1)
        most = heaviest[k, taker]
        go = (most > limit[k]) & (loss[k, giver] < WORTH * most)
        k, taker, giver = k[go], taker[go], giver[go]
        copies[k, taker] += 1
        copies[k, giver] -= 1
        for expert in (taker, giver):
            count, load = copies[k, expert], demand[k, expert]
            heaviest[k, expert] = np.where(count < grid.num_ranks, load / count, np.float32(0))
            loss[k, expert] = np.where(count > 1, load / np.maximum(count - 1, 1), np.float32(np.inf))
    return copies


class _Exchange:
    """One copy in each layer of ``rows``: of the heaviest expert that lacks one, in a place whose expert has too many.
    ``more`` (layers, experts + 1): copies that each expert is to get, below 0 to lose."""

    def __init__(self, grid: Grid, rows: Index, more: I32) -> None:
        self._grid, self._rows, self._more, self._k = grid, rows, more, np.arange(len(rows))
        self._taker = np.where(more[rows] > 0, grid.each[rows], np.float32(-1)).argmax(axis=1)
        self._mean = grid.mean[rows]

    def make(self) -> None:
        grid, rows, taker = self._grid, self._rows, self._taker
        experts = grid.expert[rows]
        spare = np.take_along_axis(self._more[rows] < 0, experts.reshape(len(rows), -1), axis=1).reshape(experts.shape)
        spare &= ~self._needed_on_node(experts)
        lacking = ~grid.held[rows, :, taker] & self._spreads()
        share = grid.each[rows, taker]
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
        # Where there is no place for a copy, the expert goes without it.
        stuck = ~(first | second)
        self._more[rows[stuck], taker[stuck]] = 0

    def _needed_on_node(self, experts: I32) -> Bool:
        """Places whose copy is the only one on its node while another node has several."""
        grid, rows = self._grid, self._rows
        crowd = (self._more[rows] < 0) & (grid.on_node[rows].max(axis=1) > 1)
        if not crowd.any():
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
        grid, rows, row, end = self._grid, self._rows, self._rows[:, None], gap[:, :1]
        experts, weight = grid.expert[rows, rank], grid.weight[rows, rank]
        left = grid.load[rows, rank][:, None] - weight + share[:, None]
        after = np.maximum(left, base[:, None] + weight)
        stuck = (experts == grid.experts) | grid.held[row, end, experts]
        stuck |= grid.crowds(row, experts, rank[:, None], end)
        after = np.where(stuck, np.float32(np.inf), after)
        moved = after.argmin(axis=1)
        return after[self._k, moved], moved

    def _put(self, which: Bool, at: Index) -> None:
        rows, taker, (rank, place) = self._rows[which], self._taker[which], at[which].T
        self._take(rows, rank, place)
        self._come(rows, rank, place, taker)
        self._more[rows, taker] -= 1

    def _shift(self, which: Bool, rank: Index, moved: Index, gap: Index) -> None:
        grid, rows, taker = self._grid, self._rows[which], self._taker[which]
        rank, moved, (end, place) = rank[which], moved[which], gap[which].T
        expert = grid.expert[rows, rank, moved]
        self._take(rows, end, place)
        grid.leave(rows, rank, expert)
        grid.load[rows, rank] -= grid.weight[rows, rank, moved]
        self._come(rows, end, place, expert)
        self._come(rows, rank, moved, taker)
        self._more[rows, taker] -= 1

    def _take(self, rows: Index, rank: Index, place: Index) -> None:
        grid, expert = self._grid, self._grid.expert[rows, rank, place]
        grid.leave(rows, rank, expert)
        grid.load[rows, rank] -= grid.weight[rows, rank, place]
        self._more[rows, expert] += 1

    def _come(self, rows: Index, rank: Index, place: Index, expert: Index) -> None:
        grid = self._grid
        grid.come(rows, rank, place, expert)
        grid.weight[rows, rank, place] = grid.each[rows, expert]
        grid.load[rows, rank] += grid.each[rows, expert]
