"""Placements as a search can start from: every expert somewhere, none twice on a rank, no slot empty that helps."""

from __future__ import annotations

import numpy as np

from drumline.engine.core.balance.measure import F64
from drumline.protocol.messages import I32, I32Matrix


def repair(placement: I32Matrix, load: F64, slot_rank: I32, nodes: I32) -> I32Matrix:
    """A copy of ``placement`` in which all experts have a slot, and an empty one, or one with a second copy on its
    rank, has got another expert where there is one that the rank lacks; else -1 stands for it.

    int32 (layers, slots), of live ranks alone; ``load`` (layers, experts); ``slot_rank`` (slots,); ``nodes`` (ranks,).
    As many slots as experts are needed.
    """
    repaired = placement.copy()
    experts = load.shape[1]
    for layer in _wanting(placement, slot_rank, experts).tolist():
        _Layer(repaired[layer], load[layer], slot_rank, nodes).repair()
    return repaired


def _wanting(placement: I32Matrix, slot_rank: I32, experts: int) -> I32:
    """The layers that need it."""
    layers = len(placement)
    key = slot_rank * (experts + 1) + placement + 1
    on_rank = np.zeros((layers, (int(slot_rank.max(initial=0)) + 1) * (experts + 1)), dtype=np.int16)
    np.add.at(on_rank, (np.arange(layers)[:, None], key), 1)
    by_expert = on_rank.reshape(layers, -1, experts + 1)
    fine = (on_rank.max(axis=1, initial=0) <= 1) & (by_expert[:, :, 0].max(axis=1, initial=0) == 0)
    fine &= (by_expert[:, :, 1:].sum(axis=1) > 0).all(axis=1)
    return np.flatnonzero(~fine).astype(np.int32)


class _Layer:
    """One layer; ``row`` is changed."""

    def __init__(self, row: I32, load: F64, slot_rank: I32, nodes: I32) -> None:
        self._row, self._load, self._slot_rank, self._nodes = row, load, slot_rank, nodes
        self._held = np.zeros((len(nodes), len(load)), dtype=np.bool_)
        self._copies = np.zeros(len(load), dtype=np.int64)
        for slot, (rank, expert) in enumerate(zip(slot_rank.tolist(), row.tolist(), strict=True)):
            if expert >= 0 and not self._held[rank, expert]:
                self._held[rank, expert] = True
                self._copies[expert] += 1
            else:
                row[slot] = -1

    def repair(self) -> None:
        missing = np.flatnonzero(self._copies == 0)
        for expert in missing[np.argsort(-self._load[missing], kind="stable")].tolist():
            self._put(self._slot_to_spare(), expert)
        # The heaviest copies first, so that the ranks with most empty slots do not get what is left over.
        for slot in np.flatnonzero(self._row < 0).tolist():
            lacking = ~self._held[self._slot_rank[slot]]
            if lacking.any():
                self._put(slot, self._to_copy(lacking, int(self._nodes[self._slot_rank[slot]])))

    def _to_copy(self, lacking: np.ndarray[tuple[int], np.dtype[np.bool_]], node: int) -> int:
        """The expert that gains most, rather one that the node lacks."""
        near = self._held[self._nodes == node].any(axis=0)
        each = np.where(lacking, self._load / np.maximum(self._copies, 1), -1.0)
        alone = np.where(near, -1.0, each)
        return int(alone.argmax()) if alone.max() >= 0.5 * each.max() else int(each.argmax())

    def _slot_to_spare(self) -> int:
        """An empty one of the rank that has most of them, else one of the expert whose loss costs least."""
        empty = np.flatnonzero(self._row < 0)
        if len(empty):
            by_rank = np.bincount(self._slot_rank[empty], minlength=len(self._nodes))
            return int(empty[by_rank[self._slot_rank[empty]].argmax()])
        copies = self._copies[self._row]
        after = np.where(copies > 1, self._load[self._row] / np.maximum(copies - 1, 1), np.inf)
        return int(after.argmin())

    def _put(self, slot: int, expert: int) -> None:
        rank, gone = int(self._slot_rank[slot]), int(self._row[slot])
        if gone >= 0:
            self._held[rank, gone] = False
            self._copies[gone] -= 1
        self._row[slot] = expert
        self._held[rank, expert] = True
        self._copies[expert] += 1
