"""The slots of live ranks as (layers, ranks, places), with the counts that a search for a better placement needs."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np

from drumline.engine.core.balance.measure import F64
from drumline.protocol.messages import I32, I32Matrix

Index: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]
F32: TypeAlias = np.ndarray[Any, np.dtype[np.float32]]
Bool: TypeAlias = np.ndarray[Any, np.dtype[np.bool_]]


class Grid:
    """Layers that are solved together. Ranks are the live ones, numbered anew, ranks without slots left out.

    ``expert`` int32 (layers, ranks, places): what is in each place; the number of experts where there is no slot, or
    one of no use. ``weight`` float32, the load that each place takes, a copy's even share; ``load`` (layers, ranks).
    ``demand`` (layers, experts + 1): of each expert. ``copies`` (layers, experts + 1); ``held`` bool (layers, ranks,
    experts + 1); ``on_node`` (layers, nodes, experts + 1): copies by node; ``spread`` (layers, experts + 1): nodes that
    have one. ``mean`` (layers,): of ``load``.
    """

    def __init__(self, placement: I32Matrix, load: F64, slots: I32, nodes: I32) -> None:
        """``placement`` int32 (layers, slots) of the live ranks, no expert twice on one; ``load`` (layers, experts);
        ``slots`` (ranks,), from 1; ``nodes`` (ranks,), from 0."""
        layers, experts = load.shape
        self.experts, self.nodes = experts, nodes
        self._place = np.arange(int(slots.max())) < slots[:, None]
        self.expert = np.full((layers, *self._place.shape), experts, dtype=np.int32)
        self.expert[:, self._place] = np.where(placement < 0, experts, placement)
        self.demand = np.zeros((layers, experts + 1), dtype=np.float32)
        self.demand[:, :experts] = load
        self.mean: F32 = self.demand.sum(axis=1) / np.float32(len(slots))
        self.on_node = np.zeros((layers, int(nodes.max()) + 1, experts + 1), dtype=np.int16)
        self.held = np.zeros((layers, len(slots), experts + 1), dtype=np.bool_)
        self.held[np.arange(layers)[:, None, None], np.arange(len(slots))[:, None], self.expert] = True
        for rank, node in enumerate(nodes.tolist()):
            self.on_node[:, node] += self.held[:, rank]
        self.copies = self.on_node.sum(axis=1, dtype=np.int32)
        self.spread = (self.on_node > 0).sum(axis=1, dtype=np.int32)
        self.each: F32 = self.demand / np.maximum(self.copies, 1).astype(np.float32)
        self.weight = np.take_along_axis(self.each, self.expert.reshape(layers, -1), axis=1).reshape(self.expert.shape)
        self.load: F32 = self.weight.sum(axis=2)

    @property
    def num_ranks(self) -> int:
        """Live ranks with slots."""
        return len(self.nodes)

    def balancedness(self) -> F32:
        """float32 (layers,)."""
        return self._even(self.load)

    def true_balancedness(self) -> F32:
        """float32 (layers,): by the copies that are there, where ``copies`` says how many there will be."""
        each = self.demand / np.maximum(self.on_node.sum(axis=1), 1).astype(np.float32)
        weight = np.take_along_axis(each, self.expert.reshape(len(each), -1), axis=1).reshape(self.expert.shape)
        return self._even(weight.sum(axis=2))

    def _even(self, load: F32) -> F32:
        most = load.max(axis=1)
        even: F32 = np.divide(self.mean, most, out=np.ones_like(most), where=most > 0)
        return even

    def placement(self, expert: I32 | None = None) -> I32Matrix:
        """int32 (layers, slots), -1 for what is of no use; of another state of ``expert`` if that is given."""
        state = (self.expert if expert is None else expert)[:, self._place]
        return np.where(state == self.experts, -1, state).astype(np.int32)

    def leave(self, rows: Index, ranks: Index, experts: Index) -> None:
        """The experts, one for each of ``rows``, are no longer on those ranks. No expert twice in one layer."""
        at = (rows, self.nodes[ranks], experts)
        self.held[rows, ranks, experts] = False
        self.on_node[at] -= 1
        self.spread[rows, experts] -= self.on_node[at] == 0

    def come(self, rows: Index, ranks: Index, places: Index, experts: Index) -> None:
        """The experts are in those places now. What was there must have left. No expert twice in one layer."""
        at = (rows, self.nodes[ranks], experts)
        self.expert[rows, ranks, places] = experts
        self.held[rows, ranks, experts] = True
        self.on_node[at] += 1
        self.spread[rows, experts] += self.on_node[at] == 1

    def count(self, rows: Index) -> None:
        """What every place takes, after ``copies`` of layers ``rows`` have changed."""
        copies = self.copies[rows]
        self.each[rows] = self.demand[rows] / np.maximum(copies, 1).astype(np.float32)
        experts = self.expert[rows]
        weight = np.take_along_axis(self.each[rows], experts.reshape(len(rows), -1), axis=1).reshape(experts.shape)
        self.weight[rows] = weight
        self.load[rows] = weight.sum(axis=2)

    def crowds(self, rows: Index, experts: Index, start: Index, end: Index) -> Bool:
        """Whether an expert that goes from rank ``start`` to rank ``end`` is on fewer nodes then. All broadcast."""
        source, target = self.nodes[start], self.nodes[end]
        nodes, width = self.on_node.shape[1:]
        if nodes == 1:
            return np.zeros((1,) * experts.ndim, dtype=np.bool_)
        # Flat, which is several times as fast as three indices are.
        flat, first = self.on_node.ravel(), rows * nodes
        last = flat.take((first + source) * width + experts) == 1
        there = flat.take((first + target) * width + experts) >= 1
        crowded: Bool = last & there & (source != target)
        return crowded

    def holds(self, rows: Index, ranks: Index, experts: Index) -> Bool:
        """Whether a rank has an expert. All broadcast."""
        has: Bool = self.held.ravel().take((rows * self.num_ranks + ranks) * self.held.shape[2] + experts)
        return has
