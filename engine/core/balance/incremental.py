"""The policy ``incremental``: from the placement that stands to a better one, over as few slots as that takes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from drumline.engine.core.balance.forecast import Forecast, uneven
from drumline.engine.core.balance.grid import F32, Bool, Grid, Index
from drumline.engine.core.balance.measure import F64
from drumline.engine.core.balance.repair import repair
from drumline.engine.core.balance.replicas import share_copies
from drumline.engine.core.balance.spend import spend
from drumline.engine.core.balance.swaps import swap_once
from drumline.protocol.messages import I32, I32Matrix

ROUNDS = 40
"""Rounds of swaps at most."""
PATIENCE = 2
"""Rounds without a better balance after which a layer is left as it is."""

WITH_OTHERS = 0.2
"""Where all layers together gain what is asked, one may gain so much less."""
VISIBLE = 1.2
"""A rank that takes so many times more than chance gives it will be seen to next time, too."""
FAINT = 0.01
"""The share of the places that change where the unevenness is no more than the noise of one snapshot makes: a placement
that was made for one is mended, but slowly."""
NEAR = 0.002
"""A layer may end so far below the best balancedness that was found for it."""


@dataclass(frozen=True, slots=True, eq=False)
class Limits:
    """``most``: slots that may get another expert, over all layers. ``gain``: balancedness by which the mean of the
    layers, or else a layer by itself, must rise to be changed."""

    most: int
    gain: float


def improve(standing: I32Matrix, seen: Forecast, slots: I32, nodes: I32, limits: Limits) -> I32Matrix:
    """The better placement, int32 (layers, slots), or ``standing`` itself where nothing is worth it.

    ``standing``: of the live ranks, which have ``slots`` (ranks,), from 1, on ``nodes`` (ranks,), numbers from 0. What
    must be (every expert somewhere, none twice on a rank) is done whatever the limits say. An expert that stays on its
    rank may come to another slot.
    """
    slot_rank = np.repeat(np.arange(len(slots), dtype=np.int32), slots)
    repaired = repair(standing, seen.demand, slot_rank, nodes)
    grid = Grid(repaired, seen.demand, slots, nodes)
    must = ((repaired != standing) & (repaired >= 0)).sum(axis=1)
    wrong, chance = uneven(seen.load, seen.off, repaired, slot_rank)
    faint = ~uneven(seen.load, seen.shake, repaired, slot_rank)[0] if seen.shake else np.zeros_like(wrong)
    rows = np.flatnonzero(wrong)
    search = _Search(grid, rows, max(limits.most - int(must.sum()), 0))
    search.run()
    state = search.spend(limits, chance, faint)
    placement = grid.placement(state)
    return np.where(placement < 0, standing, placement)


class _Search:
    """States of the layers as they get better, and what each costs."""

    def __init__(self, grid: Grid, rows: Index, most: int) -> None:
        self._grid, self._rows, self._most = grid, rows, most
        self._start = grid.expert.copy()
        self._states: list[I32] = []
        self._changed: list[Index] = []
        self._balance: list[F32] = []
        self._record()

    def run(self) -> None:
        grid = self._grid
        budget = np.full(len(grid.expert), self._most, dtype=np.int64)
        share_copies(grid, self._rows, budget, self._note)
        rows, best, since = self._rows, np.zeros(len(budget), dtype=np.float32), np.zeros(len(budget), dtype=np.int64)
        for turn in range(ROUNDS):
            changed = self._record()
            better = self._balance[-1] > best + np.float32(1e-5)
            best = np.maximum(best, self._balance[-1])
            since = np.where(better, 0, since + 1)
            rows = rows[(since[rows] < PATIENCE) & (changed[rows] + 2 <= budget[rows])]
            rows = swap_once(grid, rows, turn, (budget - changed) // 2, since > 0)
            if not len(rows):
                break
        self._record()

    def _note(self, keep: bool) -> Index:
        """While copies change and ``load`` of the grid runs ahead of them. Returns what :meth:`_record` does."""
        return self._record(self._grid.true_balancedness()) if keep else self._count()

    def _count(self) -> Index:
        """(layers,): how many places have another expert than at the start."""
        changed: Index = (self._grid.expert != self._start).sum(axis=(1, 2))
        return changed

    def _record(self, balance: F32 | None = None) -> Index:
        """Returns (layers,): how many places have another expert than at the start."""
        self._states.append(self._grid.expert.copy())
        self._changed.append(self._count())
        self._balance.append(self._grid.balancedness() if balance is None else balance)
        return self._changed[-1]

    def spend(self, limits: Limits, chance: F64, faint: Bool) -> I32:
        """The state of each layer to be had within the limits. ``chance`` (layers,): how much of the mean chance may
        give to a rank; ``faint`` (layers,): where a single snapshot would not have shown that anything is uneven."""
        balance, changed = np.stack(self._balance, axis=1), np.stack(self._changed, axis=1)
        short = balance.max(axis=1, keepdims=True) - balance
        # What is left of a layer must be so much that a later plan goes on with it.
        visible = 1.0 / balance - 1.0 > VISIBLE * chance[:, None]
        allowed: Bool = (short <= NEAR) | ((short >= 2 * limits.gain) & visible)
        gain = balance - balance[:, :1]
        enough = limits.gain * (WITH_OTHERS if gain.max(axis=1).mean() >= limits.gain else 1.0)
        allowed &= gain >= enough
        allowed[:, 0] = True
        first = np.arange(balance.shape[1]) == 0
        chosen = spend(balance, changed, allowed & (first | ~faint[:, None]), self._most)
        if faint.any():
            left = self._most - int(changed[np.arange(len(chosen)), chosen].sum())
            few = min(left, int(FAINT * np.count_nonzero(self._start < self._grid.experts)))
            chosen = np.where(faint, spend(balance, changed, allowed & (first | faint[:, None]), few), chosen)
        return np.stack([self._states[state][layer] for layer, state in enumerate(chosen.tolist())])
