"""A placement in which every expert has a slot, made of what ranks hold already; numpy only, no I/O."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

from drumline.protocol.messages import I32

_Mask: TypeAlias = np.ndarray[Any, np.dtype[np.bool_]]

TAKEN = 1 << 30


def cover(held: Sequence[I32], slots: Sequence[int], num_experts: int) -> I32:
    """A placement, int32 (moe_layers, sum(slots)), that has every expert in every layer.

    ``held[e]``: int32 (moe_layers, any number of slots), what ep rank e has in its slots now, -1 for nothing. What
    stands in one of its first ``slots[e]`` slots stays, unless it is a copy more than one and its slot is needed for an
    expert without any, or a second copy on the same rank. Slots that are left over get copies of the experts with
    fewest. Deterministic. Raises ValueError when there are fewer slots than experts.
    """
    total, layers = sum(slots), held[0].shape[0] if held else 0
    if total < num_experts:
        raise ValueError(f"{total} slots cannot hold {num_experts} experts")
    return _Cover(held, slots, layers, num_experts).placement()


class _Cover:
    """All layers at once: each step of a loop below does one slot of every layer."""

    def __init__(self, held: Sequence[I32], slots: Sequence[int], layers: int, num_experts: int) -> None:
        self._layer = np.arange(layers)
        self._slots = slots
        self._rank_of = np.repeat(np.arange(len(slots)), slots)
        self._now = np.full((layers, sum(slots)), -1, dtype=np.int32)
        self._counts = np.zeros((layers, num_experts), dtype=np.int32)
        self._on_rank = np.zeros((layers, len(slots), num_experts), dtype=np.bool_)
        first = 0
        for has, count in zip(held, slots, strict=True):
            kept = min(has.shape[1], count)
            self._now[:, first : first + kept] = has[:, :kept]
            first += count
        self._drop_second_copies()

    def placement(self) -> I32:
        """The experts of all slots."""
        self._make_room()
        free = self._now < 0
        order, many = self._free_in_turn(free)
        missing = np.argsort(self._counts > 0, axis=1, kind="stable")
        lacking = (self._counts == 0).sum(axis=1)
        for turn in range(int(many.max(initial=0))):
            layers = self._layer[turn < many]
            slot = order[layers, turn]
            expert = missing[layers, np.minimum(turn, missing.shape[1] - 1)]
            spare = turn >= lacking[layers]
            if spare.any():
                expert[spare] = self._fewest(layers[spare], self._rank_of[slot[spare]])
            self._put(layers, slot, expert)
        return self._now

    def _put(self, layers: np.ndarray[Any, Any], slot: np.ndarray[Any, Any], expert: np.ndarray[Any, Any]) -> None:
        self._now[layers, slot] = expert
        self._counts[layers, expert] += 1
        self._on_rank[layers, self._rank_of[slot], expert] = True

    def _drop_second_copies(self) -> None:
        """Count what is there; a second copy on a rank is as good as nothing."""
        for slot, rank in enumerate(self._rank_of):
            expert = self._now[:, slot]
            layers = self._layer[expert >= 0]
            here = expert[layers]
            again = self._on_rank[layers, rank, here]
            self._now[layers[again], slot] = -1
            layers, here = layers[~again], here[~again]
            self._on_rank[layers, rank, here] = True
            self._counts[layers, here] += 1

    def _make_room(self) -> None:
        """Where fewer slots are free than experts missing, give up copies of the experts that have most."""
        lacking = (self._counts == 0).sum(axis=1) - (self._now < 0).sum(axis=1)
        while (lacking > 0).any():
            layers = self._layer[lacking > 0]
            now = self._now[layers]
            copies = np.where(now >= 0, np.take_along_axis(self._counts[layers], np.maximum(now, 0), axis=1), 0)
            # The last of equals: the first slots of a rank are those that it keeps when others come back.
            slot = now.shape[1] - 1 - np.argmax(copies[:, ::-1], axis=1)
            expert = self._now[layers, slot]
            self._now[layers, slot] = -1
            self._counts[layers, expert] -= 1
            self._on_rank[layers, self._rank_of[slot], expert] = False
            lacking[layers] -= 1

    def _free_in_turn(self, free: _Mask) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """The free slots of each layer, one of every rank, then another of every rank, and so on; and their number."""
        before = np.cumsum(free, axis=1)
        starts = np.concatenate([[0], np.cumsum(self._slots)[:-1]]).astype(np.int64)
        base = np.concatenate([np.zeros((len(free), 1), dtype=before.dtype), before], axis=1)[:, starts]
        turn = before - base[:, self._rank_of]
        key = np.where(free, turn * len(self._slots) + self._rank_of, TAKEN)
        return np.argsort(key, axis=1, kind="stable"), free.sum(axis=1)

    def _fewest(self, layers: np.ndarray[Any, Any], rank: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """For each, the expert with fewest copies, of those that ``rank`` has not, if there is one."""
        score = self._counts[layers] + self._on_rank[layers, rank] * TAKEN
        fewest: np.ndarray[Any, Any] = np.argmin(score, axis=1)
        return fewest
