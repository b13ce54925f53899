"""Which copy of an expert computes a token, where there are several."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from drumline.protocol.messages import I32
from drumline.protocol.placement import PlacementMaps


class ReplicaChoice:
    """One layer's choice for the tokens that are home to one rank.

    A copy on the rank itself is taken before those on its node, and those before all others; where several are left
    they take turns by the row of the token among the rank's and by the step, so that they share the load, with one
    token a step too. ``candidates`` int64 (experts, most): physical slots; ``counts`` int64 (experts,): how many.
    """

    def __init__(self, candidates: Tensor, counts: Tensor, ep_rank: int) -> None:
        self._candidates = candidates
        self._counts = counts
        # Ranks begin at different copies.
        self._first = ep_rank

    @classmethod
    def of(
        cls, maps: PlacementMaps, moe_layer: int, ep_rank: int, nodes: Sequence[int], device: torch.device
    ) -> ReplicaChoice | None:
        """The choice of rank ``ep_rank``; None where each expert has one copy. ``nodes``: a number for the host of each
        ep rank, none: all on one."""
        if maps.logical_replica_count[moe_layer].max(initial=1) == 1:
            return None
        slots = maps.logical_to_physical[moe_layer]
        owner = maps.slot_rank[np.maximum(slots, 0)]
        where = np.asarray(nodes, dtype=np.int32) if len(nodes) else np.zeros(len(maps.rank_offsets) - 1, np.int32)
        distance = np.where(owner == ep_rank, 0, np.where(where[owner] == where[ep_rank], 1, 2))
        distance[slots < 0] = 3
        near = distance == distance.min(axis=1, keepdims=True)
        # Candidates first, in slot order; what stands behind them is never looked at.
        order = np.argsort(~near, axis=1, kind="stable")
        candidates = np.maximum(np.take_along_axis(slots, order, axis=1), 0)
        return cls(_tensor(candidates, device), _tensor(near.sum(axis=1), device), ep_rank)

    def slots_of(self, experts: Tensor, step: int) -> Tensor:
        """Logical experts int64 (n, K) to physical slots int64 (n, K)."""
        first = self._first + step
        turns = torch.arange(first, first + len(experts), device=experts.device).unsqueeze(1)
        return self._candidates[experts, turns % self._counts[experts]]


def _tensor(array: np.ndarray | I32, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64)).to(device)
